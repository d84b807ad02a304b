// SPDX-License-Identifier: Apache-2.0
//! One by one is as all at once.

use std::collections::BTreeSet;

use serde_json::{Value, json};

#[path = "../../../tests/order/random.rs"]
mod random;

use random::Random;

use super::Facts;
use crate::{LastGood, Object, Options, convert};

const CLUSTER: Options = Options { standalone: false };

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
fn one_by_one_is_as_all_at_once() {
    let all = [
        pod("a", "10.0.0.1"),
        policy(3, "Ingress"),
        pod("b", "10.0.0.2"),
    ];
    let mut facts = Facts::new(LastGood::default(), CLUSTER);
    for object in &all {
        facts.apply(object).expect("a kind that is read");
    }
    let at_once = convert(&all, &LastGood::default(), CLUSTER);
    let mut outcome = facts.outcome();
    assert_eq!(outcome.cluster.versions.len(), 1);
    outcome.cluster.versions.clear();
    assert_eq!(outcome.cluster, at_once.cluster);
    assert_eq!(outcome.rejections, at_once.rejections);
}

#[test]
fn only_what_is_read_counts_as_a_change() {
    let mut facts = Facts::new(LastGood::default(), CLUSTER);
    let name = facts.apply(&pod("a", "10.0.0.1")).unwrap();
    let known = facts.changes();
    let mut later = pod("a", "10.0.0.1");
    later.value["metadata"]["resourceVersion"] = json!("77");
    later.value["status"]["conditions"] = json!([{"type": "Beat", "status": "True"}]);
    facts.apply(&later);
    assert_eq!(facts.changes(), known);
    facts.apply(&pod("a", "10.0.0.9"));
    assert!(facts.changes() > known);
    let known = facts.changes();
    facts.apply(&policy(3, "Sideways"));
    assert!(facts.changes() > known, "a rejection is one");
    let known = facts.changes();
    facts.apply(&policy(3, "Sideways"));
    assert_eq!(facts.changes(), known);
    facts.remove(&name);
    assert!(facts.changes() > known);
}

#[test]
fn a_bad_version_leaves_the_last_good_one_with_its_generation() {
    let mut facts = Facts::new(LastGood::default(), CLUSTER);
    let name = facts.apply(&policy(3, "Ingress")).unwrap();
    let good = facts.outcome();
    let last_good = facts.last_good();
    assert_eq!(good.cluster.versions[&name].generation, 3);
    facts.apply(&policy(4, "Sideways"));
    let mut bad = facts.outcome();
    let version = bad.cluster.versions.get_mut(&name).unwrap();
    assert_eq!((version.generation, version.newest), (3, 4));
    version.newest = 3;
    assert_eq!(bad.cluster, good.cluster);
    assert_eq!(bad.rejections.len(), 1);

    // After a restart the generation is not known any more, the policy is.
    let mut restarted = Facts::new(last_good, CLUSTER);
    restarted.apply(&policy(4, "Sideways"));
    let after = restarted.outcome();
    assert_eq!(after.cluster.policies, good.cluster.policies);
    assert_eq!(after.cluster.versions[&name].generation, 0);

    // Another object of that name is another object.
    let mut other = policy(1, "Sideways");
    other.value["metadata"]["uid"] = json!("another");
    restarted.apply(&other);
    assert_ne!(restarted.outcome().cluster.policies, good.cluster.policies);
}

#[test]
fn what_a_list_does_not_have_is_forgotten() {
    let mut facts = Facts::new(LastGood::default(), CLUSTER);
    let a = facts.apply(&pod("a", "10.0.0.1")).unwrap();
    let b = facts.apply(&pod("b", "10.0.0.2")).unwrap();
    facts.apply(&policy(1, "Ingress"));
    facts.retain("Pod", &BTreeSet::from([b.clone()]));
    assert_eq!(facts.len(), 2);
    facts.remove(&b);
    facts.remove(&a);
    assert!(facts.outcome().cluster.pods.is_empty());
    assert_eq!(facts.outcome().cluster.policies.len(), 1);
}

#[test]
fn a_pod_that_ended_is_gone() {
    let mut facts = Facts::new(LastGood::default(), CLUSTER);
    facts.apply(&pod("a", "10.0.0.1"));
    let mut ended = pod("a", "10.0.0.1");
    ended.value["status"]["phase"] = json!("Succeeded");
    facts.apply(&ended);
    assert!(facts.outcome().cluster.pods.is_empty());
}

#[test]
fn a_pod_that_was_ready_once_stays_so_while_it_is_enrolled() {
    let mut facts = Facts::new(LastGood::default(), CLUSTER);
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
    let name = facts.apply(&labelled("enabled")).unwrap();
    facts.apply(&report(json!([])));
    assert!(facts.outcome().cluster.ready.unwrap().is_empty());
    facts.apply(&report(json!(["uid-a"])));
    assert_eq!(facts.outcome().cluster.ready.unwrap().len(), 1);
    facts.apply(&report(json!([])));
    assert_eq!(facts.outcome().cluster.ready.unwrap().len(), 1);
    facts.apply(&labelled("disabled"));
    assert!(facts.outcome().cluster.ready.unwrap().is_empty());
    facts.apply(&labelled("enabled"));
    assert!(facts.outcome().cluster.ready.unwrap().is_empty());
    facts.apply(&report(json!(["uid-a"])));
    assert_eq!(facts.outcome().cluster.ready.unwrap().len(), 1);
    facts.remove(&name);
    assert!(facts.outcome().cluster.ready.unwrap().is_empty());
}

impl Random {
    fn one(&mut self, of: &[&'static str]) -> &'static str {
        of[self.below(of.len())]
    }
}

/// Some version of some object of a small world in which everything has to do with everything.
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
fn what_is_put_together_in_parts_is_as_the_whole() {
    let mut in_parts = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let mut parts = Facts::new(LastGood::default(), CLUSTER);
        let mut whole = Facts::new(LastGood::default(), CLUSTER);
        let mut names = Vec::new();
        for _ in 0..60 {
            let object = any(&mut random);
            let is_gone = random.below(4) == 0;
            for facts in [&mut parts, &mut whole] {
                let name = facts.apply(&object).expect("a kind that is read");
                if is_gone {
                    facts.remove(&name);
                }
                names.push(name);
            }
            if random.below(10) == 0 {
                let listed: BTreeSet<_> = names.iter().filter(|_| random.below(2) == 0).collect();
                let listed: BTreeSet<_> = listed.into_iter().cloned().collect();
                let kind = random.one(&["Pod", "Namespace", "EndpointSlice", "MeshNode"]);
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
    assert!(in_parts > 3000, "only {in_parts} times were parts enough");
}
