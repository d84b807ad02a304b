// SPDX-License-Identifier: Apache-2.0
//! Agents on a real API server: from their start to enforced policy, and through outages of the API server
//! and changes of objects under traffic.

#![expect(clippy::print_stdout, reason = "numbers are for people to read")]

mod changes;
mod fixture;
mod invalid;
mod rollout;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_test::{Kube, Lab, Pod, Topology, eventually};
use serde_json::{Value, json};

use fixture::{
    Fixture, SOON, any_schema, config, does_reach, install_crds, patch_crd, serve, storm,
    tell_status, unharmed,
};

const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: lock, namespace: default}
spec: {podSelector: {matchLabels: {app: near}}, policyTypes: [Ingress]}
";

fn is_tunnelled(fixture: &Fixture, from: &Pod, to: &Pod) {
    let before = fixture
        .mesh
        .metric("mesh_tls_handshakes_total", &[])
        .expect("metric");
    fixture.until(from, to, true);
    eventually("a tunnel", SOON, || {
        assert!(does_reach(from, to));
        let now = fixture.mesh.metric("mesh_tls_handshakes_total", &[]).ok()?;
        (now > before).then_some(())
    })
    .with_context(|| fixture.logs())
    .expect("tunnelled");
}

#[test]
fn object_changes_are_enforced_under_traffic() {
    let mut fixture = Fixture::open();
    let (a, near, b) = (
        fixture.mesh.pod("a"),
        fixture.mesh.pod("near"),
        fixture.mesh.pod("b"),
    );
    let servers = [&near, &b].map(|pod| serve(pod));

    // Both nodes report the namespace; then b is reached by a tunnel.
    let namespace = fixture
        .kube
        .get(["namespace", "default"])
        .expect("namespace");
    let uid = namespace["metadata"]["uid"].clone();
    for node in [1, 2] {
        let now = fixture.mesh_node(node, "the namespace reported", |status| {
            status["enrolledNamespaces"] == json!([uid])
        });
        assert_eq!(
            now["metadata"]["ownerReferences"][0]["kind"], "Node",
            "{now}"
        );
    }
    is_tunnelled(&fixture, &a, &b);
    fixture.until(&a, &near, true);

    let storm = storm(&a, &b);
    // A policy comes, changes, goes, and comes again under the same name.
    for _ in 0..2 {
        let before = Instant::now();
        fixture.kube.apply_text(DENY).expect("apply");
        fixture.until(&a, &near, false);
        println!("denied {:?} after apply began", before.elapsed());
        let open = DENY.replace("policyTypes: [Ingress]", "ingress: [{}]");
        fixture.kube.apply_text(&open).expect("apply");
        fixture.until(&a, &near, true);
        let policy = fixture.kube.get(["networkpolicy", "lock"]).expect("policy");
        fixture.mesh_node(1, "the policy in force", |status| {
            status["inForce"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|one| {
                    one["uid"] == policy["metadata"]["uid"]
                        && one["generation"] == policy["metadata"]["generation"]
                })
        });
        fixture
            .kube
            .kubectl(["delete", "networkpolicy", "lock"])
            .expect("delete");
    }
    // Pods come, go, and come again under the same name.
    for _ in 0..2 {
        let new = fixture.add("new", 2);
        let server = serve(&new);
        is_tunnelled(&fixture, &a, &new);
        drop(server);
        fixture.sandboxes.pop();
        fixture.remove("new");
        eventually("its interface to go", SOON, || {
            (!new.node().has_link(new.host_if()).expect("node")).then_some(())
        })
        .with_context(|| fixture.logs())
        .expect("gone");
    }
    // A pod that ended is known no more, though its object stays.
    let done = fixture.add("done", 1);
    fixture.mesh.settled().expect("adopted");
    tell_status(&fixture.kube, &done, "Succeeded").expect("status");
    eventually("a completed pod to be let go", SOON, || {
        let pods = fixture.mesh.agent(1).ask("/pods").ok()?;
        (!pods.to_string().contains(done.uid())).then_some(())
    })
    .with_context(|| fixture.logs())
    .expect("let go");
    unharmed(&storm);
    drop(servers);
}

