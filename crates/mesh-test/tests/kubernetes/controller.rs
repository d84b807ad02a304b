// SPDX-License-Identifier: Apache-2.0
//! The controller on a real API server: status of policies, write permissions, and leader election.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use mesh_test::kube::Bound;
use mesh_test::kube::controller::{Controller, NAMESPACE};
use mesh_test::{Kube, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn kube() -> Kube {
    let kube = Kube::builder().start().expect("servers");
    kube.prepare_controller().expect("CRDs, roles, policies");
    kube.namespace("shop", &[]).expect("namespace");
    kube
}

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "mesh.rs/v1alpha1", "kind": kind,
        "metadata": {"name": name}, "spec": spec,
    });
    if !kind.starts_with("Cluster") {
        object["metadata"]["namespace"] = json!("shop");
    }
    object
}

/// A node with what it reports.
fn report(kube: &Kube, node: &str, in_force: &[(&str, i64)], rejected: &[(&str, i64, &str)]) {
    let version = |uid: &str, generation: i64| json!({"kind": "MeshPolicy", "namespace": "shop", "name": "p", "uid": uid, "generation": generation});
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
    kube.apply_text(&object.to_string()).expect("node");
    let head = json!({
        "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshNode",
        "metadata": {"name": node}, "spec": {},
    });
    kube.apply_text(&head.to_string()).expect("MeshNode");
    let mut report = head;
    report["status"] = json!({
        "version": "1",
        "inForce": in_force.iter().map(|(uid, generation)| version(uid, *generation)).collect::<Vec<_>>(),
        "rejections": rejected.iter().map(|(uid, generation, field)| {
            json!({"object": version(uid, *generation), "field": field, "message": "is wrong"})
        }).collect::<Vec<_>>(),
    });
    kube.apply_status(&report.to_string()).expect("status");
}

fn uid(kube: &Kube, name: &str) -> String {
    let policy = kube
        .get(["meshpolicy", name, "-n", "shop"])
        .expect("policy");
    policy["metadata"]["uid"]
        .as_str()
        .expect("a UID")
        .to_owned()
}

/// Waits until a policy's status says that.
fn says(kube: &Kube, nodes: &str, accepted: &str, in_force: &str) {
    let condition = |policy: &Value, kind: &str| {
        let all = policy["status"]["conditions"].as_array().cloned();
        let one = all
            .unwrap_or_default()
            .into_iter()
            .find(|one| one["type"] == kind);
        let one = one.unwrap_or_default();
        format!(
            "{} {}",
            one["status"].as_str().unwrap_or("-"),
            one["message"].as_str().unwrap_or("-")
        )
    };
    kube.until(SOON, &["meshpolicy", "p", "-n", "shop"], |policy| {
        policy["status"]["nodes"] == nodes
            && condition(policy, "Accepted") == accepted
            && condition(policy, "InForce") == in_force
    })
    .expect(in_force);
}

#[test]
fn policy_conditions_follow_node_reports() {
    let kube = kube();
    let policy = |priority: &str| {
        let spec = json!({"podSelector": {"matchLabels": {"v": priority}}, "ingress": []});
        kube.apply_text(&object("MeshPolicy", "p", &spec).to_string())
            .expect("policy");
    };
    policy("1");
    let controller = kube
        .controller("a", HERE, &["--lease", "3s"])
        .expect("controller");
    says(
        &kube,
        "0/0",
        "Unknown no node runs an agent",
        "Unknown no node runs an agent",
    );
    let uid = uid(&kube, "p");

    let good = "True every field can be used";
    for node in ["n1", "n2", "n3"] {
        report(&kube, node, &[(&uid, 1)], &[]);
    }
    says(&kube, "3/3", good, "True in force on 3 of 3 nodes");
    policy("2");
    says(
        &kube,
        "0/3",
        "Unknown no node has reported on this version yet",
        "False in force on 0 of 3 nodes; waiting for n1, n2, n3",
    );
    report(&kube, "n1", &[(&uid, 2)], &[]);
    report(&kube, "n2", &[(&uid, 2)], &[]);
    says(
        &kube,
        "2/3",
        good,
        "False in force on 2 of 3 nodes; waiting for n3",
    );
    report(&kube, "n3", &[(&uid, 1)], &[(&uid, 2, "spec.x")]);
    says(
        &kube,
        "2/3",
        "False spec.x: is wrong",
        "False in force on 2 of 3 nodes; rejected by n3",
    );
    // A node that is gone counts no more, and its report goes with it.
    kube.kubectl(["delete", "node", "n3"]).expect("delete");
    says(&kube, "2/2", good, "True in force on 2 of 2 nodes");
    eventually("the report to go", SOON, || {
        kube.get(["meshnode", "n3"]).is_err().then_some(())
    })
    .expect("gone");

    writes_are_few(&kube, &controller);
}

