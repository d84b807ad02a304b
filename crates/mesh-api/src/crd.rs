// SPDX-License-Identifier: Apache-2.0
//! The mesh's own kinds, group `mesh.rs`, version `v1alpha1`, and ClusterNetworkPolicy, which no
//! library has yet: plain serde types, from whose field docs and schemas the CRDs are made
//! ([`definitions`]).
//!
//! Types only: what they mean is in [`crate::convert`].

#![expect(
    clippy::duplicated_attributes,
    reason = "the attribute of kinds repeats its keys for each printer column"
)]

mod cluster_network_policy;
mod definition;
mod mesh_authentication;
mod mesh_node;
mod mesh_policy;
mod mesh_traffic_policy;
mod schema;
mod status;

pub use cluster_network_policy::{
    ClusterNetworkPolicy, ClusterNetworkPolicySpec, ClusterPort, ClusterPortRange, ClusterProtocol,
    ClusterProtocolPorts, ClusterRule, ClusterRuleAction, ClusterSubject, EgressPeer, EgressRule,
    IngressPeer, IngressRule, NamespacedPod,
};
pub use definition::definitions;
pub use mesh_authentication::{
    MeshAuthentication, MeshAuthenticationSpec, MtlsMode, OutboundTraffic, PortAuthentication,
    UdpTraffic,
};
pub use mesh_node::{
    MeshNode, MeshNodeSpec, MeshNodeStatus, ReportedField, ReportedObject, UnprotectedPod,
};
pub use mesh_policy::{
    ClusterAction, ClusterMeshPolicy, ClusterMeshPolicySpec, ClusterTier, MeshAction,
    MeshEgressRule, MeshEntity, MeshIngressRule, MeshIpBlock, MeshPeer, MeshPolicy, MeshPolicySpec,
    MeshPort, PolicyMode, PortProtocol,
};
pub use mesh_traffic_policy::{
    ConnectionLimits, LoadBalancing, MeshTrafficPolicy, MeshTrafficPolicySpec, OutlierEjection,
    RetryPolicy, ServiceTarget,
};

pub use status::{ACCEPTED, FieldRejection, IN_FORCE, PolicyStatus};

/// The API group of the mesh's own kinds.
pub const GROUP: &str = "mesh.rs";
/// Its version.
pub const VERSION: &str = "v1alpha1";
