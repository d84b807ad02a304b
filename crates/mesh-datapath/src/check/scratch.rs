// SPDX-License-Identifier: Apache-2.0
//! An empty cgroup and a directory of pins that nothing else uses, removed on drop. What a killed
//! check left behind is removed by the next one.

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
        for place in places(&config.cgroup).chain([config.bpffs.clone()]) {
            sweep(&place);
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let cgroup = first(places(&config.cgroup), &name).map_err(|error| {
            let root = config.cgroup.display();
            let text = format!(
                "no cgroup can be made below {root} ({error}): one that root owns must be there, as \
                 systemd or a kubelet makes some, or CAP_DAC_OVERRIDE"
            );
            io::Error::new(error.kind(), text)
        })?;
        // From here on dropping it removes both.
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

/// Where a cgroup may be made: the root of the tree has mode 0555, so that root without
/// CAP_DAC_OVERRIDE, which the agent does not need, makes one only below it.
fn places(cgroup: &Path) -> impl Iterator<Item = PathBuf> {
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    [cgroup.to_owned()]
        .into_iter()
        .chain(below.map(|entry| entry.path()))
}

/// Makes a directory in the first place where that is possible.
fn first(places: impl IntoIterator<Item = PathBuf>, name: &str) -> io::Result<PathBuf> {
    let mut refused = None;
    for place in places {
        let made = place.join(name);
        match fs::create_dir(&made) {
            Ok(()) => return Ok(made),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

/// Removes what processes that are gone have left.
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

/// Removes directories, and the pins in them. A cgroup's own files go with it.
fn remove(directory: &Path) {
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => remove(&entry.path()),
                // Fails in a cgroup, where it is not necessary.
                Ok(_) => drop(fs::remove_file(entry.path())),
                Err(_) => {}
            }
        }
    }
    if let Err(error) = fs::remove_dir(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %directory.display(), "a probe's place is left behind");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_takes_nothing_is_passed_over_and_named_if_there_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (file, good) = (dir.path().join("file"), dir.path().join("good"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&good).unwrap();
        let all: Vec<_> = places(dir.path()).collect();
        assert_eq!(all, [dir.path(), &good]);
        let made = first([file.clone(), good.clone()], "x").unwrap();
        assert_eq!(made, good.join("x"));
        assert!(made.is_dir());
        let error = first([file, dir.path().join("none")], "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }
}
