// SPDX-License-Identifier: Apache-2.0
//! The node agent, as rooms with one door each.
//!
//! Listed in the order in which things flow through them: facts in, plan, kernel, connections,
//! records out. A room imports only what it is passed and what the table of ARCHITECTURE.md allows;
//! `agent` alone knows them all.

#![forbid(unsafe_code)]

use mesh_config::HostConfig;
use mesh_datapath::Host;

// A line between them keeps rustfmt from sorting them.
pub mod agent;

pub mod source;

pub mod control;

pub mod proxy;

pub mod record;

pub mod flows;

pub mod metrics;

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
