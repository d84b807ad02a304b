// SPDX-License-Identifier: Apache-2.0
//! The node agent. In the order of the data flow:
//!
//! | module | task |
//! |---|---|
//! | [`source`] | watches the Kubernetes API or a directory, and publishes snapshots of the cluster |
//! | [`control`] | compiles a snapshot into a plan, writes it to the kernel, and attaches and enrolls pods |
//! | [`proxy`] | carries captured connections through tunnels to other nodes, and tunnels to applications |
//! | [`admin`] | serves metrics, probes and the pages that `meshctl` reads |
//! | [`shutdown`] | detects signals and a successor, and drains open connections |
//! | [`cleanup`] | removes the mesh from the node |
//! | [`agent`] | builds and wires the modules above; no other module knows all of them |

#![forbid(unsafe_code)]

use mesh_config::HostConfig;
use mesh_datapath::Host;

pub mod admin;
pub mod agent;
pub mod cleanup;
pub mod control;
pub mod proxy;
pub mod shutdown;
pub mod source;

/// Returns the configured paths of the node that the datapath uses.
#[must_use]
pub fn host(config: &HostConfig) -> Host {
    Host {
        cgroup: config.cgroup.clone(),
        bpffs: config.bpffs.clone(),
        cni_conf: config.cni_conf.clone(),
    }
}