#[test]
fn api_server_outage_keeps_policy_enforced() {
    let mut fixture = Fixture::open();
    let (a, near, b) = (
        fixture.mesh.pod("a"),
        fixture.mesh.pod("near"),
        fixture.mesh.pod("b"),
    );
    let _servers = [&near, &b].map(|pod| serve(pod));
    is_tunnelled(&fixture, &a, &b);
    fixture.kube.apply_text(DENY).expect("apply");
    fixture.until(&a, &near, false);
    let storm = storm(&a, &b);

    fixture.kube.kill_api_server().expect("kill");
    fixture.until_stale(true);
    assert!(!does_reach(&a, &near), "what is known stays in force");
    is_reached(&fixture, &a, &b);
    // What happened meanwhile is told in a list: the history is gone.
    let revision = fixture.kube.compact_etcd().expect("compact");
    println!("compacted at {revision}");
    fixture.kube.start_api_server().expect("start");
    fixture.until_stale(false);
    assert!(!does_reach(&a, &near), "a list is no reason to open");
    fixture
        .kube
        .kubectl(["delete", "networkpolicy", "lock"])
        .expect("delete");
    fixture.until(&a, &near, true);

    // One that answers nobody for a while.
    fixture.kube.pause_api_server(true).expect("pause");
    assert!(does_reach(&a, &near));
    std::thread::sleep(Duration::from_secs(3));
    fixture.kube.pause_api_server(false).expect("go on");
    fixture.kube.apply_text(DENY).expect("apply");
    fixture.until(&a, &near, false);

    // An agent that starts while there is none leaves what is pinned.
    fixture.kube.kill_api_server().expect("kill");
    let node = Arc::clone(fixture.mesh.node(1));
    let agent = fixture.mesh.agents.remove(0);
    drop(agent);
    let kubeconfig = fixture.kube.kubeconfig().to_owned();
    let config = config(&fixture.mesh, &kubeconfig).ready_within(Duration::from_secs(4));
    assert!(
        node.start_agent(config.clone()).is_err(),
        "nothing is known"
    );
    assert!(!does_reach(&a, &near), "what is pinned stays in force");
    fixture.kube.start_api_server().expect("start");
    let config = config.ready_within(Duration::from_secs(40));
    let agent = node.start_agent(config).expect("ready");
    fixture.mesh.agents.insert(0, agent);
    fixture.until(&a, &b, true);
    assert!(!does_reach(&a, &near));
    drop(storm);
}

fn is_reached(fixture: &Fixture, from: &Pod, to: &Pod) {
    assert!(does_reach(from, to), "{}", fixture.logs());
}

fn policy(name: &str, rule: &str, app: &str) -> String {
    format!(
        "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {{name: {name}, namespace: default}}
spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, ingress: [{rule}]}}
"
    )
}

#[test]
fn pod_without_netns_is_reported_as_unprotected() {
    let mut fixture = Fixture::open();
    let lost = fixture.add("lost", 1);
    fixture.mesh.settled().expect("adopted");
    let names = |status: &Value| status["unprotected"].to_string().contains(lost.uid());
    // One without a process, of which only the API server speaks.
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "nowhere", "namespace": "default"},
        "spec": {"nodeName": fixture.mesh.node(1).name(), "automountServiceAccountToken": false,
                 "containers": [{"name": "c", "image": "localhost/none:1"}]},
    });
    fixture.kube.apply_text(&object.to_string()).expect("apply");
    let status = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "nowhere", "namespace": "default"},
        "status": {"phase": "Running", "podIP": "10.99.0.9", "podIPs": [{"ip": "10.99.0.9"}]},
    });
    fixture
        .kube
        .apply_status(&status.to_string())
        .expect("status");
    let now = fixture.mesh_node(1, "the pod reported", |status| {
        status["unprotected"].to_string().contains("nowhere")
    });
    let reason = now["status"]["unprotected"][0]["reason"]
        .as_str()
        .expect("reason");
    assert!(reason.contains("no process of the pod"), "{reason}");
    assert!(!names(&now["status"]), "{now}");

    // The lab's links are named as Calico's: what Calico would drop is said, with what to add.
    let ports = DENY.replace(
        "policyTypes: [Ingress]",
        "ingress: [{ports: [{port: 7000}]}]",
    );
    fixture.kube.apply_text(&ports).expect("apply");
    let network = eventually("the rule to be named", SOON, || {
        let network = fixture.mesh.agent(1).ask("/status").ok()?["network"].clone();
        network["blocks"][0].is_object().then_some(network)
    })
    .with_context(|| fixture.logs())
    .expect("named");
    assert_eq!(network["cni"]["name"], "Calico", "{network}");
    assert_eq!(
        network["blocks"][0]["object"], "NetworkPolicy default/lock",
        "{network}"
    );
    assert_eq!(
        network["blocks"][0]["add"], "{protocol: TCP, port: 15008}",
        "{network}"
    );
}

