// SPDX-License-Identifier: Apache-2.0
//! MeshAuthentication.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;
use super::status::PolicyStatus;

/// What enrolled pods accept and send without mutual TLS. The most specific object decides: with a
/// podSelector, then the namespace's, then the mesh's (`default` in `mesh-system`); of two of one
/// rank the stricter.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshAuthentication",
    doc = "What enrolled pods accept and send without mutual TLS.",
    namespaced,
    status = "PolicyStatus",
    derive = "PartialEq",
    shortname = "ma",
    category = "mesh",
    printcolumn(name = "mTLS", type_ = "string", json_path = ".spec.mtls"),
    printcolumn(name = "Outbound", type_ = "string", json_path = ".spec.outbound"),
    printcolumn(name = "UDP", type_ = "string", json_path = ".spec.udp")
)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "has(self.mtls) || has(self.ports) || has(self.outbound) || has(self.udp)",
    "says nothing: needs mtls, ports, outbound or udp",
)])))]
pub struct MeshAuthenticationSpec {
    /// The pods of the namespace that it applies to. Missing: all of them.
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// What TCP connections the pods accept. Missing: as the less specific object says.
    pub mtls: Option<MtlsMode>,
    /// The same for single ports.
    #[schemars(length(min = 1, max = 64), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["port"],
    ))]
    pub ports: Option<Vec<PortAuthentication>>,
    /// What the pods may send in clear. Missing: as the less specific object says.
    pub outbound: Option<OutboundTraffic>,
    /// UDP, which the mesh does not encrypt. Missing: as the less specific object says.
    pub udp: Option<UdpTraffic>,
}

/// What one port accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortAuthentication {
    /// The port of the pod, from 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// What TCP connections it accepts.
    pub mtls: MtlsMode,
}

/// What TCP connections a pod accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MtlsMode {
    /// Only with mutual TLS, from enrolled pods of the same node, and from the node itself.
    Strict,
    /// Also in clear, from whom policy allows.
    Permissive,
}

/// What a pod may send in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OutboundTraffic {
    /// TCP to pods that are not enrolled, counted.
    Opportunistic,
    /// No TCP to pods that are not enrolled, also of the same node.
    Required,
}

/// What a pod may do with UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UdpTraffic {
    /// What policy allows, counted as not encrypted.
    Allow,
    /// Only with pods of the same node.
    SameNode,
    /// Nothing.
    Deny,
}
