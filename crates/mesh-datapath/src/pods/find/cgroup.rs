// SPDX-License-Identifier: Apache-2.0
//! Finds pods by the kubelet's cgroups: a process below `pod<UID>` is in the pod's network namespace.
//!
//! Supports both cgroup drivers (`kubepods/burstable/pod<UID>/..` for cgroupfs,
//! `kubepods-burstable-pod<UID with _>.slice/..` for systemd) in every hierarchy, also as seen from a cgroup
//! namespace. The oldest process of a pod belongs to its sandbox, or to a container that the runtime started in
//! the sandbox's namespace: a namespace that a container creates itself has younger processes. The caller
//! compares the addresses of the namespace.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_plan::plan::LocalPod;

use super::super::Error;
use super::Find;

/// The time for which the result of a scan of all processes is reused.
const FRESH: Duration = Duration::from_millis(200);
/// The lengths of a pod's UID (RFC 4122 text) and of a static pod's UID (MD5 in hex digits).
const UIDS: [usize; 2] = [36, 32];

/// Finds pods by the cgroups of the node's processes.
#[derive(Debug)]
pub struct ByCgroup {
    proc: PathBuf,
    seen: RefCell<Option<Seen>>,
}

/// The result of a scan of all processes.
#[derive(Debug)]
struct Seen {
    at: Instant,
    /// The oldest process of each pod by UID: start time and PID.
    oldest: BTreeMap<String, (u64, u32)>,
}

impl ByCgroup {
    /// Creates a finder for a proc file system, which must show all processes of the node.
    #[must_use]
    pub fn new(proc: impl Into<PathBuf>) -> Self {
        Self {
            proc: proc.into(),
            seen: RefCell::new(None),
        }
    }

    fn oldest(&self, uid: &str) -> io::Result<Option<u32>> {
        let mut seen = self.seen.borrow_mut();
        let fresh = match seen.take().filter(|seen| seen.at.elapsed() < FRESH) {
            Some(fresh) => fresh,
            None => Seen {
                at: Instant::now(),
                oldest: look(&self.proc)?,
            },
        };
        let fresh = seen.insert(fresh);
        Ok(fresh.oldest.get(uid).map(|(_, process)| *process))
    }
}

impl Find for ByCgroup {
    fn path(&self, uid: &str, pod: &LocalPod) -> Result<PathBuf, Error> {
        let uid = pod.static_uid.as_deref().unwrap_or(uid);
        let process = self.oldest(uid).map_err(|source| Error::Processes {
            path: self.proc.clone(),
            source,
        })?;
        match process {
            Some(process) => Ok(self.proc.join(process.to_string()).join("ns/net")),
            None => Err(Error::NoProcess {
                path: self.proc.clone(),
            }),
        }
    }

    fn is_of_a_process(&self) -> bool {
        true
    }
}

/// Returns the oldest process of every pod.
fn look(proc: &Path) -> io::Result<BTreeMap<String, (u64, u32)>> {
    let mut oldest: BTreeMap<String, (u64, u32)> = BTreeMap::new();
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        let Some(process) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let dir = proc.join(&name);
        // A process can exit during the scan.
        let Ok(cgroups) = fs::read_to_string(dir.join("cgroup")) else {
            continue;
        };
        let Some(uid) = pod_of(&cgroups) else {
            continue;
        };
        let Some(start) = fs::read_to_string(dir.join("stat"))
            .ok()
            .and_then(|stat| start(&stat))
        else {
            continue;
        };
        let known = oldest.entry(uid).or_insert((start, process));
        *known = (*known).min((start, process));
    }
    Ok(oldest)
}

/// Returns the UID of the pod that a process belongs to, from its `/proc/PID/cgroup`. `None` = the process belongs
/// to no pod, or was moved, so that its hierarchies disagree.
fn pod_of(cgroups: &str) -> Option<String> {
    let mut found = None;
    for line in cgroups.lines() {
        // The format is HIERARCHY:CONTROLLERS:PATH; containerd may write SLICE:PREFIX:ID into the path.
        let path = line.splitn(3, ':').nth(2)?;
        // The outermost match counts: the pod's own processes can create cgroups below it.
        let Some(uid) = path.split(['/', ':']).find_map(uid_of) else {
            continue;
        };
        match &found {
            None => found = Some(uid),
            Some(other) if *other != uid => return None,
            Some(_) => {}
        }
    }
    found
}

/// Returns the UID in the name of a pod's cgroup.
fn uid_of(name: &str) -> Option<String> {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let text = match name.strip_prefix("pod") {
        Some(text) => text,
        // The name of a systemd slice contains the names of its parents.
        None => name
            .strip_prefix("kubepods-")
            .map(|rest| {
                let rest = rest.strip_prefix("burstable-").unwrap_or(rest);
                rest.strip_prefix("besteffort-").unwrap_or(rest)
            })?
            .strip_prefix("pod")?,
    };
    let uid = text.replace('_', "-");
    let is_uid =
        UIDS.contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(uid)
}

/// Returns the start time of a process in ticks since boot: field 22 of `/proc/PID/stat` (proc(5)). Field 2, the
/// command name, can contain any character.
fn start(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests;
