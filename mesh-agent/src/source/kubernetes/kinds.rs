// SPDX-License-Identifier: Apache-2.0
//! The kinds that are watched, and what of their objects is read.
//!
//! What is not named here is never held in memory: most of a Pod or a Node is of no interest.

use super::lean::Keep::{self, All, Fields};

/// A kind.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) api_version: &'static str,
    pub(super) name: &'static str,
    /// Where its objects are.
    pub(super) path: &'static str,
    /// It is there only if somebody installed it.
    pub(super) optional: bool,
    pub(super) keep: &'static Keep,
}

const METADATA: Keep = Fields(&[
    // A static pod's mirror says what it mirrors.
    (
        "annotations",
        Fields(&[("kubernetes.io/config.mirror", All)]),
    ),
    ("deletionTimestamp", All),
    ("generation", All),
    ("labels", All),
    ("name", All),
    ("namespace", All),
    (
        "ownerReferences",
        Fields(&[("controller", All), ("kind", All), ("name", All)]),
    ),
    ("resourceVersion", All),
    ("uid", All),
]);

const CONTAINER: Keep = Fields(&[("name", All), ("ports", All), ("restartPolicy", All)]);

const HEAD: Keep = Fields(&[("metadata", METADATA)]);

const POD: Keep = Fields(&[
    ("metadata", METADATA),
    (
        "spec",
        Fields(&[
            ("containers", CONTAINER),
            ("hostNetwork", All),
            ("initContainers", CONTAINER),
            ("nodeName", All),
            ("serviceAccountName", All),
        ]),
    ),
    (
        "status",
        Fields(&[
            ("conditions", Fields(&[("status", All), ("type", All)])),
            ("phase", All),
            ("podIP", All),
            ("podIPs", All),
        ]),
    ),
]);

const NODE: Keep = Fields(&[
    ("metadata", METADATA),
    ("spec", Fields(&[("podCIDR", All), ("podCIDRs", All)])),
    ("status", Fields(&[("addresses", All)])),
]);

const SERVICE: Keep = Fields(&[
    ("metadata", METADATA),
    ("spec", All),
    ("status", Fields(&[("loadBalancer", All)])),
]);

const SLICE: Keep = Fields(&[
    ("addressType", All),
    (
        "endpoints",
        Fields(&[("addresses", All), ("conditions", All), ("nodeName", All)]),
    ),
    ("metadata", METADATA),
    ("ports", All),
]);

const POLICY: Keep = Fields(&[("metadata", METADATA), ("spec", All)]);

const MESH_NODE: Keep = Fields(&[
    ("metadata", METADATA),
    (
        "status",
        Fields(&[("enrolledNamespaces", All), ("enrolledPods", All)]),
    ),
]);

const fn built_in(
    api_version: &'static str,
    name: &'static str,
    path: &'static str,
    keep: &'static Keep,
) -> Kind {
    Kind {
        api_version,
        name,
        path,
        optional: false,
        keep,
    }
}

const fn installed(name: &'static str, path: &'static str, keep: &'static Keep) -> Kind {
    Kind {
        api_version: "mesh.rs/v1alpha1",
        name,
        path,
        optional: true,
        keep,
    }
}

/// All of them.
pub(super) static KINDS: [Kind; 12] = [
    built_in("v1", "Namespace", "/api/v1/namespaces", &HEAD),
    built_in("v1", "Node", "/api/v1/nodes", &NODE),
    built_in("v1", "Pod", "/api/v1/pods", &POD),
    built_in("v1", "Service", "/api/v1/services", &SERVICE),
    built_in(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        "/apis/discovery.k8s.io/v1/endpointslices",
        &SLICE,
    ),
    built_in(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        "/apis/networking.k8s.io/v1/networkpolicies",
        &POLICY,
    ),
    Kind {
        api_version: "policy.networking.k8s.io/v1alpha2",
        name: "ClusterNetworkPolicy",
        path: "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        optional: true,
        keep: &POLICY,
    },
    installed("MeshPolicy", "/apis/mesh.rs/v1alpha1/meshpolicies", &POLICY),
    installed(
        "ClusterMeshPolicy",
        "/apis/mesh.rs/v1alpha1/clustermeshpolicies",
        &POLICY,
    ),
    installed(
        "MeshAuthentication",
        "/apis/mesh.rs/v1alpha1/meshauthentications",
        &POLICY,
    ),
    installed(
        "MeshTrafficPolicy",
        "/apis/mesh.rs/v1alpha1/meshtrafficpolicies",
        &POLICY,
    ),
    installed("MeshNode", "/apis/mesh.rs/v1alpha1/meshnodes", &MESH_NODE),
];
