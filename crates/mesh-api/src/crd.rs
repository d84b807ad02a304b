// SPDX-License-Identifier: Apache-2.0
//! The types of the mesh's own kinds (`mesh.rs/v1alpha1`) and of ClusterNetworkPolicy, which no library
//! provides yet. The CRDs are generated from the doc comments and schemas of these types
//! ([`definitions`]).
//!
//! This module has types only; [`crate::convert`] interprets them.

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
    ClusterProtocolPorts, ClusterRuleAction, ClusterSubject, EgressPeer, EgressRule, IngressPeer,
    IngressRule, NamespacedPod,
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
    ConnectionLimits, LoadBalancing, MeshTrafficPolicy, MeshTrafficPolicySpec, NO_EFFECT,
    OutlierEjection, RetryPolicy, ServiceTarget,
};
pub use status::{ACCEPTED, FieldRejection, IN_FORCE, PolicyStatus};
