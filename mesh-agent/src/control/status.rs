// SPDX-License-Identifier: Apache-2.0
//! What `control` says about itself and the pods of this node, for metrics, `status` and people.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_plan::cluster::{Cluster, ObjectName, Rejection};

/// The state of the node, as far as `control` knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// How many plans were put in force by this process; 0 = none yet.
    pub revision: u64,
    /// How long the last one took.
    pub took: Duration,
    /// Why the newest plan is not in force; the one before it is.
    pub error: Option<String>,
    /// The facts that are in force, by this process; empty at first.
    pub facts: Arc<Cluster>,
    /// What the compiler could not use.
    pub rejections: Vec<Rejection>,
    /// The pods of this node, by UID.
    pub pods: BTreeMap<String, PodStatus>,
    /// Rules, routes and sysctls of ours that somebody else removed, and that were repaired.
    pub tampered: u64,
    /// Open connections that were ended because policy or modes changed.
    pub ended: u64,
}

/// How a pod of this node is taken care of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodStatus {
    /// Namespace and name.
    pub name: ObjectName,
    /// Its namespace was found, and the kernel programs know it.
    pub adopted: bool,
    /// It is to be enrolled.
    pub wanted: bool,
    /// It is enrolled.
    pub enrolled: bool,
    /// Every packet of it passes the gate.
    pub gated: bool,
    /// It is cut off, because what is asked for cannot be guaranteed.
    pub cut_off: bool,
    /// What is wrong, if anything.
    pub trouble: Option<String>,
}
