// SPDX-License-Identifier: Apache-2.0
//! One by one is as all at once.

use std::collections::BTreeSet;

use serde_json::{Value, json};

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
