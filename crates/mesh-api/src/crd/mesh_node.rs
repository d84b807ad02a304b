// SPDX-License-Identifier: Apache-2.0
//! The type MeshNode.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// MeshNodeSpec is empty: a MeshNode only has a status.
#[derive(
    CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshNode",
    doc = "MeshNode is the report of the agent on one node. It has the name of the Node, and only that agent writes it.",
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

/// MeshNodeStatus is the report of the agent. It is written after a change and is not a heartbeat: the last
/// report of a silent node is still in force in its kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshNodeStatus {
    /// version is the version of the agent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// observedAt is the time of the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_at: Option<Time>,
    /// features lists the kernel features that the agent uses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// missingFeatures lists the kernel features that the agent would use and the kernel does not have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing_features: Vec<String>,
    /// enrolledNamespaces lists the UIDs of the namespaces whose pods on this node accept tunnels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub enrolled_namespaces: Vec<String>,
    /// enrolledPods lists the UIDs of the pods on this node that accept tunnels because of their own label.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub enrolled_pods: Vec<String>,
    /// inForce lists the object versions that are in force on the node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub in_force: Vec<ReportedObject>,
    /// rejections lists the fields that the agent rejected, at most 1,000. An object without a usable name
    /// has only its kind.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rejections: Vec<ReportedField>,
    /// warnings lists fields of accepted objects that this version does not support (such as
    /// `domainNames`), or that are probably mistakes, at most 1,000.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<ReportedField>,
    /// unprotected lists the enrolled pods on the node that are not protected.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unprotected: Vec<UnprotectedPod>,
}

/// ReportedObject is a version of an object.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedObject {
    /// kind is the kind of the object.
    pub kind: String,
    /// namespace is the namespace of the object. Empty for cluster-scoped objects.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// name is the name of the object.
    pub name: String,
    /// uid is the UID of the object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// generation is the metadata.generation of the object.
    pub generation: i64,
}

/// ReportedField is a rejection of, or a warning about, a field.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedField {
    /// object is the object that has the field.
    pub object: ReportedObject,
    /// field is the path of the field. Empty for the object as a whole.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// message is the problem, and its consequence.
    pub message: String,
}

/// UnprotectedPod is an enrolled pod that is not protected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UnprotectedPod {
    /// namespace is the namespace of the pod.
    pub namespace: String,
    /// name is the name of the pod.
    pub name: String,
    /// uid is the UID of the pod.
    pub uid: String,
    /// reason is the reason, as in docs/reasons.md and `meshctl status`.
    pub reason: String,
    /// since is the time since which the pod is not protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}
