// SPDX-License-Identifier: Apache-2.0
//! The status of the node and its pods, for metrics, `/status`, `/pods` and the MeshNode.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_plan::cluster::{ObjectName, Rejection};

/// The result of the newest changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Revision of the newest plan that was applied completely; 0 = none yet.
    pub applied: u64,
    /// Time that it took to apply.
    pub took: Duration,
    /// Error of the newest plan, if a part of it could not be applied; of that part, the previous one stays in
    /// force.
    pub error: Option<String>,
    /// Fields that the compiler rejected.
    pub rejections: Vec<Rejection>,
    /// The pods of this node, by UID.
    pub pods: BTreeMap<String, PodStatus>,
    /// Rules, routes and sysctls in pods that were removed by others and restored.
    pub restored: u64,
    /// Open connections that were closed because policy or modes changed.
    pub closed: u64,
}

/// The status of a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodStatus {
    /// Namespace and name.
    pub name: ObjectName,
    /// The datapath has the pod.
    pub managed: bool,
    /// The pod is to be enrolled.
    pub wanted: bool,
    /// The pod is enrolled.
    pub enrolled: bool,
    /// The tc gate checks every packet of the pod.
    pub gated: bool,
    /// The pod is isolated, because the requested protection cannot be guaranteed.
    pub isolated: bool,
    /// The problem of the pod, if it has one.
    pub trouble: Option<String>,
}
