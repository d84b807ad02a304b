// SPDX-License-Identifier: Apache-2.0
//! MeshNode.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What nobody asks of a node: a MeshNode only reports.
#[derive(
    CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshNode",
    doc = "What the agent of one node reports; its name is the node's. Written by that agent only.",
    status = "MeshNodeStatus",
    derive = "PartialEq",
    shortname = "mn",
    category = "mesh",
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version"),
    printcolumn(
        name = "Missing",
        type_ = "string",
        json_path = ".status.missingFeatures"
    ),
    printcolumn(name = "Observed", type_ = "date", json_path = ".status.observedAt")
)]
pub struct MeshNodeSpec {}

/// What the agent reports. It is written when something changed, and not as a sign of life: what a
/// node that is silent reported last is still in force in its kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshNodeStatus {
    /// The agent's version.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// When the agent saw what it reports here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_at: Option<Time>,
    /// Kernel features that the agent uses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// Kernel features that it misses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing_features: Vec<String>,
    /// UIDs of the namespaces whose pods of this node accept tunnels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub enrolled_namespaces: Vec<String>,
    /// UIDs of the pods of this node that accept tunnels by their own label.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub enrolled_pods: Vec<String>,
    /// What is in force on the node, as it was accepted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub in_force: Vec<ReportedObject>,
    /// What the agent could not use, at most 1,000. Of a kind that names no object: the kind alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rejections: Vec<ReportedField>,
    /// What is in force and says something that this version does not support, or that is probably
    /// not meant so, at most 1,000. `domainNames` is among it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<ReportedField>,
    /// Enrolled pods of the node that are not protected.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unprotected: Vec<UnprotectedPod>,
}

/// One version of one object.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedObject {
    /// Its kind.
    pub kind: String,
    /// Its namespace; empty: it has none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Its metadata.generation.
    pub generation: i64,
}

/// A field, and what an agent makes of it.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedField {
    /// Of which object.
    pub object: ReportedObject,
    /// The field's path; empty: the object as a whole.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What is wrong or not supported, and what holds instead.
    pub message: String,
}

/// A pod that is enrolled and not protected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UnprotectedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Why, as docs/reasons.md and `meshctl status` have it.
    pub reason: String,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}
