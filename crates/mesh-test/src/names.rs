// SPDX-License-Identifier: Apache-2.0
//! Names and ownership of a lab's resources.
//!
//! Every namespace, cgroup and directory has the pid and the number of its lab in its name, so that
//! anything found on the machine can be traced to its owner, running or not.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

/// Prefix of a lab's namespace files in [`NETNS_DIR`].
const NETNS_PREFIX: &str = "mt-";
/// Prefix of a lab's directory in /tmp and of its cgroup.
const LAB_PREFIX: &str = "mesh-test-";
/// Directory of network namespace files, shared with iproute2.
pub(crate) const NETNS_DIR: &str = "/run/netns";
/// File in a lab's directory with the owner's start time, which detects a reused pid.
const OWNER_FILE: &str = "owner";

/// Identifies a lab by the pid of its owner and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LabId {
    pid: u32,
    number: u32,
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pid, self.number)
    }
}

impl FromStr for LabId {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let id = Self::parse(text).filter(|id| id.to_string() == text);
        id.with_context(|| format!("invalid lab id {text}"))
    }
}

impl LabId {
    /// Returns the id of this process's next lab.
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            pid: std::process::id(),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Returns whether the lab belongs to this process.
    pub(crate) fn is_own(self) -> bool {
        self.pid == std::process::id()
    }

    /// Returns the file name of one of the lab's namespaces.
    pub(crate) fn netns(self, what: &str) -> String {
        format!("{NETNS_PREFIX}{self}-{what}")
    }

    /// Returns the name of the lab's cgroup below the cgroup2 mount.
    pub(crate) fn cgroup(self) -> String {
        format!("{LAB_PREFIX}{self}")
    }

    /// Returns the lab's directory, for manifests, logs, application data and BPF file systems.
    #[must_use]
    pub fn dir(self) -> PathBuf {
        Path::new("/tmp").join(format!("{LAB_PREFIX}{self}"))
    }

    /// Returns the lab to which a namespace file belongs, by its name.
    pub(crate) fn of_netns(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix(NETNS_PREFIX)?)
    }

    /// Returns the lab to which a cgroup or directory belongs, by its name.
    pub(crate) fn of_lab(name: &str) -> Option<Self> {
        name.strip_prefix(LAB_PREFIX)?.parse().ok()
    }

    fn parse(rest: &str) -> Option<Self> {
        let mut parts = rest.splitn(3, '-');
        let pid = parts.next()?.parse().ok()?;
        let number = parts.next()?.parse().ok()?;
        Some(Self { pid, number })
    }

    /// Creates the lab's directory and records its owner; must be called before any other creation.
    pub(crate) fn claim(self) -> Result<PathBuf> {
        let dir = self.dir();
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let start = start_time(self.pid).context("this process has no start time in /proc")?;
        let (draft, owner) = (dir.join(".owner"), dir.join(OWNER_FILE));
        fs::write(&draft, start.to_string())?;
        fs::rename(&draft, &owner)?;
        Ok(dir)
    }

    /// Returns true only if the process that created the lab has certainly exited.
    pub(crate) fn owner_is_dead(self) -> bool {
        let Some(living) = start_time(self.pid) else {
            return true;
        };
        fs::read_to_string(self.dir().join(OWNER_FILE))
            .is_ok_and(|noted| noted.trim().parse() != Ok(living))
    }
}

/// Returns a process's start time in clock ticks after boot; `None` if it has exited or is a
/// zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name is in parentheses and may itself contain spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_names_identify_their_lab() {
        let id = LabId {
            pid: 4711,
            number: 3,
        };
        assert_eq!(LabId::of_netns(&id.netns("node1")), Some(id));
        assert_eq!(LabId::of_netns(&id.netns("a-b-c")), Some(id));
        assert_eq!(LabId::of_lab(&id.cgroup()), Some(id));
        for strange in [
            "mt-x-1-a",
            "mt-",
            "cni-4711-3-a",
            "mesh-test-4711",
            "mesh-test-4711-3-x",
        ] {
            assert_eq!(
                LabId::of_netns(strange).or(LabId::of_lab(strange)),
                None,
                "{strange}"
            );
        }
    }

    #[test]
    fn running_process_is_not_reported_dead() {
        let id = LabId {
            pid: std::process::id(),
            number: u32::MAX,
        };
        assert!(!id.owner_is_dead(), "no owner file, but the pid lives");
        let dir = id.claim().expect("claim");
        assert!(!id.owner_is_dead());
        fs::write(dir.join(OWNER_FILE), "1").expect("write");
        assert!(id.owner_is_dead(), "an earlier process of the same pid");
        fs::remove_dir_all(dir).expect("remove");
    }
}
