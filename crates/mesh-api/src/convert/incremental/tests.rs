// SPDX-License-Identifier: Apache-2.0
//! Tests that incremental conversion equals conversion of all objects at once.

use std::collections::BTreeSet;

use serde_json::{Value, json};

#[path = "../../../tests/order/random.rs"]
mod random;

use random::Random;

use super::IncrementalConverter;
use crate::{Kind, LastGood, Object, Options, convert};

const CLUSTER: Options = Options { standalone: false };

impl IncrementalConverter {
    fn take(&mut self, object: &Object) -> mesh_plan::cluster::ObjectRef {
        let name = object.value["kind"].as_str().expect("a kind");
        let kind = Kind::ALL.iter().find(|kind| kind.name() == name);
        self.apply(*kind.expect("a kind that is read"), &object.value)
    }
}

fn object(value: Value) -> Object {
    Object {
        origin: String::new(),
        value,
    }
}

fn pod(name: &str, ip: &str) -> Object {
    object(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    }))
}

fn policy(generation: i64, kind: &str) -> Object {
    object(json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "shop", "uid": "uid-policy", "generation": generation},
        "spec": {"podSelector": {}, "policyTypes": [kind]},
    }))
}

#[test]
fn incremental_conversion_equals_conversion_at_once() {
    let all = [
        pod("a", "10.0.0.1"),
        policy(3, "Ingress"),
        pod("b", "10.0.0.2"),
    ];
    let mut converter = IncrementalConverter::new(LastGood::default(), CLUSTER);
    for object in &all {
        converter.take(object);
    }
    let at_once = convert(&all, &LastGood::default(), CLUSTER);
    let mut outcome = converter.outcome();
    assert_eq!(outcome.cluster.versions.len(), 1);
    outcome.cluster.versions.clear();
    assert_eq!(outcome.cluster, at_once.cluster);
    assert_eq!(outcome.rejections, at_once.rejections);
}

#[test]
fn change_of_an_unused_field_is_not_a_change() {
    let mut converter = IncrementalConverter::new(LastGood::default(), CLUSTER);
    let name = converter.take(&pod("a", "10.0.0.1"));
    let known = converter.changes();
    let mut later = pod("a", "10.0.0.1");
    later.value["metadata"]["resourceVersion"] = json!("77");
    later.value["status"]["conditions"] = json!([{"type": "Beat", "status": "True"}]);
    converter.take(&later);
    assert_eq!(converter.changes(), known);
    converter.take(&pod("a", "10.0.0.9"));
    assert!(converter.changes() > known);
    let known = converter.changes();
    converter.take(&policy(3, "Sideways"));
    assert!(converter.changes() > known, "a rejection is a change");
    let known = converter.changes();
    converter.take(&policy(3, "Sideways"));
    assert_eq!(converter.changes(), known);
    converter.remove(&name);
    assert!(converter.changes() > known);
}

#[test]
fn rejected_update_keeps_last_good_version_and_its_generation() {
    let mut converter = IncrementalConverter::new(LastGood::default(), CLUSTER);
    let name = converter.take(&policy(3, "Ingress"));
    let good = converter.outcome();
    let last_good = converter.last_good();
    assert_eq!(good.cluster.versions[&name].generation, 3);
    converter.take(&policy(4, "Sideways"));
    let mut bad = converter.outcome();
    let version = bad.cluster.versions.get_mut(&name).unwrap();
    assert_eq!((version.generation, version.newest), (3, 4));
    version.newest = 3;
    assert_eq!(bad.cluster, good.cluster);
    assert_eq!(bad.rejections.len(), 1);

    // After a restart the policy is known, but not its generation.
    let mut restarted = IncrementalConverter::new(last_good, CLUSTER);
    restarted.take(&policy(4, "Sideways"));
    let after = restarted.outcome();
    assert_eq!(after.cluster.policies, good.cluster.policies);
    assert_eq!(after.cluster.versions[&name].generation, 0);

    // An object with the same name and another UID is a new object.
    let mut other = policy(1, "Sideways");
    other.value["metadata"]["uid"] = json!("another");
    restarted.take(&other);
    assert_ne!(restarted.outcome().cluster.policies, good.cluster.policies);
}

#[test]
fn objects_absent_from_a_list_are_removed() {
    let mut converter = IncrementalConverter::new(LastGood::default(), CLUSTER);
    let a = converter.take(&pod("a", "10.0.0.1"));
    let b = converter.take(&pod("b", "10.0.0.2"));
    converter.take(&policy(1, "Ingress"));
    converter.retain(Kind::Pod, &BTreeSet::from([b.clone()]));
    assert_eq!(converter.len(), 2);
    converter.remove(&b);
    converter.remove(&a);
    assert!(converter.outcome().cluster.pods.is_empty());
    assert_eq!(converter.outcome().cluster.policies.len(), 1);
}

#[test]
fn completed_pod_is_removed() {
    let mut converter = IncrementalConverter::new(LastGood::default(), CLUSTER);
    converter.take(&pod("a", "10.0.0.1"));
    let mut ended = pod("a", "10.0.0.1");
    ended.value["status"]["phase"] = json!("Succeeded");
    converter.take(&ended);
    assert!(converter.outcome().cluster.pods.is_empty());
}

