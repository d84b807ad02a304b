// SPDX-License-Identifier: Apache-2.0
//! MeshNode: which workloads a node's agent accepts tunnels for.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Fact;
use super::object::{Held, Issues, Subject, typed};
use crate::crd::MeshNodeStatus;

/// What a node reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeReport {
    /// UIDs of namespaces.
    pub(super) namespaces: BTreeSet<String>,
    /// UIDs of pods that are enrolled by their own label.
    pub(super) pods: BTreeSet<String>,
}

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    // A node that was just made has no status yet.
    let status: MeshNodeStatus = match subject.raw(&["status"]) {
        Some(value) => typed(value, issues)?,
        None => MeshNodeStatus::default(),
    };
    Some(Fact::Report(Box::new(NodeReport {
        namespaces: status.enrolled_namespaces.into_iter().collect(),
        pods: status.enrolled_pods.into_iter().collect(),
    })))
}

pub(super) fn rejected(_: &Subject<'_>) -> Held {
    Held::nothing("the node counts as not ready for tunnels")
}
