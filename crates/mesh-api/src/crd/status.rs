// SPDX-License-Identifier: Apache-2.0
//! The status that all policies of the mesh have. The controller writes it, from what nodes report.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The type of the condition that says whether an object can be used.
pub const ACCEPTED: &str = "Accepted";
/// The type of the condition that says whether it is in force on every node.
pub const IN_FORCE: &str = "InForce";

/// What has become of an object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// Accepted: whether the object can be used. InForce: whether every node has it in force.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// On how many nodes the newest version is in force, of how many: 3/3.
    pub nodes: String,
    /// What is wrong with it, field by field; at most 16.
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rejections: Vec<FieldRejection>,
}

/// What is wrong with a field.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct FieldRejection {
    /// The field's path; empty: the object as a whole.
    pub field: String,
    /// What is wrong, and what holds instead.
    pub message: String,
    /// How many nodes say so.
    pub nodes: i32,
}