#[test]
fn ready_pod_stays_ready_while_it_is_enrolled() {
    let mut converter = IncrementalConverter::new(LastGood::default(), CLUSTER);
    let report = |pods: Value| {
        object(json!({
            "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshNode",
            "metadata": {"name": "n1", "uid": "uid-n1"},
            "spec": {}, "status": {"enrolledPods": pods},
        }))
    };
    let labelled = |value: &str| {
        let mut pod = pod("a", "10.0.0.1");
        pod.value["metadata"]["labels"] = json!({"mesh.rs/dataplane": value});
        pod
    };
    let name = converter.take(&labelled("enabled"));
    converter.take(&report(json!([])));
    assert!(converter.outcome().cluster.ready.unwrap().is_empty());
    converter.take(&report(json!(["uid-a"])));
    assert_eq!(converter.outcome().cluster.ready.unwrap().len(), 1);
    converter.take(&report(json!([])));
    assert_eq!(converter.outcome().cluster.ready.unwrap().len(), 1);
    converter.take(&labelled("disabled"));
    assert!(converter.outcome().cluster.ready.unwrap().is_empty());
    converter.take(&labelled("enabled"));
    assert!(converter.outcome().cluster.ready.unwrap().is_empty());
    converter.take(&report(json!(["uid-a"])));
    assert_eq!(converter.outcome().cluster.ready.unwrap().len(), 1);
    converter.remove(&name);
    assert!(converter.outcome().cluster.ready.unwrap().is_empty());
}

impl Random {
    fn one(&mut self, of: &[&'static str]) -> &'static str {
        of[self.below(of.len())]
    }
}

/// A random version of a random object of a small cluster in which all objects are related.
fn any(random: &mut Random) -> Object {
    let space = random.one(&["default", "shop"]);
    let mesh = random.one(&["enabled", "disabled", "odd"]);
    let node = random.one(&["n1", "n2"]);
    let name = random.one(&["a", "b", "kubernetes"]);
    let number = random.below(3);
    let meta = json!({
        "name": name, "namespace": space, "uid": format!("uid-{space}-{name}"),
        "generation": number + 1,
    });
    object(match random.below(8) {
        0 => json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {
                "name": space, "uid": format!("uid-{space}"),
                "labels": {"mesh.rs/dataplane": mesh},
            },
        }),
        1 => json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "uid": node},
            "spec": {"podCIDRs": [format!("10.0.{number}.0/24")]},
        }),
        2 | 3 => {
            let mut pod = json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": meta,
                "spec": {"nodeName": node, "containers": []},
                "status": {"phase": "Running", "podIPs": [{"ip": format!("10.0.0.{number}")}]},
            });
            if mesh != "odd" {
                pod["metadata"]["labels"] = json!({"mesh.rs/dataplane": mesh});
            }
            if random.below(10) == 0 {
                pod["metadata"]["uid"] = json!("uid-of-two");
            }
            pod
        }
        4 => json!({
            "apiVersion": "v1", "kind": "Service", "metadata": meta,
            "spec": {
                "clusterIPs": [format!("10.9.0.{number}")],
                "ports": [{"port": 80, "targetPort": 8080}],
            },
        }),
        5 => {
            let mut slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": meta,
                "addressType": "IPv4", "ports": [{"port": 8080}],
                "endpoints": [{"addresses": [format!("10.0.0.{number}")]}],
            });
            let service = random.one(&["a", "b", "kubernetes"]);
            slice["metadata"]["labels"] = json!({"kubernetes.io/service-name": service});
            slice
        }
        6 => json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta,
            "spec": {
                "podSelector": {},
                "policyTypes": [random.one(&["Ingress", "Egress", "Sideways"])],
            },
        }),
        _ => json!({
            "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshNode",
            "metadata": {"name": node, "uid": node},
            "spec": {}, "status": {
                "enrolledNamespaces": [format!("uid-{}", random.one(&["default", "shop", "none"]))],
                "enrolledPods": [format!("uid-{space}-{name}")],
            },
        }),
    })
}

#[test]
fn assembling_stale_parts_equals_assembling_everything() {
    let mut in_parts = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let mut parts = IncrementalConverter::new(LastGood::default(), CLUSTER);
        let mut whole = IncrementalConverter::new(LastGood::default(), CLUSTER);
        let mut names = Vec::new();
        for _ in 0..60 {
            let object = any(&mut random);
            let is_gone = random.below(4) == 0;
            for converter in [&mut parts, &mut whole] {
                let name = converter.take(&object);
                if is_gone {
                    converter.remove(&name);
                }
                names.push(name);
            }
            if random.below(10) == 0 {
                let listed: BTreeSet<_> = names.iter().filter(|_| random.below(2) == 0).collect();
                let listed: BTreeSet<_> = listed.into_iter().cloned().collect();
                let kinds = [
                    Kind::Pod,
                    Kind::Namespace,
                    Kind::EndpointSlice,
                    Kind::MeshNode,
                ];
                let kind = kinds[random.below(kinds.len())];
                parts.retain(kind, &listed);
                whole.retain(kind, &listed);
            }
            if random.below(3) > 0 {
                in_parts += usize::from(!parts.stale.all);
                whole.stale.all = true;
                assert_eq!(parts.outcome(), whole.outcome(), "seed {seed}");
            }
        }
    }
    assert!(
        in_parts > 3000,
        "parts were assembled only {in_parts} times"
    );
}
