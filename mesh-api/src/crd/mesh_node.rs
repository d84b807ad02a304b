// SPDX-License-Identifier: Apache-2.0
//! MeshNode.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the agent of one node reports. Written by that agent only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshNodeSpec {
    /// The agent's version.
    pub version: String,
    /// Kernel features that it uses.
    pub features: Vec<String>,
    /// Kernel features that it misses.
    pub missing_features: Vec<String>,
    /// What is in force on the node: UIDs of objects and their generation.
    pub in_force: BTreeMap<String, i64>,
    /// UIDs of the namespaces whose pods of this node accept tunnels.
    pub enrolled_namespaces: Vec<String>,
    /// UIDs of the pods of this node that accept tunnels by their own label.
    pub enrolled_pods: Vec<String>,
    /// How many objects are rejected, by kind.
    pub rejections: BTreeMap<String, u64>,
}