/// Nothing without a change, and many changes one after the other.
fn writes_are_few(kube: &Kube, controller: &Controller) {
    let writes = || {
        let name = "mesh_controller_status_writes_total";
        controller.metric(kube, name, &[]).expect("metric")
    };
    let version = || {
        kube.get(["meshpolicy", "p", "-n", "shop"]).expect("get")["metadata"]["resourceVersion"]
            .clone()
    };
    let (count, before) = (writes(), version());
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(3) {
        assert!((writes() - count).abs() < 0.5, "nothing changed");
    }
    assert_eq!(version(), before);

    // Many changes at once are written one after the other, each once.
    let many: Vec<String> = (0..60)
        .map(|n| object("MeshPolicy", &format!("q{n}"), &json!({"ingress": []})).to_string())
        .collect();
    let begun = Instant::now();
    kube.apply_text(&many.join("\n---\n")).expect("policies");
    let done = |list: &Value| {
        let all = list["items"].as_array().cloned().unwrap_or_default();
        all.len() == 61 && all.iter().all(|one| one["status"]["nodes"].is_string())
    };
    kube.until(SOON, &["meshpolicy", "-n", "shop"], done)
        .expect("all have a status");
    let rate = (writes() - count) / begun.elapsed().as_secs_f64();
    assert!(rate < 21.0, "{rate} writes a second");
    assert!(
        writes() - count < 75.0,
        "{} writes for 60 policies",
        writes() - count
    );
}

/// Allows more than agents have: what is refused then is refused by admission.
const TOO_MUCH: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: too-much}
rules: [{apiGroups: ["mesh.rs"], resources: ["*"], verbs: ["*"]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: too-much}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: too-much}
subjects: [{kind: ServiceAccount, name: mesh-agent, namespace: mesh-system}]
"#;

/// Nodes n1 and n2, with a pod of the agents on each.
fn agents_pods(kube: &Kube) {
    for node in ["n1", "n2"] {
        let pod = format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}\n---\n\
             {{apiVersion: v1, kind: Pod, metadata: {{name: agent-{node}, namespace: {NAMESPACE}}}, \
             spec: {{nodeName: {node}, serviceAccountName: mesh-agent, containers: [{{name: c, image: none}}]}}}}"
        );
        kube.apply_text(&pod).expect("node and pod");
    }
}

