// SPDX-License-Identifier: Apache-2.0
//! A node of the lab: its network namespace, its cgroup and its agent.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use crate::agent::{Agent, AgentConfig};
use crate::names::LabId;
use crate::netns::Netns;
use crate::process::Host;
use crate::topology::{self, Topology};
use mesh_sys::testbed;

/// A node of the lab. Node programs run outside the pods' cgroup.
#[derive(Debug)]
pub struct Node {
    host: Host,
    agent: Host,
    number: u8,
    name: String,
    cgroup: PathBuf,
    manifests: PathBuf,
    bpffs: PathBuf,
}

impl Deref for Node {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Node {
    /// Creates node `number` (from 1) of `nodes` and connects it to the wire.
    pub(crate) fn create(
        id: LabId,
        topology: Topology,
        (number, nodes): (u8, u8),
        wire: &Netns,
        lab_cgroup: &Path,
    ) -> Result<Self> {
        let name = format!("node{number}");
        let netns = Arc::new(Netns::create(&id.netns(&name))?);
        topology::lay_node(topology, &netns, number)?;
        topology::join_wire(wire, &netns, &name, number, nodes)?;
        let (cgroup, dir) = (lab_cgroup.join(&name), id.dir().join(&name));
        let agent_name = format!("{name}/agent");
        let agent_netns = Arc::clone(&netns);
        let agent = Host::new(
            &agent_name,
            agent_netns,
            cgroup.join("agent"),
            dir.join("agent"),
        )?;
        let host = Host::new(&name, netns, cgroup.join("host"), dir.clone())?;
        crate::cgroup::create(&cgroup.join("kubepods"))?;
        let bpffs = dir.join("bpf");
        std::fs::create_dir(&bpffs)?;
        testbed::mount_bpffs(&bpffs)?;
        let manifests = id.dir().join("manifests");
        Ok(Self {
            host,
            agent,
            number,
            name,
            cgroup,
            manifests,
            bpffs,
        })
    }

    /// Returns the node's number, from 1, which is the third octet of its pods' IPv4 addresses.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Returns the node's name, as in `spec.nodeName`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the node's IPv4 address on the wire.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        topology::node_v4(self.number)
    }

    /// Returns the node's IPv6 address on the wire.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        topology::node_v6(self.number)
    }

    /// Returns the node's pod CIDRs, IPv4 first.
    #[must_use]
    pub fn pod_cidrs(&self) -> [String; 2] {
        topology::pod_cidrs(self.number)
    }

    /// Returns the cgroup of everything on the node, including the agent: the value of `--cgroup`.
    #[must_use]
    pub fn root_cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Returns the parent cgroup of the node's pods.
    #[must_use]
    pub fn pods_cgroup(&self) -> PathBuf {
        self.cgroup.join("kubepods")
    }

    /// Returns the mount point of the node's own BPF file system.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Returns the directory of manifests that all agents of the lab read.
    #[must_use]
    pub fn manifests(&self) -> &Path {
        &self.manifests
    }

    /// Returns the host on which the node's agent runs.
    #[must_use]
    pub fn agent_host(&self) -> &Host {
        &self.agent
    }

    /// Starts an agent and waits until it is ready.
    ///
    /// # Errors
    /// The binary is missing, or the agent does not become ready; the error contains the end of its
    /// log.
    pub fn start_agent(self: &Arc<Self>, config: AgentConfig) -> Result<Agent> {
        Agent::start(Arc::clone(self), config)
    }
}
