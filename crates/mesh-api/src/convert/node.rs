// SPDX-License-Identifier: Apache-2.0
//! Parses Nodes.

use k8s_openapi::api::core::v1 as core;
use mesh_plan::cluster::Node;

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, typed};
use super::validate::cidr;

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let read: core::Node = typed(object.value, issues)?;
    let mut node = Node {
        labels: object.labels(),
        ..Node::default()
    };
    let spec = read.spec.unwrap_or_default();
    let cidrs = spec.pod_cidrs.or(spec.pod_cidr.map(|cidr| vec![cidr]));
    for (i, text) in cidrs.iter().flatten().enumerate() {
        node.pod_cidrs
            .extend(issues.check(&format!("spec.podCIDRs[{i}]"), cidr(text)));
    }
    // The list also has host names and DNS names.
    node.addresses = read
        .status
        .and_then(|status| status.addresses)
        .into_iter()
        .flatten()
        .filter_map(|address| super::validate::address(&address.address).ok())
        .collect();
    Some(ParsedObject::Node(node.into()))
}

pub(super) fn fallback(_: &RawObject<'_>) -> Fallback {
    Fallback::nothing("the node is ignored: its addresses are outside the cluster")
}
