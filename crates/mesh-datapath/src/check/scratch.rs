// SPDX-License-Identifier: Apache-2.0
//! A temporary cgroup and pin directory, removed on drop. The next check removes those of a killed one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::Host;

const PREFIX: &str = "mesh-check-";

#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) cgroup: PathBuf,
    pub(super) pins: PathBuf,
}

impl Scratch {
    pub(super) fn new(config: &Host) -> io::Result<Self> {
        for parent in parents(&config.cgroup).chain([config.bpffs.clone()]) {
            sweep(&parent);
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let cgroup = first(parents(&config.cgroup), &name).map_err(|error| {
            let root = config.cgroup.display();
            let text = format!(
                "cannot create a cgroup below {root} ({error}): needs a child cgroup owned by root, as \
                 systemd or the kubelet creates, or CAP_DAC_OVERRIDE"
            );
            io::Error::new(error.kind(), text)
        })?;
        // From here on, a drop removes both.
        let scratch = Self {
            cgroup,
            pins: config.bpffs.join(&name),
        };
        fs::create_dir(&scratch.pins)?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.pins);
        remove(&self.cgroup);
    }
}

/// Returns the directories to try for a new cgroup. The root of the hierarchy has mode 0555: without
/// CAP_DAC_OVERRIDE, which the agent does not need, root can create a cgroup only in a child.
fn parents(cgroup: &Path) -> impl Iterator<Item = PathBuf> {
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    [cgroup.to_owned()]
        .into_iter()
        .chain(below.map(|entry| entry.path()))
}

/// Creates a directory in the first parent that allows it.
fn first(parents: impl IntoIterator<Item = PathBuf>, name: &str) -> io::Result<PathBuf> {
    let mut refused = None;
    for parent in parents {
        let created = parent.join(name);
        match fs::create_dir(&created) {
            Ok(()) => return Ok(created),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

/// Removes the temporary directories of processes that no longer exist.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'))
            .map(|(pid, _)| pid);
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&entry.path());
        }
    }
}

/// Removes directories recursively, with the pins in them. The files of a cgroup disappear with it.
fn remove(directory: &Path) {
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => remove(&entry.path()),
                // This fails in a cgroup, where it is not necessary.
                Ok(_) => drop(fs::remove_file(entry.path())),
                Err(_) => {}
            }
        }
    }
    if let Err(error) = fs::remove_dir(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %directory.display(), "cannot remove a temporary directory of the check");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_is_created_in_the_first_usable_parent() {
        let dir = tempfile::tempdir().unwrap();
        let (file, good) = (dir.path().join("file"), dir.path().join("good"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&good).unwrap();
        let all: Vec<_> = parents(dir.path()).collect();
        assert_eq!(all, [dir.path(), &good]);
        let created = first([file.clone(), good.clone()], "x").unwrap();
        assert_eq!(created, good.join("x"));
        assert!(created.is_dir());
        let error = first([file, dir.path().join("none")], "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }
}