#[test]
fn agent_token_may_write_only_its_own_node_status() {
    let kube = kube();
    kube.apply_text(TOO_MUCH).expect("role");
    agents_pods(&kube);
    let spec = json!({"ingress": []});
    kube.apply_text(&object("MeshPolicy", "p", &spec).to_string())
        .expect("policy");
    let agent = |name: &str, bound| {
        let token = kube
            .token((NAMESPACE, "mesh-agent"), None, bound)
            .expect("token");
        kube.token_kubeconfig(name, &token).expect("kubeconfig")
    };
    let n1 = agent("n1", Some(Bound::Pod("agent-n1")));
    let unbound = agent("unbound", None);
    let apply = |config: &std::path::Path, object: &Value, status: bool| {
        let mut command = kube
            .kubectl_as(
                config,
                ["apply", "--server-side", "--force-conflicts", "-f", "-"],
            )
            .expect("kubectl");
        if status {
            command = command.args(["--subresource=status"]);
        }
        let output = kube
            .host()
            .run(command.input(object.to_string()), SOON)
            .expect("it ends");
        (output.status.success(), output.to_string())
    };
    let node = |name: &str| {
        json!({
            "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshNode", "metadata": {"name": name},
            "spec": {}, "status": {"version": "1"},
        })
    };
    let own = node("n1");
    let refused = |config: &std::path::Path, object: &Value, status: bool, why: &str| {
        let (done, said) = apply(config, object, status);
        assert!(!done && said.contains(why), "{why}: {said}");
    };
    // Admission policies count a moment after they were made.
    eventually("the policies to count", SOON, || {
        (!apply(&n1, &node("n2"), false).0).then_some(())
    })
    .expect("refused");
    kube.kubectl(["delete", "meshnode", "n2", "--ignore-not-found"])
        .expect("delete");

    let (done, said) = apply(&n1, &own, false);
    assert!(done, "{said}");
    let (done, said) = apply(&n1, &own, true);
    assert!(done, "{said}");
    refused(
        &n1,
        &node("n2"),
        false,
        "may write its own MeshNode only, not n2",
    );
    kube.apply_text(&node("n2").to_string())
        .expect("by its own agent");
    refused(
        &n1,
        &node("n2"),
        true,
        "may write its own MeshNode only, not n2",
    );
    refused(&unbound, &own, true, "not bound to a node");
    let mut policy = object("MeshPolicy", "p", &spec);
    policy["status"] = json!({"nodes": "3/3"});
    refused(&n1, &policy, true, "their status is the controller's");
    policy["spec"] = json!({"action": "Deny", "ingress": [{}]});
    refused(&n1, &policy, false, "their status is the controller's");
    let delete = kube
        .kubectl_as(&n1, ["delete", "meshnode", "n2"])
        .expect("kubectl");
    let output = kube.host().run(delete, SOON).expect("it ends");
    assert!(!output.status.success(), "{output}");
}

#[test]
fn standby_replica_takes_over_leadership() {
    let kube = kube();
    let flags = ["--lease", "3s"];
    let mut a = kube.controller("a", HERE, &flags).expect("a");
    let mut b = kube.controller("b", HERE, &flags).expect("b");
    assert!(a.leads(&kube).expect("a") && !b.leads(&kube).expect("b"));
    let spec = json!({"ingress": []});
    kube.apply_text(&object("MeshPolicy", "p", &spec).to_string())
        .expect("policy");
    let nobody = "Unknown no node runs an agent";
    says(&kube, "0/0", nobody, nobody);
    let writes = b.metric(&kube, "mesh_controller_status_writes_total", &[]);
    assert!(
        writes.expect("metric") < 0.5,
        "who does not lead writes nothing"
    );

    // Killed: another leads when the lease has ended, and goes on.
    a.process().kill().expect("kill");
    let begun = Instant::now();
    eventually("b to lead", SOON, || {
        b.leads(&kube).ok().filter(|leads| *leads)
    })
    .expect("b leads");
    assert!(
        begun.elapsed() > Duration::from_secs(1),
        "not while the lease holds"
    );
    report(&kube, "n1", &[(&uid(&kube, "p"), 1)], &[]);
    says(
        &kube,
        "1/1",
        "True every field can be used",
        "True in force on 1 of 1 nodes",
    );

    // Told to end it lets go at once.
    let a = kube.controller("a", HERE, &flags).expect("a again");
    assert!(!a.leads(&kube).expect("a"));
    b.process().signal(libc::SIGTERM).expect("SIGTERM");
    let status = b.process().wait(SOON).expect("it ends");
    assert!(status.success(), "{status}");
    let lease = kube
        .get(["lease", "mesh-controller", "-n", NAMESPACE])
        .expect("lease");
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
    assert!(matches!(holder, "" | "a"), "{holder}");
    eventually("a to lead", SOON, || {
        a.leads(&kube).ok().filter(|leads| *leads)
    })
    .expect("a leads");
}