#[test]
fn crds_installed_later_are_watched() {
    let lab = Lab::builder(Topology::Routed).build().expect("lab");
    let kube = Kube::builder().start_in(&lab).expect("API server");
    let kubeconfig = kube.kubeconfig().to_owned();
    let fixture = Fixture::with(kube, lab, &kubeconfig);
    let status = fixture.mesh.agent(1).ask("/status").expect("status");
    assert!(
        status["source"]["absent"]
            .to_string()
            .contains("MeshPolicy"),
        "{status}"
    );
    let (a, near) = (fixture.mesh.pod("a"), fixture.mesh.pod("near"));
    let _server = serve(&near);
    fixture.until(&a, &near, true);
    install_crds(&fixture.kube);
    fixture
        .kube
        .apply_text(&policy("all", "{from: [{entities: [world]}]}", "near"))
        .expect("apply");
    eventually("the policy", Duration::from_secs(60), || {
        (!does_reach(&a, &near)).then_some(())
    })
    .with_context(|| fixture.logs())
    .expect("in force");
    fixture.mesh_node(2, "a report", |status| status["version"].is_string());
}

/// Denies ingress of the pod `a`.
const DENY_A: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: shut}
spec:
  tier: Admin
  priority: 10
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: a}}}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
";

/// Serves the first version of a kind, or another one in its place, as an upgrade of a CRD does.
fn serve_first_version(kube: &Kube, crd: &str, served: bool) {
    let patch = if served {
        json!([{"op": "replace", "path": "/spec/versions/0/served", "value": true}])
    } else {
        let schema = json!({"openAPIV3Schema": any_schema()});
        let other = json!({"name": "v9", "served": true, "storage": false, "schema": schema});
        json!([
            {"op": "add", "path": "/spec/versions/-", "value": other},
            {"op": "replace", "path": "/spec/versions/0/served", "value": false},
        ])
    };
    patch_crd(kube, crd, &patch);
}

#[test]
fn objects_of_a_version_no_longer_served_stay_in_force() {
    let mut fixture = Fixture::open();
    let (a, near) = (fixture.mesh.pod("a"), fixture.mesh.pod("near"));
    let _servers = [&near, &a].map(|pod| serve(pod));
    let shut = policy("shut", "{from: [{entities: [world]}]}", "near");
    for object in [&*shut, DENY_A] {
        fixture.kube.apply_text(object).expect("apply");
    }
    let closed = |fixture: &Fixture| {
        assert!(!does_reach(&a, &near), "MeshPolicy: {}", fixture.logs());
        assert!(
            !does_reach(&near, &a),
            "ClusterNetworkPolicy: {}",
            fixture.logs()
        );
    };
    fixture.until(&a, &near, false);
    fixture.until(&near, &a, false);
    let crds = [
        "meshpolicies.mesh.rs",
        "clusternetworkpolicies.policy.networking.k8s.io",
    ];
    for crd in crds {
        serve_first_version(&fixture.kube, crd, false);
    }
    let told = |fixture: &Fixture| {
        eventually("both kinds to be reported", Duration::from_secs(60), || {
            let status = fixture.mesh.agent(1).ask("/status").ok()?;
            let stale = status["source"]["stale"].as_str()?.to_owned();
            let kinds = ["ClusterNetworkPolicy", "MeshPolicy", "no longer serves"];
            kinds.iter().all(|kind| stale.contains(kind)).then_some(())
        })
        .with_context(|| fixture.logs())
        .expect("reported");
        closed(fixture);
    };
    told(&fixture);
    // An agent that starts meanwhile has the objects of the earlier run.
    let agent = &mut fixture.mesh.agents[0];
    agent.kill_9().expect("kill");
    agent.start_again().expect("ready");
    told(&fixture);
    for crd in crds {
        serve_first_version(&fixture.kube, crd, true);
    }
    fixture.until_stale(false);
    closed(&fixture);
    for kind in [
        "meshpolicies.v1alpha1.mesh.rs",
        "clusternetworkpolicies.v1alpha2.policy.networking.k8s.io",
    ] {
        let delete = ["delete", kind, "shut"];
        fixture.kube.kubectl(delete).expect("delete");
    }
    fixture.until(&a, &near, true);
    fixture.until(&near, &a, true);
}

