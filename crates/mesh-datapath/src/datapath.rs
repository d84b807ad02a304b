// SPDX-License-Identifier: Apache-2.0
//! The kernel programs and their maps: load, attach, fill, read.
//!
//! Links and maps are pinned below `BPFFS/mesh/v1` from the first
//! attach, so that what protects a pod does not depend on this process; a restart updates links in
//! place and takes the maps over as they are. Nothing here decides anything.

pub mod events;
pub mod handles;
mod links;
mod load;
mod pods;
mod tables;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use mesh_common::pod::PodIndex;
use mesh_sys::sock_diag::Socket;

pub use events::Events;
pub use handles::Handles;
pub use load::{NAMES as MAP_NAMES, pin_directory};
pub use pods::{PodAttachment, PodFacts};

/// Where the programs are attached and pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The mount of bpffs.
    pub bpffs: PathBuf,
    /// The cgroup (v2) whose processes' sockets are hooked: all pods of the node are below it.
    pub cgroup: PathBuf,
    /// Whether each decision is logged; only with the feature `trace`.
    pub trace: bool,
}

/// What can go wrong with the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// bpffs is not mounted or not writable.
    #[error("cannot use {path} for pins; is bpffs mounted there (mount -t bpf bpf {path})?")]
    Bpffs {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The object was refused as a whole.
    #[error("the kernel does not take the maps of the datapath; `mesh-agent check` says why")]
    Object(#[source] Box<aya::EbpfError>),
    /// A program was refused.
    #[error("the kernel does not take the program {program}; `mesh-agent check` says why")]
    Program {
        /// Its name.
        program: &'static str,
        /// What the kernel said.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object of this build lacks something: a broken build.
    #[error("the datapath of this build has no {0}")]
    Missing(&'static str),
    /// A program could not be attached.
    #[error("cannot attach {program} to {target}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The cgroup, namespace or interface.
        target: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("cannot {action} {map}")]
    Map {
        /// `read`, `write {key} to` and so on.
        action: String,
        /// The map.
        map: &'static str,
        /// What the kernel said.
        source: Box<aya::maps::MapError>,
    },
    /// The node has more pods than the maps hold.
    #[error("no slot is left for another pod: {0} are in use")]
    TooManyPods(usize),
    /// An operation names a pod that was never added.
    #[error("pod {0} was not added to the datapath")]
    UnknownPod(String),
}

/// The loaded datapath of this node. One task owns it.
pub struct Datapath {
    pub(crate) config: Config,
    pub(crate) object: aya::Ebpf,
    pub(crate) maps: tables::Maps,
    pub(crate) handles: Handles,
    /// Pods added by this process: UID to slot.
    pub(crate) by_uid: BTreeMap<String, PodIndex>,
    pub(crate) revision: u64,
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
    /// Returns handles that are cheap to clone.
    #[must_use]
    pub fn handles(&self) -> Handles {
        self.handles.clone()
    }

    /// The socket storage in which the hooks keep what they decided about a socket.
    #[must_use]
    pub fn decided(&self) -> BorrowedFd<'_> {
        self.handles.decided()
    }

    /// Whether a socket is a tunnel of the agent.
    #[must_use]
    pub fn is_tunnel(&self, socket: &Socket) -> bool {
        self.handles.is_tunnel(socket)
    }
}
