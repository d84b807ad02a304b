// SPDX-License-Identifier: Apache-2.0
//! Nodes and pods as network namespaces on one machine, with real programs in them.
//!
//! A [`Lab`] has nodes with several dual-stack pods each, connected routed (as Calico does) or
//! bridged (as flannel does), and a cgroup for each node. Tests, the demo and the bench start real
//! programs in pods, capture traffic between nodes, and run one agent per node. Drop removes a lab;
//! the next lab removes what a killed one left. Without root, tests fail instead of being skipped.

#![forbid(unsafe_code)]

pub mod agent;
pub mod apps;
pub mod authority;
pub mod bench;
pub mod capture;
pub mod cgroup;
pub mod cluster;
pub mod demo;
pub mod e2e;
pub mod forge;
pub mod kube;
pub mod manifests;
pub mod mesh;
pub mod netns;
pub mod pod;
pub mod process;
pub mod programs;
pub mod reports;
pub mod sockets;
pub mod sweep;
pub mod talk;
pub mod truth;

mod lab;
mod names;
mod node;
mod topology;
mod wait;

pub use agent::{Agent, AgentConfig};
pub use capture::Capture;
pub use cluster::Cluster;
pub use kube::Kube;
pub use lab::{Builder, Lab};
pub use mesh::Mesh;
pub use names::LabId;
pub use node::Node;
pub use pod::{Families, Pod, PodSpec};
pub use process::{Cmd, Host, Output, Proc};
pub use sweep::{remove_on_interrupt, sweep};
pub use topology::Topology;
pub use wait::eventually;
