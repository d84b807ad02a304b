// SPDX-License-Identifier: Apache-2.0
//! The CRDs on a real API server: they stay within its cost budget, reject invalid objects with a message,
//! and accept valid ones.

use mesh_test::Kube;
use serde_json::{Value, json};

const P: &str = "MeshPolicy";
const C: &str = "ClusterMeshPolicy";
const A: &str = "MeshAuthentication";
const N: &str = "ClusterNetworkPolicy";

/// Kind, spec, and what is said of it.
const BAD: &[(&str, &str, &str)] = &[
    (
        P,
        r#"{"ingress": [{"from": [{"ipBlocks": [{"cidr": "10.0.0.0/33"}]}]}]}"#,
        "must be a CIDR such as 10.0.0.0/8",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"ipBlocks": [{"cidr": "10.0.0.0/0"}]}]}]}"#,
        "must not have address bits after the prefix",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"ipBlocks": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}]}]}]}"#,
        "except must contain only strict subsets of cidr",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{}]}]}"#,
        "must set exactly one of: selectors and serviceAccounts, ipBlocks, entities",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"entities": ["world"], "podSelector": {}}]}]}"#,
        "must set exactly one of",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"serviceAccounts": ["*", "web"]}]}]}"#,
        "matches every service account",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"serviceAccounts": ["Shop/web"]}]}]}"#,
        "should match",
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"podSelector": {"matchLabels": {}}}]}]}"#,
        "matchLabels must not be empty",
    ),
    (
        P,
        r#"{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}, "ingress": []}"#,
        "values must not be empty for In and NotIn",
    ),
    (
        P,
        r#"{"ingress": [{"from": []}]}"#,
        "remove the field to match everything",
    ),
    (
        P,
        r#"{"ingress": [{"ports": [{"port": 80, "endPort": 79}]}]}"#,
        "endPort must be greater than or equal to port",
    ),
    (
        P,
        r#"{"ingress": [{"ports": [{"port": 65536}]}]}"#,
        "port must be between 1 and 65535",
    ),
    (
        P,
        r#"{"ingress": [{"ports": [{"port": "http", "endPort": 80}]}]}"#,
        "endPort must not be set without a numeric port",
    ),
    (P, "{}", "must set ingress or egress"),
    (
        P,
        r#"{"action": "Deny", "ingress": []}"#,
        "must not be empty in a Deny policy",
    ),
    (
        P,
        r#"{"ingress": [{"action": "Deny"}]}"#,
        "action must not be set in a rule of a MeshPolicy",
    ),
    (
        P,
        r#"{"ingress": [{"name": "a"}, {"name": "a"}]}"#,
        "rule names must be unique",
    ),
    (
        P,
        r#"{"action": "Refuse", "ingress": []}"#,
        r#"supported values: "Allow", "Deny""#,
    ),
    (
        C,
        r#"{"tier": "Baseline", "priority": 1, "action": "Pass", "ingress": [{}]}"#,
        "Pass is valid in the Admin tier only",
    ),
    (
        C,
        r#"{"tier": "Admin", "priority": 1001, "ingress": [{}]}"#,
        "less than or equal to 1000",
    ),
    (
        C,
        r#"{"tier": "Admin", "priority": 1, "ingress": []}"#,
        "must not be empty: remove the field, or add a rule",
    ),
    (A, "{}", "must set mtls, ports, outbound or udp"),
    (
        A,
        r#"{"ports": [{"port": 1, "mtls": "Strict"}, {"port": 1, "mtls": "Strict"}]}"#,
        "duplicate entries for key",
    ),
    (
        N,
        r#"{"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0"]}]}]}"#,
        "must be a CIDR",
    ),
    (
        N,
        r#"{"tier": "Admin", "priority": 1, "subject": {}}"#,
        "at least 1 properties",
    ),
];

const GOOD: &[(&str, &str)] = &[
    (
        P,
        r#"{"ingress": [{"from": [{"serviceAccounts": ["web", "shop/web", "shop/*"], "podSelector": {}}]}]}"#,
    ),
    (
        P,
        r#"{"ingress": [{"from": [{"ipBlocks": [{"cidr": "fd00::/8", "except": ["fd00::/16"]}]}]}]}"#,
    ),
    (
        P,
        r#"{"ingress": [{"ports": [{"port": "http"}, {"port": 1, "endPort": 65535}]}]}"#,
    ),
    (
        C,
        r#"{"tier": "Admin", "priority": 1, "action": "Pass", "ingress": [{}]}"#,
    ),
    (
        A,
        r#"{"mtls": "Strict", "ports": [{"port": 1, "mtls": "Permissive"}]}"#,
    ),
    (
        N,
        r#"{"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0/8"]}]}]}"#,
    ),
];

fn object(kind: &str, spec: &str) -> String {
    let spec: Value = serde_json::from_str(spec).expect(spec);
    let mut object = json!({
        "apiVersion": "mesh.rs/v1alpha1", "kind": kind,
        "metadata": {"name": "x"}, "spec": spec,
    });
    if kind == N {
        object["apiVersion"] = json!("policy.networking.k8s.io/v1alpha2");
    }
    if !kind.starts_with("Cluster") {
        object["metadata"]["namespace"] = json!("shop");
    }
    object.to_string()
}

#[test]
fn crd_schema_rejects_invalid_objects_with_a_message() {
    let kube = Kube::builder().start().expect("servers");
    kube.prepare_controller().expect("the CRDs are accepted");
    kube.namespace("shop", &[]).expect("namespace");
    for (kind, spec, why) in BAD {
        let text = object(kind, spec);
        let refused = kube.apply_text(&text).expect_err(&text);
        assert!(format!("{refused:#}").contains(why), "{text}: {refused:#}");
    }
    for (kind, spec) in GOOD {
        kube.apply_text(&object(kind, spec)).expect("accepted");
    }
    let stored = kube.get(["mp", "x", "-n", "shop"]).expect("short name");
    assert_eq!(stored["spec"]["action"], "Allow", "defaults are filled in");
    let list = kube.kubectl(["get", "mesh", "-A"]).expect("category");
    assert!(list.contains("clustermeshpolicy.mesh.rs/x"), "{list}");
    let explained = kube
        .kubectl(["explain", "meshpolicy.spec.ingress.from.serviceAccounts"])
        .expect("explain");
    let words: Vec<_> = explained.split_whitespace().collect();
    assert!(
        words
            .join(" ")
            .contains("An Allow rule requires a proven identity"),
        "{explained}"
    );
}
