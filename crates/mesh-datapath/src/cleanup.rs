// SPDX-License-Identifier: Apache-2.0
//! Removes the mesh from this node's kernel, for uninstalling.
//!
//! Removes the pinned links and maps below `BPFFS/mesh`, and the rules, routes and sysctls in the network
//! namespaces of the pods in those maps. Run it after the agent has stopped; afterwards, pods communicate as
//! without a mesh. The pins and pods of an agent with another BPF file system are not affected.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use mesh_common::pod::PodState;
use zerocopy::FromBytes as _;

use crate::Host;
use crate::datapath::pin_directory;
use crate::pods::netns_config;
use mesh_sys::bpf;
use mesh_sys::netns::{NetNs, NetNsId};

/// Why cleanup is incomplete.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The map of pods cannot be read, so that their namespaces are unknown.
    #[error("cannot read the pods from {path}")]
    Pods {
        /// The pinned map.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A pin cannot be removed.
    #[error("cannot remove {path}")]
    Pin {
        /// The pin or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The configuration of a pod's network namespace cannot be removed.
    #[error("cannot remove the mesh configuration from the network namespace {path}")]
    Pod {
        /// The namespace file.
        path: PathBuf,
        /// The cause.
        source: crate::pods::Error,
    },
}

/// The numbers of removed objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// The number of pinned links and maps.
    pub pins: usize,
    /// The number of network namespaces from which configuration was removed.
    pub namespaces: usize,
    /// The number of rules, routes and sysctls.
    pub items: usize,
    /// The number of pods in the maps whose network namespaces no longer exist.
    pub gone: usize,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "removed {} pins, and {} rules, routes and sysctls in {} pods",
            self.pins, self.items, self.namespaces
        )
    }
}

/// Removes everything. It is idempotent.
///
/// # Errors
/// The first object that could not be removed; all other objects are removed.
pub fn run(host: &Host) -> Result<Removed, Error> {
    let mut removed = Removed::default();
    let pins = pin_directory(&host.bpffs);
    let mut cookies = pods(&pins)?;
    // Hooks are removed first, so that nothing is captured when the routes are removed.
    let mesh = host.bpffs.join("mesh");
    let mut result = remove_pins(&mesh, &mut removed.pins, &|name| name.starts_with("link_"));
    for (path, netns) in namespaces() {
        let ours = netns.cookie().is_ok_and(|cookie| cookies.remove(&cookie));
        if !ours {
            continue;
        }
        let one = netns_config::present(&netns)
            .and_then(|list| netns_config::remove(&netns, &list).map(|()| list.len()))
            .map_err(|source| Error::Pod { path, source });
        match one {
            Ok(count) => {
                removed.namespaces += 1;
                removed.items += count;
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    removed.gone = cookies.len();
    result
        .and(remove_pins(&mesh, &mut removed.pins, &|_| true))
        .map(|()| removed)
}

/// Returns the cookies of the network namespaces in the pinned map of pods.
fn pods(pins: &Path) -> Result<BTreeSet<u64>, Error> {
    let path = pins.join("PODS");
    let failed = |source| Error::Pods {
        path: path.clone(),
        source,
    };
    let map = match bpf::open_pin(&path) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut cookies = BTreeSet::new();
    // Each pod has a directory for its links, named after its index.
    for slot in entries(&pins.join("pods")) {
        let name = slot.file_name().and_then(|name| name.to_str());
        let Some(index) = name.and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let mut value = [0u8; size_of::<PodState>()];
        if bpf::get(map.as_fd(), &index.to_ne_bytes(), &mut value).map_err(failed)?
            && let Ok(state) = PodState::read_from_bytes(&value)
        {
            cookies.insert(state.netns_cookie);
        }
    }
    Ok(cookies)
}

/// Iterates over all network namespaces of this node that have a name or a process.
fn namespaces() -> impl Iterator<Item = (PathBuf, NetNs)> {
    let named = entries(Path::new("/run/netns"));
    let of_processes = entries(Path::new("/proc"))
        .into_iter()
        .map(|process| process.join("ns/net"));
    let mut all: BTreeMap<NetNsId, PathBuf> = BTreeMap::new();
    for path in named.into_iter().chain(of_processes) {
        if let Ok(id) = NetNsId::of(&path) {
            all.entry(id).or_insert(path);
        }
    }
    all.into_values()
        .filter_map(|path| NetNs::open(&path).ok().map(|netns| (path, netns)))
}

/// Removes the pins below a directory whose names match, and directories that become empty.
fn remove_pins(
    directory: &Path,
    count: &mut usize,
    wanted: &impl Fn(&str) -> bool,
) -> Result<(), Error> {
    let mut result = Ok(());
    let mut left = false;
    for path in entries(directory) {
        let name = path.file_name().and_then(|name| name.to_str());
        let one = if path.is_dir() {
            remove_pins(&path, count, wanted)
        } else if name.is_some_and(wanted) {
            *count += 1;
            fs::remove_file(&path).map_err(|source| Error::Pin {
                path: path.clone(),
                source,
            })
        } else {
            Ok(())
        };
        left |= path.exists();
        result = result.and(one);
    }
    if !left && directory.is_dir() {
        let gone = fs::remove_dir(directory).map_err(|source| Error::Pin {
            path: directory.to_owned(),
            source,
        });
        result = result.and(gone);
    }
    result
}

/// Returns the sorted entries of a directory; none if it does not exist.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    paths.sort();
    paths
}
