// SPDX-License-Identifier: Apache-2.0
//! An empty cgroup and a directory of pins that nothing else uses, removed on drop. What a killed
//! check left behind is removed by the next one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::config::HostConfig;

const PREFIX: &str = "mesh-check-";

#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) cgroup: PathBuf,
    pub(super) pins: PathBuf,
}

impl Scratch {
    pub(super) fn new(config: &HostConfig) -> io::Result<Self> {
        sweep(&config.cgroup);
        sweep(&config.bpffs);
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let cgroup = config.cgroup.join(&name);
        fs::create_dir(&cgroup)?;
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