/// The RBAC permissions of an agent in this test.
const RIGHTS: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: agent}
rules:
- {apiGroups: [""], resources: [pods, namespaces, nodes, services], verbs: [get, list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
- {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [list, watch]}
- {apiGroups: [policy.networking.k8s.io], resources: [clusternetworkpolicies], verbs: [list, watch]}
- {apiGroups: [mesh.rs], resources: ["*"], verbs: [list, watch]}
- {apiGroups: [mesh.rs], resources: [meshnodes, meshnodes/status], verbs: [get, create, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: agent}
subjects: [{kind: ServiceAccount, namespace: mesh-system, name: agent}]
"#;

#[test]
fn replaced_service_account_token_is_used() {
    let lab = Lab::builder(Topology::Routed).build().expect("lab");
    let kube = Kube::builder().start_in(&lab).expect("API server");
    install_crds(&kube);
    kube.namespace("mesh-system", &[]).expect("namespace");
    kube.service_account("mesh-system", "agent")
        .expect("account");
    kube.apply_text(RIGHTS).expect("RBAC");
    let account = ("mesh-system", "agent");
    let token = kube.token(account, None, None).expect("token");
    let kubeconfig = kube.token_kubeconfig("agent", &token).expect("kubeconfig");
    let mut fixture = Fixture::with(kube, lab, &kubeconfig);
    let (a, near) = (fixture.mesh.pod("a"), fixture.mesh.pod("near"));
    let _server = serve(&near);
    fixture.until(&a, &near, true);
    fixture.mesh_node(1, "a report", |status| status["version"].is_string());

    // The old token is worth nothing any more; the watches that it opened end.
    let delete = ["delete", "serviceaccount", "agent", "-n", "mesh-system"];
    fixture.kube.kubectl(delete).expect("delete");
    fixture
        .kube
        .service_account("mesh-system", "agent")
        .expect("account");
    fixture.kube.kill_api_server().expect("kill");
    fixture.kube.start_api_server().expect("start");
    fixture.kube.apply_text(DENY).expect("apply");
    fixture.until_stale(true);
    assert!(does_reach(&a, &near), "nobody told the agent");
    let token = fixture.kube.token(account, None, None).expect("token");
    fixture
        .kube
        .token_kubeconfig("agent", &token)
        .expect("replaced");
    // Token files are read again after a minute at the latest.
    eventually("the new token to be used", Duration::from_secs(100), || {
        (!does_reach(&a, &near)).then_some(())
    })
    .with_context(|| fixture.logs())
    .expect("used");
    fixture.until_stale(false);
}

/// Half a second of changes that come faster than reports may be written.
#[test]
fn status_reports_are_aggregated() {
    let fixture = Fixture::open();
    let reports = |fixture: &Fixture| {
        let now = fixture.mesh_node(1, "a report", |status| status["version"].is_string());
        now["metadata"]["managedFields"].to_string() + &now["status"].to_string()
    };
    // What the probing of the kernel found comes after the first report.
    fixture.mesh_node(1, "features", |status| status["features"].is_array());
    let watch = ["get", "meshnode", "node1", "--watch-only", "-o", "name"];
    let watch = fixture.kube.kubectl_cmd(watch).expect("kubectl");
    let watch = fixture.kube.host().spawn_lines(watch).expect("watch");
    let start = Instant::now();
    let mut changes = 0;
    while start.elapsed() < Duration::from_secs(6) {
        changes += 1;
        let policy = policy(&format!("p{changes}"), "{}", "nobody");
        fixture.kube.apply_text(&policy).expect("apply");
    }
    let last = format!("p{changes}");
    fixture.mesh_node(1, "the last policy", |status| {
        status["inForce"]
            .to_string()
            .contains(&format!("\"{last}\""))
    });
    let seconds = start.elapsed().as_secs() + 1;
    let mut writes = 0;
    while let Ok(Some(_)) = watch.line(Duration::from_secs(2)) {
        writes += 1;
    }
    println!("{changes} changes in {seconds} s: {writes} writes");
    assert!(
        writes >= 1 && writes <= seconds + 1,
        "{writes} in {seconds} s"
    );
    // Nothing changes, nothing is written.
    let before = reports(&fixture);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(before, reports(&fixture));
}
