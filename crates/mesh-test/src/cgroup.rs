// SPDX-License-Identifier: Apache-2.0
//! cgroup v2 directories: finding the mount, creating, killing and removing cgroups.
//!
//! No controllers are used, so this works on hosts with the unified and the hybrid hierarchy.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait::eventually;

/// Returns the mount point of cgroup v2.
///
/// # Errors
/// There is no cgroup2 mount.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    find_mount(&mounts).context("no cgroup2 mount in /proc/self/mountinfo")
}

fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let kind = right.split(' ').next()?;
        (kind == "cgroup2").then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Returns the cgroups of this name in all hierarchies: the v1 hierarchies, which cluster nodes
/// use, then cgroup v2.
pub(crate) fn everywhere(name: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let ours = right.starts_with("cgroup");
        ours.then(|| left.split(' ').nth(4).map(PathBuf::from))?
    });
    let found = points.map(|point| point.join(name));
    found.filter(|path| path.exists()).collect()
}

/// Creates the cgroup and its parents.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make cgroup {}", path.display()))
}

/// Opens `cgroup.procs`, to which a process writes to join the cgroup.
pub(crate) fn open_procs(path: &Path) -> Result<OwnedFd> {
    let procs = path.join("cgroup.procs");
    let file = File::options().write(true).open(&procs);
    Ok(file
        .with_context(|| format!("cannot open {}", procs.display()))?
        .into())
}

/// Returns the processes in this cgroup, without those of its children.
///
/// # Errors
/// The cgroup does not exist.
pub fn processes(path: &Path) -> Result<Vec<u32>> {
    let list = fs::read_to_string(path.join("cgroup.procs"))?;
    Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Returns the processes in and below this cgroup.
///
/// # Errors
/// The cgroup does not exist.
pub fn all_processes(path: &Path) -> Result<Vec<u32>> {
    let mut found = processes(path)?;
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(all_processes(&entry.path())?);
        }
    }
    Ok(found)
}

/// Returns the user plus system CPU time of all present and past processes in and below this
/// cgroup. This needs no controller.
///
/// # Errors
/// The cgroup does not exist.
pub fn cpu_time(path: &Path) -> Result<Duration> {
    let stat = fs::read_to_string(path.join("cpu.stat"))?;
    let usage = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    Ok(Duration::from_micros(
        usage.context("no usage_usec in cpu.stat")?.parse()?,
    ))
}

fn populated(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Kills every process in and below the cgroup and waits until all have exited.
pub(crate) fn kill(path: &Path) -> Result<()> {
    match fs::write(path.join("cgroup.kill"), "1") {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("cannot kill {}", path.display())),
    }
    let what = format!("processes of {} to end", path.display());
    eventually(&what, Duration::from_secs(10), || {
        (!populated(path)).then_some(())
    })
}

/// Removes the cgroup and its children, which must have no processes.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    // A cgroup stays busy for a moment after its last process has exited.
    let what = format!("cgroup {} to be removable", path.display());
    eventually(&what, Duration::from_secs(10), || {
        match fs::remove_dir(path) {
            Ok(()) => Some(()),
            Err(e) => (e.kind() == ErrorKind::NotFound).then_some(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_mount_is_found_on_hybrid_and_unified_hosts() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      38 31 0:41 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            find_mount(hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        let unified = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(find_mount(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find_mount("31 23 0:28 / /sys rw - sysfs sysfs rw\n"), None);
    }
}
