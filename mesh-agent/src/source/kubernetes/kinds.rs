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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use mesh_api::manifests::{Format, objects};
    use mesh_api::{LastGood, Object, Options, convert};
    use serde_json::Value;

    use super::super::lean;
    use super::*;

    /// Kinds of which those examples have none.
    const REPORTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, uid: shop-1, labels: {mesh.rs/dataplane: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: a, uid: a-1}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web-1}
spec: {nodeName: a, containers: [{name: web, image: none}]}
status: {phase: Running, podIP: 10.1.0.1}
---
apiVersion: mesh.rs/v1alpha1
kind: MeshNode
metadata: {name: a, uid: a-2, managedFields: [{manager: mesh-agent}]}
spec: {}
status:
  version: 0.1.0
  observedAt: 2026-01-01T00:00:00Z
  enrolledNamespaces: [shop-1]
  enrolledPods: [web-1]
  inForce: [{kind: MeshPolicy, namespace: shop, name: p, uid: p-1, generation: 1}]
---
apiVersion: mesh.rs/v1alpha1
kind: MeshTrafficPolicy
metadata: {name: web, namespace: shop, uid: t-1}
spec: {targetRef: {name: web}}
";

    fn kind(object: &Value) -> Option<&'static Kind> {
        let is =
            |kind: &&Kind| object["apiVersion"] == kind.api_version && object["kind"] == kind.name;
        KINDS.iter().find(is)
    }

    /// An object as the stream reads it.
    fn read(object: &Value, kind: &Kind) -> Value {
        let mut read = lean::read(&object.to_string(), *kind.keep).unwrap();
        for field in ["apiVersion", "kind"] {
            read[field] = object[field].clone();
        }
        read
    }

    /// What is kept of an object is all that anything is made of: the examples of mesh-api, good and
    /// bad, say the same as a whole and as they are read.
    #[test]
    fn nothing_is_lost_of_what_an_object_says() {
        let options = Options { standalone: false };
        let facts = |values: Vec<Value>| {
            let object = |value| Object {
                origin: "API".to_owned(),
                value,
            };
            let objects: Vec<_> = values.into_iter().map(object).collect();
            convert(&objects, &LastGood::default(), options)
        };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/mesh-api/tests/golden");
        let examples = fs::read_dir(root).unwrap().map(|example| {
            let path = example.unwrap().path();
            let text = fs::read_to_string(path.join("objects.yaml")).unwrap();
            (path.display().to_string(), text)
        });
        let examples = examples.chain([("reports".to_owned(), REPORTS.to_owned())]);
        let mut seen = BTreeSet::new();
        for (example, text) in examples {
            let mut whole = objects(&text, Format::Yaml).unwrap();
            whole.retain(|object| kind(object).is_some());
            let lean = whole.iter().map(|object| {
                let kind = kind(object).expect("others are left out");
                seen.insert(kind.name);
                read(object, kind)
            });
            let lean = lean.collect();
            assert_eq!(facts(whole), facts(lean), "{example}");
        }
        let missing: Vec<_> = KINDS
            .iter()
            .filter(|kind| !seen.contains(kind.name))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
