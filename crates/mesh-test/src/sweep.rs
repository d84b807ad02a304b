// SPDX-License-Identifier: Apache-2.0
//! Removal of a lab's resources, for both drop and the cleanup after a SIGKILL.
//!
//! It never touches resources whose owner may still run, and kills only processes in the cgroups of
//! a lab, which are those that the lab started.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cgroup;
use crate::names::{LabId, NETNS_DIR};
use crate::netns::{ignore_absent, remove_file};
use mesh_sys::testbed;

/// Removes all labs whose owner is dead and returns their ids.
///
/// # Errors
/// A resource of a dead owner cannot be removed; all others are removed anyway.
pub fn sweep() -> Result<Vec<LabId>> {
    let dead: Vec<LabId> = found()?
        .into_iter()
        .filter(|id| id.owner_is_dead())
        .collect();
    let mut first_error = None;
    for id in &dead {
        if let Err(e) = remove(*id) {
            first_error.get_or_insert(e.context(format!("cannot remove what lab {id} left")));
        }
    }
    first_error.map_or(Ok(dead), Err)
}

/// Makes Ctrl-C, SIGTERM and SIGHUP remove all labs of this process before it exits. Programs call
/// this first in `main`, before any thread starts.
///
/// # Errors
/// The signals cannot be blocked.
pub fn remove_on_interrupt() -> Result<()> {
    testbed::block_interrupts()?;
    let _waiter = std::thread::Builder::new().spawn(|| {
        let Ok(signal) = testbed::wait_for_interrupt() else {
            return;
        };
        for id in found()
            .unwrap_or_default()
            .into_iter()
            .filter(|id| id.is_own())
        {
            if let Err(e) = remove(id) {
                crate::lab::complain(&format_args!("lab {id} was not removed: {e:#}"));
            }
        }
        #[expect(
            clippy::exit,
            reason = "what a shell expects of a program ended by a signal"
        )]
        std::process::exit(128 + signal);
    })?;
    Ok(())
}

/// Returns the paths of everything on the machine that belongs to the lab, to test its removal.
///
/// # Errors
/// A directory cannot be read.
pub fn remains(id: LabId) -> Result<Vec<PathBuf>> {
    let mut found = netns_files(id);
    found.extend(mounts_below(&id.dir())?);
    found.extend(cgroup::everywhere(&id.cgroup()));
    found.extend([id.dir()].into_iter().filter(|path| path.exists()));
    Ok(found)
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn found() -> Result<BTreeSet<LabId>> {
    let cgroups = names_in(&cgroup::mount_point()?);
    let dirs = names_in(Path::new("/tmp"));
    let labs = cgroups
        .iter()
        .chain(&dirs)
        .filter_map(|name| LabId::of_lab(name));
    let spaces = names_in(Path::new(NETNS_DIR));
    Ok(labs
        .chain(spaces.iter().filter_map(|name| LabId::of_netns(name)))
        .collect())
}

fn netns_files(id: LabId) -> Vec<PathBuf> {
    let names = names_in(Path::new(NETNS_DIR)).into_iter();
    let ours = names.filter(|name| LabId::of_netns(name) == Some(id));
    ours.map(|name| Path::new(NETNS_DIR).join(name)).collect()
}

/// Returns the mount points in and below `dir`, the most recent first.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts
        .lines()
        .rev()
        .filter_map(|line| line.split(' ').nth(4));
    Ok(points
        .map(PathBuf::from)
        .filter(|point| point.starts_with(dir))
        .collect())
}

/// Kills the lab's processes and removes everything with its name.
pub(crate) fn remove(id: LabId) -> Result<()> {
    let (cgroup, dir) = (cgroup::mount_point()?.join(id.cgroup()), id.dir());
    cgroup::kill(&cgroup)?;
    for point in mounts_below(&dir)? {
        // A concurrent sweep may have unmounted it; the result is checked below.
        drop(testbed::unmount(&point));
    }
    let left = mounts_below(&dir)?;
    anyhow::ensure!(left.is_empty(), "still mounted: {left:?}");
    for file in netns_files(id) {
        remove_file(&file)?;
    }
    for group in cgroup::everywhere(&id.cgroup()) {
        cgroup::remove(&group)?;
    }
    // The directory is removed last, because its owner file tells who owns the rest.
    ignore_absent(fs::remove_dir_all(&dir))
        .with_context(|| format!("cannot remove {}", dir.display()))
}
