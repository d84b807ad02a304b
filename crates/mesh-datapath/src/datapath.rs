// SPDX-License-Identifier: Apache-2.0
//! Loads and attaches the kernel programs, and reads and writes their maps.
//!
//! Links and maps are pinned below `BPFFS/mesh/v1` from the first attach, so that a pod's protection does not
//! depend on this process. A restart updates links in place and reuses the maps. This module makes no policy
//! decisions.

pub mod events;
pub mod handles;
mod links;
mod load;
mod pods;
mod tables;
mod writer;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Instant;

use mesh_common::pod::PodIndex;
use mesh_log::warn_limited;
use mesh_sys::sock_diag::Socket;

pub use events::Events;
pub use handles::Handles;
pub use load::{NAMES as MAP_NAMES, pin_directory};
pub use pods::{AttachedPod, PodAttachment};

/// The configuration of the datapath: where the programs are attached and pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The mount point of the BPF file system.
    pub bpffs: PathBuf,
    /// The cgroup2 directory to whose processes the socket hooks apply: all pods of the node are below it.
    pub cgroup: PathBuf,
    /// Whether each decision is logged; requires the feature `trace`.
    pub trace: bool,
}

/// An error of the kernel programs or their maps.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The BPF file system is not mounted or not writable.
    #[error("cannot pin to {path}: check that bpffs is mounted there (mount -t bpf bpf {path})")]
    Bpffs {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel rejected the object.
    #[error("the kernel rejected the maps of the datapath; run `mesh-agent check` for details")]
    Object(#[source] Box<aya::EbpfError>),
    /// The kernel rejected a program.
    #[error("the kernel rejected the program {program}; run `mesh-agent check` for details")]
    Program {
        /// The name of the program.
        program: &'static str,
        /// The cause.
        source: Box<aya::programs::ProgramError>,
    },
    /// The embedded object lacks a map or program: the build is broken.
    #[error("the eBPF object of this build has no {0}")]
    Missing(&'static str),
    /// A program could not be attached.
    #[error("cannot attach {program} to {target}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The cgroup, namespace or interface.
        target: String,
        /// The cause.
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("cannot {action} {map}")]
    Map {
        /// `read`, `write {key} to` and so on.
        action: String,
        /// The map.
        map: &'static str,
        /// The cause.
        source: Box<aya::maps::MapError>,
    },
    /// The maps are full of pods.
    #[error("pod limit reached: the datapath already has {0} pods")]
    TooManyPods(usize),
    /// The pod of an operation was not added.
    #[error("pod {0} is not in the datapath")]
    UnknownPod(String),
}

/// The loaded datapath of this node, which one task owns.
pub struct Datapath {
    pub(crate) config: Config,
    pub(crate) object: aya::Ebpf,
    pub(crate) maps: tables::Maps,
    pub(crate) handles: Handles,
    /// The pods that this process added: UID to index.
    pub(crate) by_uid: BTreeMap<String, PodIndex>,
    pub(crate) revision: u64,
    election: writer::Election,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datapath")
            .field("config", &self.config)
            .field("pods", &self.by_uid)
            .finish_non_exhaustive()
    }
}

impl Datapath {
    /// Returns handles, which are cheap to clone.
    #[must_use]
    pub fn handles(&self) -> Handles {
        self.handles.clone()
    }

    /// Returns the socket storage map in which the hooks keep their decision about a socket.
    #[must_use]
    pub fn decided(&self) -> BorrowedFd<'_> {
        self.handles.decided()
    }

    /// Returns whether a socket is a tunnel endpoint of the agent.
    #[must_use]
    pub fn is_tunnel(&self, socket: &Socket) -> bool {
        self.handles.is_tunnel(socket)
    }

    /// Returns `true` if this agent is the one of the node that writes the datapath: the newest one, except for
    /// the time until its predecessor has stopped. Ask before each series of writes.
    pub fn is_writer(&mut self) -> bool {
        match self.election.is_writer(Instant::now()) {
            Ok(is_writer) => is_writer,
            // One agent that writes without a lock is safer than none.
            Err(error) => {
                warn_limited!(
                    "writer",
                    error,
                    "cannot lock the datapath; writing without a lock"
                );
                true
            }
        }
    }

    /// Leaves the datapath to a successor for good.
    pub fn stop_writing(&mut self) {
        if let Err(error) = self.election.retire() {
            warn_limited!("writer", error, "cannot release the lock of the datapath");
        }
    }
}
