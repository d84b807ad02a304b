// SPDX-License-Identifier: Apache-2.0
//! Parses MeshNode: the workloads for which a node's agent accepts tunnels.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, typed};
use crate::crd::MeshNodeStatus;

/// The part of a node report that readiness depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeReport {
    /// The UIDs of namespaces whose pods on the node accept tunnels.
    pub(super) namespaces: BTreeSet<String>,
    /// The UIDs of pods on the node that accept tunnels because of their own label.
    pub(super) pods: BTreeSet<String>,
}

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    // A new MeshNode has no status yet.
    let MeshNodeStatus {
        enrolled_namespaces,
        enrolled_pods,
        version: _,
        observed_at: _,
        features: _,
        missing_features: _,
        in_force: _,
        rejections: _,
        warnings: _,
        unprotected: _,
    } = match object.raw(&["status"]) {
        Some(value) => typed(value, issues)?,
        None => MeshNodeStatus::default(),
    };
    Some(ParsedObject::Report(Box::new(NodeReport {
        namespaces: enrolled_namespaces.into_iter().collect(),
        pods: enrolled_pods.into_iter().collect(),
    })))
}

pub(super) fn fallback(_: &RawObject<'_>) -> Fallback {
    Fallback::nothing("the node is not ready for tunnels")
}
