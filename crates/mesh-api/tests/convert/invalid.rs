// SPDX-License-Identifier: Apache-2.0
//! Tests that a rejected object without a last good version never allows traffic.

use mesh_plan::cluster::{
    Mtls, ObjectName, OutboundMode, Policy, RuleAction, Subject, Tier, UdpMode,
};

use super::{policy, rejections, standalone, warnings};

fn object(group: &str, kind: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: {group}, kind: {kind}, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
    )
}

fn rejected(group: &str, kind: &str, spec: &str) -> (Option<Policy>, String) {
    let outcome = standalone(&object(group, kind, spec));
    assert!(!outcome.rejections.is_empty(), "{spec} is accepted");
    let name = if kind.starts_with("Cluster") {
        "p"
    } else {
        "shop/p"
    };
    (
        policy(&outcome, kind, name).cloned(),
        outcome.rejections[0].consequence.clone(),
    )
}

#[test]
fn network_policy_isolates_its_pods_in_its_directions() {
    const BAD: &str = "ingress: [{ports: [{port: 0}]}]";
    let rows = [
        (
            format!("{{podSelector: {{matchLabels: {{a: b}}}}, {BAD}}}"),
            (true, false),
        ),
        (
            format!("{{podSelector: {{}}, {BAD}, egress: [{{}}]}}"),
            (true, true),
        ),
        (
            format!("{{podSelector: {{}}, {BAD}, policyTypes: [Egress]}}"),
            (false, true),
        ),
        (
            format!("{{podSelector: {{}}, {BAD}, policyTypes: [Ingress]}}"),
            (true, false),
        ),
        (
            "{podSelector: {}, policyTypes: [Ingres]}".to_owned(),
            (true, true),
        ),
        (
            "{podSelector: {}, policyTypes: Ingress}".to_owned(),
            (true, true),
        ),
        ("{podSelector: {}, egress: {}}".to_owned(), (true, true)),
    ];
    for (spec, directions) in rows {
        let (policy, consequence) = rejected("networking.k8s.io/v1", "NetworkPolicy", &spec);
        let policy = policy.expect(&spec);
        assert!(matches!(&policy.subject, Subject::Pods { namespace, .. } if namespace == "shop"));
        assert_eq!(policy.ingress, directions.0.then(Vec::new), "{spec}");
        assert_eq!(policy.egress, directions.1.then(Vec::new), "{spec}");
        assert!(consequence.contains("isolates the pods that spec.podSelector selects"));
    }
}

#[test]
fn invalid_pod_selector_isolates_the_namespace() {
    for kind in ["NetworkPolicy", "MeshPolicy"] {
        let group = match kind {
            "NetworkPolicy" => "networking.k8s.io/v1",
            _ => "mesh.rs/v1alpha1",
        };
        let spec = "{podSelector: {matchLabels: {a: 1}}, ingress: [{}]}";
        let (policy, consequence) = rejected(group, kind, spec);
        assert_eq!(
            policy.unwrap().subject,
            Subject::WholeNamespace("shop".to_owned())
        );
        assert!(
            consequence.contains("every pod in namespace shop for ingress"),
            "{consequence}"
        );
    }
}

#[test]
fn mesh_policy_isolates_its_pods_and_audit_isolates_none() {
    let group = "mesh.rs/v1alpha1";
    let rows = [
        ("{action: Permit, ingress: [{}]}", (true, false)),
        ("{action: Deny, ingress: []}", (true, false)),
        ("{ingress: [{from: []}]}", (true, false)),
        ("{egress: [{to: [{entities: [moon]}]}]}", (false, true)),
        ("{}", (true, true)),
        ("{mode: Maybe, ingress: [{}], egress: [{}]}", (true, true)),
    ];
    for (spec, directions) in rows {
        let policy = rejected(group, "MeshPolicy", spec).0.expect(spec);
        assert_eq!(
            (policy.ingress, policy.egress),
            (directions.0.then(Vec::new), directions.1.then(Vec::new)),
            "{spec}"
        );
    }
    let (policy, consequence) = rejected(
        group,
        "MeshPolicy",
        "{mode: Audit, ingress: [{ports: [{port: 0}]}]}",
    );
    assert_eq!(policy, None);
    assert!(consequence.contains("neither audits nor isolates"));
}

#[test]
fn cluster_policy_denies_in_its_tier_if_its_subject_is_valid() {
    let group = "mesh.rs/v1alpha1";
    let (policy, _) = rejected(
        group,
        "ClusterMeshPolicy",
        "{tier: Baseline, priority: 7, podSelector: {matchLabels: {a: b}}, egress: [{ports: []}]}",
    );
    let policy = policy.unwrap();
    assert_eq!((policy.tier, policy.ingress), (Tier::Baseline(7), None));
    assert_eq!(policy.egress.unwrap()[0].action, RuleAction::Deny);
    let (policy, _) = rejected(
        group,
        "ClusterMeshPolicy",
        "{tier: Top, priority: x, ingress: [{}]}",
    );
    assert_eq!(policy.unwrap().tier, Tier::Admin(0));
    let (policy, consequence) = rejected(
        group,
        "ClusterMeshPolicy",
        "{tier: Admin, priority: 1, podSelector: {matchLabels: {a: 1}}, ingress: [{}]}",
    );
    assert_eq!(policy, None);
    assert!(consequence.contains("does not apply to any pod"));
    let group = "policy.networking.k8s.io/v1alpha2";
    let (policy, _) = rejected(
        group,
        "ClusterNetworkPolicy",
        "{tier: Admin, priority: 1001, subject: {namespaces: {}}, ingress: [{action: Accept, from: [{namespaces: {}}]}]}",
    );
    let policy = policy.unwrap();
    assert_eq!(policy.ingress.unwrap()[0].action, RuleAction::Deny);
    assert_eq!(policy.egress, None);
    let spec = "{tier: Admin, priority: 1, subject: {}, ingress: []}";
    assert_eq!(rejected(group, "ClusterNetworkPolicy", spec).0, None);
}

