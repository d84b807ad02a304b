// SPDX-License-Identifier: Apache-2.0
//! Tests of last good versions.

use mesh_api::{LastGood, Outcome, convert};

use super::{STANDALONE, policy, read};

fn object(uid: &str, port: u32) -> String {
    format!(
        "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: p, namespace: shop, uid: {uid}}}, spec: {{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}}}"
    )
}

fn next(text: &str, last: &LastGood) -> Outcome {
    convert(&read(text), last, STANDALONE)
}

#[test]
fn rejected_update_keeps_last_good_version_until_the_next_valid_one() {
    let first = next(&object("u1", 80), &LastGood::default());
    let good = policy(&first, "NetworkPolicy", "shop/p").cloned().unwrap();
    let second = next(&object("u1", 0), &first.last_good);
    assert_eq!(policy(&second, "NetworkPolicy", "shop/p"), Some(&good));
    assert_eq!(
        second.rejections[0].consequence,
        "the last good version stays in force"
    );
    let third = next(&object("u1", 0), &second.last_good);
    assert_eq!(policy(&third, "NetworkPolicy", "shop/p"), Some(&good));
    let fourth = next(&object("u1", 81), &third.last_good);
    assert_ne!(policy(&fourth, "NetworkPolicy", "shop/p"), Some(&good));
    assert_eq!(fourth.rejections, []);
}

#[test]
fn recreated_object_has_no_last_good_version() {
    let first = next(&object("u1", 80), &LastGood::default());
    let isolating = next(&object("u1", 0), &LastGood::default());
    let again = next(&object("u2", 0), &first.last_good);
    assert_eq!(again.cluster, isolating.cluster);
    let gone = next("", &first.last_good);
    assert_eq!(gone.last_good, LastGood::default());
    let again = next(&object("u1", 0), &gone.last_good);
    assert_eq!(again.cluster, isolating.cluster);
}

#[test]
fn last_good_version_survives_serialization() {
    let first = next(
        &format!(
            "{}\n---\n{{apiVersion: v1, kind: Pod, metadata: {{name: x}}, status: {{podIPs: [{{ip: 10.0.0.1}}]}}}}\n---\n{{apiVersion: mesh.rs/v1alpha1, kind: MeshAuthentication, metadata: {{name: x}}, spec: {{ports: [{{port: 80, mtls: Strict}}]}}}}\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: x}}, spec: {{clusterIP: 10.96.0.1, ports: [{{port: 80, targetPort: http}}], selector: {{a: b}}}}}}",
            object("u1", 80)
        ),
        &LastGood::default(),
    );
    assert_eq!(first.rejections, []);
    let text = serde_json::to_string(&first.last_good).unwrap();
    assert!(!text.contains("10.0.0.1"), "pods are not kept: {text}");
    let back: LastGood = serde_json::from_str(&text).unwrap();
    let second = next(&object("u1", 0), &back);
    assert_eq!(second.cluster.policies, first.cluster.policies);
}

#[test]
fn order_of_objects_does_not_matter() {
    let text = format!(
        "{}\n---\n{{apiVersion: v1, kind: Pod, metadata: {{name: x, labels: {{a: b}}}}, status: {{podIPs: [{{ip: 10.0.0.1}}]}}}}\n---\n{{apiVersion: v1, kind: Service, metadata: {{name: x}}, spec: {{clusterIP: 10.96.0.1, ports: [{{name: a, port: 80}}, {{name: b, port: 81}}], selector: {{a: b}}}}}}\n---\n{{kind: Pod}}",
        object("u1", 0)
    );
    let forwards = read(&text);
    let mut backwards = forwards.clone();
    backwards.reverse();
    let last = LastGood::default();
    assert_eq!(
        convert(&forwards, &last, STANDALONE),
        convert(&backwards, &last, STANDALONE)
    );
}
