// SPDX-License-Identifier: Apache-2.0
//! `probe lab`: an empty lab for manual tests, until Ctrl-C.

use anyhow::Result;
use mesh_test::{Lab, PodSpec, Topology, remove_on_interrupt};
use serde_json::json;

use crate::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Connect the pods by bridges, as flannel does (default: routed, as Calico does)
    #[arg(long)]
    bridged: bool,
    /// Number of nodes
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// Number of pods on each node
    #[arg(long, default_value_t = 2)]
    pods: u8,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    remove_on_interrupt()?;
    let topology = if args.bridged {
        Topology::Bridged
    } else {
        Topology::Routed
    };
    let mut lab = Lab::builder(topology).nodes(args.nodes).outside().build()?;
    for node in 1..=args.nodes {
        for number in 1..=args.pods {
            lab.add_pod(PodSpec::new(&format!("pod{node}{number}"), node))?;
        }
    }
    let pods = lab
        .pods()
        .map(|pod| json!({"name": pod.name(), "netns": pod.path(), "addresses": pod.addresses()}));
    say(&json!({
        "id": lab.id().to_string(),
        "dir": lab.dir(),
        "cgroup": lab.cgroup(),
        "pods": pods.collect::<Vec<_>>(),
        "hint": "nsenter --net=NETNS COMMAND; Ctrl-C removes all",
    }))?;
    loop {
        std::thread::park();
    }
}
