// SPDX-License-Identifier: Apache-2.0
//! The type MeshAuthentication.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;
use super::status::PolicyStatus;

/// MeshAuthenticationSpec defines which traffic of enrolled pods requires mutual TLS. The most specific
/// object applies: one with a podSelector, then one for the namespace, then the one for the mesh
/// (`default` in `mesh-system`). If two equally specific objects differ, the stricter value applies.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshAuthentication",
    doc = "MeshAuthentication defines which traffic of enrolled pods requires mutual TLS.",
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
    "must set mtls, ports, outbound or udp",
)])))]
pub struct MeshAuthenticationSpec {
    /// podSelector selects the pods in the namespace to which the object applies. If unset, it applies to
    /// all pods in the namespace.
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// mtls is the mode for TCP connections to the pods. If unset, a less specific object decides.
    pub mtls: Option<MtlsMode>,
    /// ports overrides the mode for individual ports.
    #[schemars(length(min = 1, max = 64), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["port"],
    ))]
    pub ports: Option<Vec<PortAuthentication>>,
    /// outbound is the mode for plaintext TCP connections from the pods. If unset, a less specific object
    /// decides.
    pub outbound: Option<OutboundTraffic>,
    /// udp is the mode for UDP, which the mesh does not encrypt. If unset, a less specific object decides.
    pub udp: Option<UdpTraffic>,
}

/// PortAuthentication is the mode for one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortAuthentication {
    /// port is the port number of the pod. Must be between 1 and 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// mtls is the mode for TCP connections to the port.
    pub mtls: MtlsMode,
}

/// MtlsMode is a mode for TCP connections to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MtlsMode {
    /// Strict accepts mutual TLS, connections from enrolled pods on the same node, and connections from
    /// the node itself.
    Strict,
    /// Permissive also accepts plaintext from sources that policy allows.
    Permissive,
}

/// OutboundTraffic is a mode for plaintext TCP connections from a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OutboundTraffic {
    /// Opportunistic allows plaintext to pods that are not enrolled, and counts it.
    Opportunistic,
    /// Required denies TCP connections to pods that are not enrolled, also on the same node.
    Required,
}

/// UdpTraffic is a mode for UDP traffic of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UdpTraffic {
    /// Allow allows UDP that policy allows, and counts it as not encrypted.
    Allow,
    /// SameNode allows UDP only with pods on the same node.
    SameNode,
    /// Deny denies UDP.
    Deny,
}
