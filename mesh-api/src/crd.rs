// SPDX-License-Identifier: Apache-2.0
//! The mesh's own kinds, group `mesh.rs`, version `v1alpha1`, and ClusterNetworkPolicy, which no
//! library has yet: plain serde types, from whose field docs and schemas the CRDs are made.
//!
//! Types only: what they mean is in [`crate::convert`].

mod cluster_network_policy;
mod mesh_authentication;
mod mesh_node;
mod mesh_policy;
mod mesh_traffic_policy;

pub use cluster_network_policy::{
    ClusterNetworkPolicySpec, ClusterPort, ClusterPortRange, ClusterProtocol, ClusterProtocolPorts,
    ClusterRule, ClusterRuleAction, ClusterSubject, EgressPeer, EgressRule, IngressPeer,
    IngressRule, NamespacedPod,
};
pub use mesh_authentication::{
    MeshAuthenticationSpec, MtlsMode, OutboundTraffic, PortAuthentication, UdpTraffic,
};
pub use mesh_node::MeshNodeSpec;
pub use mesh_policy::{
    ClusterAction, ClusterMeshPolicySpec, ClusterTier, MeshAction, MeshEgressRule, MeshEntity,
    MeshIngressRule, MeshIpBlock, MeshPeer, MeshPolicySpec, MeshPort, PolicyMode, PortProtocol,
};
pub use mesh_traffic_policy::{
    ConnectionLimits, LoadBalancing, MeshTrafficPolicySpec, OutlierEjection, RetryPolicy,
    ServiceTarget,
};

/// The API group of the mesh's own kinds.
pub const GROUP: &str = "mesh.rs";
/// Its version.
pub const VERSION: &str = "v1alpha1";
