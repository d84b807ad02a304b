// SPDX-License-Identifier: Apache-2.0
//! The node agent.
//!
//! The modules are listed in the order of the data flow: snapshot of the cluster, plan, kernel,
//! connections, records. Only `agent` knows all of them.

#![forbid(unsafe_code)]

use mesh_config::HostConfig;
use mesh_datapath::Host;

// A line between them keeps rustfmt from sorting them.
pub mod agent;

pub mod source;

pub mod control;

pub mod proxy;

pub mod admin;

pub mod cleanup;

pub mod shutdown;

/// The paths of the machine that the datapath uses, as configured.
#[must_use]
pub fn host(config: &HostConfig) -> Host {
    Host {
        cgroup: config.cgroup.clone(),
        bpffs: config.bpffs.clone(),
        cni_conf: config.cni_conf.clone(),
    }
}
