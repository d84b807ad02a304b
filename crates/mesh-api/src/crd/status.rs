// SPDX-License-Identifier: Apache-2.0
//! The status of policies, which the controller aggregates from node reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The type of the condition that is true if every node accepts the object.
pub const ACCEPTED: &str = "Accepted";
/// The type of the condition that is true if the object is in force on every node.
pub const IN_FORCE: &str = "InForce";

/// PolicyStatus is the state of a policy on all nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// conditions has the types Accepted (the object is valid) and InForce (the newest version is in force on
    /// every node).
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// nodes is the number of nodes on which the newest version is in force, and the number of all nodes,
    /// such as 3/3.
    pub nodes: String,
    /// rejections lists the rejected fields, at most 16.
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rejections: Vec<FieldRejection>,
}

/// FieldRejection is the rejection of a field.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct FieldRejection {
    /// field is the path of the field. Empty for the object as a whole.
    pub field: String,
    /// message is the problem, and its consequence.
    pub message: String,
    /// nodes is the number of nodes that report the rejection.
    pub nodes: i32,
}