#[test]
fn mesh_authentication_gets_strictest_value_in_invalid_fields() {
    let rows = [
        ("{mtls: strict}", Some(Mtls::Strict), None, None),
        (
            "{mtls: Permissive, outbound: No, udp: 3}",
            Some(Mtls::Permissive),
            Some(OutboundMode::Required),
            Some(UdpMode::Deny),
        ),
        (
            "{mtls: Permissive, ports: x}",
            Some(Mtls::Strict),
            None,
            None,
        ),
        (
            "{mtls: Permissive, ports: [{port: 0, mtls: Permissive}]}",
            Some(Mtls::Strict),
            None,
            None,
        ),
        (
            "{podSelector: {matchLabels: {a: 1}}, mtls: Permissive, outbound: Opportunistic}",
            Some(Mtls::Strict),
            Some(OutboundMode::Required),
            None,
        ),
    ];
    for (spec, mtls, outbound, udp) in rows {
        let outcome = standalone(&object("mesh.rs/v1alpha1", "MeshAuthentication", spec));
        assert!(!outcome.rejections.is_empty(), "{spec}");
        let made = &outcome.cluster.authentications[&ObjectName::new("shop", "p")];
        assert_eq!(
            (made.mtls, made.outbound, made.udp),
            (mtls, outbound, udp),
            "{spec}"
        );
        assert_eq!(made.pods, None, "{spec}");
    }
    let outcome = standalone(&object(
        "mesh.rs/v1alpha1",
        "MeshAuthentication",
        "{mtls: Permissive, ports: [{port: 80, mtls: Foo}, {port: 81, mtls: Permissive}]}",
    ));
    let made = &outcome.cluster.authentications[&ObjectName::new("shop", "p")];
    assert_eq!(made.mtls, Some(Mtls::Permissive));
    assert_eq!(
        made.ports,
        [(80, Mtls::Strict), (81, Mtls::Permissive)].into()
    );
    let all = rejections(&outcome);
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(all[0].contains("spec.ports[0].mtls"), "{all:?}");
}

#[test]
fn invalid_metadata_and_unsupported_kinds_are_rejected() {
    let rows = [
        (
            "{kind: Pod, metadata: {name: x}}",
            "apiVersion: is required",
        ),
        ("{apiVersion: v1, metadata: {name: x}}", "kind: is required"),
        (
            "{apiVersion: v1, kind: Pod, metadata: {}}",
            "Pod test.yaml: metadata.name: is required",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: 'a b'}}",
            "metadata.name: invalid name \"a b\"",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: 3}}",
            "metadata.name: must be a string",
        ),
        (
            "{apiVersion: networking.k8s.io/v1beta1, kind: NetworkPolicy, metadata: {name: x, namespace: y}}",
            "NetworkPolicy y/x: apiVersion: version \"v1beta1\" is not supported; use \"v1\"",
        ),
        (
            "{apiVersion: mesh.rs/v1alpha1, kind: MeshPolice, metadata: {name: x}}",
            "kind: \"MeshPolice\" is not a kind of the API group mesh.rs",
        ),
        (
            "{apiVersion: policy.networking.k8s.io/v1alpha1, kind: AdminNetworkPolicy, metadata: {name: x}}",
            "AdminNetworkPolicy x: kind: \"AdminNetworkPolicy\" is not supported; use ClusterNetworkPolicy",
        ),
        (
            "{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: x, namespace: y}}",
            "NetworkPolicy y/x: apiVersion: \"extensions/v1beta1\" is not supported",
        ),
    ];
    for (text, expected) in rows {
        let all = rejections(&standalone(text));
        assert!(
            all.len() == 1 && all[0].contains(expected),
            "{text}: {all:?}"
        );
    }
    let others = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}}\n---\n{apiVersion: crd.projectcalico.org/v1, kind: NetworkPolicy, metadata: {name: x}}";
    let outcome = standalone(others);
    assert_eq!(rejections(&outcome), [""; 0]);
    assert_eq!(warnings(&outcome), [""; 0]);
}

#[test]
fn rejected_object_does_not_affect_other_objects() {
    let bad = object("networking.k8s.io/v1", "NetworkPolicy", "{ingress: 3}");
    let good = bad
        .replace("name: p", "name: q")
        .replace("{ingress: 3}", "{}");
    let outcome = standalone(&format!("{bad}\n---\n{good}\n---\n{{kind: Pod}}"));
    assert!(policy(&outcome, "NetworkPolicy", "shop/q").is_some());
    assert_eq!(outcome.rejections.len(), 2);
}

#[test]
fn invalid_enrollment_label_enrolls() {
    let outcome = standalone(
        "{apiVersion: v1, kind: Namespace, metadata: {name: x, labels: {mesh.rs/dataplane: enable}}}",
    );
    assert_eq!(
        outcome.cluster.namespaces["x"].labels["mesh.rs/dataplane"],
        "enabled"
    );
    assert!(rejections(&outcome)[0].contains("the namespace is enrolled"));
    let outcome = standalone(
        "{apiVersion: v1, kind: Pod, metadata: {name: x, uid: u, labels: {mesh.rs/dataplane: required}}, status: {podIPs: [{ip: 10.0.0.1}]}}",
    );
    assert_eq!(
        outcome.cluster.pods["u"].labels["mesh.rs/dataplane"],
        "enabled"
    );
}
