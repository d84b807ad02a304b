// SPDX-License-Identifier: Apache-2.0
//! Nodes.

use k8s_openapi::api::core::v1 as core;
use mesh_plan::cluster::Node;

use super::Fact;
use super::object::{Held, Issues, Subject, typed};
use super::validate::cidr;

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    let read: core::Node = typed(subject.value, issues)?;
    let mut node = Node {
        labels: subject.labels(),
        ..Node::default()
    };
    let spec = read.spec.unwrap_or_default();
    let cidrs = spec.pod_cidrs.or(spec.pod_cidr.map(|cidr| vec![cidr]));
    for (i, text) in cidrs.iter().flatten().enumerate() {
        node.pod_cidrs
            .extend(issues.check(&format!("spec.podCIDRs[{i}]"), cidr(text)));
    }
    // Host names and DNS names stand in the same list.
    node.addresses = read
        .status
        .and_then(|status| status.addresses)
        .into_iter()
        .flatten()
        .filter_map(|address| super::validate::address(&address.address).ok())
        .collect();
    Some(Fact::Node(node.into()))
}

pub(super) fn rejected(_: &Subject<'_>) -> Held {
    Held::nothing("the node is not known: its addresses count as outside the cluster")
}
