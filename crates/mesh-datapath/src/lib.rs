// SPDX-License-Identifier: Apache-2.0
//! The datapath in user space: loads and attaches the kernel programs, fills their maps, and manages the
//! network namespaces of the pods of this node.
//!
//! The only crate that depends on aya. Links and maps are pinned below `BPFFS/mesh/v1` from the first
//! attach, so that what protects a pod does not depend on this process. A restart updates links in place and
//! reuses the maps. Nothing here makes a policy decision.

#![forbid(unsafe_code)]

use std::path::PathBuf;

pub mod check;
pub mod cleanup;
pub mod cni;
pub mod datapath;
pub mod pods;

pub use datapath::{AttachedPod, Config, Datapath, Error, Events, Handles, PodAttachment};

/// The paths of the node that the datapath uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The cgroup2 directory that contains the cgroups of all pods of the node.
    pub cgroup: PathBuf,
    /// The mount point of the BPF file system.
    pub bpffs: PathBuf,
    /// The directory with the configuration of the CNI plugins.
    pub cni_conf: PathBuf,
}
