// SPDX-License-Identifier: Apache-2.0
//! Changes under traffic: pods that are added and deleted, reused addresses, and invalid objects.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use mesh_test::mesh::{ENROLLED, TUNNEL_PORT};
use mesh_test::reports::Storm;
use mesh_test::{Agent, Lab, Mesh, Pod, PodSpec, Topology, eventually};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

/// `a` on node 1, `b` on node 2.
fn lab(topology: Topology) -> Lab {
    Lab::builder(topology)
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab")
}

/// Waits until `from` reaches `to` at every address; what is refused meanwhile must be refused
/// within the time that an agent waits for a starting peer.
fn reached(mesh: &Mesh, from: &Pod, to: &Pod, port: u16) {
    for to in to.all_at(port) {
        let answer = eventually("an answer", SOON, || {
            let report = from.tcp(&format!("--to {to}")).expect("report");
            (report.ok && report.ends_agree()).then_some(())
        });
        let logs = || [1, 2].map(|node| mesh.agent(node).log_tail()).join("\n");
        answer
            .with_context(|| format!("{to}: {}", logs()))
            .expect("reached");
    }
}

/// Nothing in clear from the first moment, also not to addresses that nobody knows yet.
const REQUIRED: &str = "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: default, namespace: mesh-system}
spec: {mtls: Strict, outbound: Required}
";

#[test]
fn pods_are_added_and_deleted_under_traffic() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let lab = lab(topology);
        lab.apply_text("required", REQUIRED).expect("apply");
        let mut mesh = Mesh::start(lab).expect("mesh");
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let near = mesh.add_pod(PodSpec::new("near", 1)).expect("pod");
        let servers = [&b, &near].map(|pod| pod.serve("--tcp [::]:7000").expect("server"));
        reached(&mesh, &a, &b, 7000);
        reached(&mesh, &a, &near, 7000);
        let capture = mesh.capture_wire().expect("capture");
        let storms = [&b, &near].map(|pod| {
            let to: Vec<String> = pod
                .all_at(7000)
                .iter()
                .map(|to| format!("--to {to}"))
                .collect();
            let line = format!("storm {} --seconds 8 --pause-us 1000", to.join(" "));
            a.start_probe(&line).expect("storm")
        });
        for round in 0..3 {
            let mut names = Vec::new();
            for node in 1..=2 {
                let name = format!("new{node}");
                // The same names and addresses in each round, in pods that are others.
                let spec = PodSpec::new(&name, node).host_number(99);
                let pod = mesh.add_pod(spec).expect("pod");
                let line = format!("--tcp [::]:7000 --name round{round}");
                let server = pod.serve(&line).expect("server");
                reached(&mesh, &a, &pod, 7000);
                reached(&mesh, &b, &pod, 7000);
                let report = a
                    .tcp(&format!("--to {}", pod.all_at(7000)[0]))
                    .expect("report");
                let identity = report.identity.expect("identity");
                assert_eq!(identity.name, format!("round{round}"));
                names.push((name, server));
            }
            for (name, server) in names {
                drop(server);
                let gone = mesh.delete_pod(&name).expect("delete");
                eventually("its namespace to go", Duration::from_secs(1), || {
                    (!gone.node().has_link(gone.host_if()).expect("node")).then_some(())
                })
                .unwrap_or_else(|e| panic!("{e:#}: {}", mesh.agent_of(&gone).log_tail()));
            }
        }
        for (storm, what) in storms.iter().zip(["across", "same node"]) {
            let report = Storm::of(storm).expect("report");
            let what = format!("{topology:?} {what}: {report:?}");
            assert!(report.ok > 1000, "{what}");
            assert_eq!((report.wrong, report.failed), (0, 0), "{what}");
        }
        let seen = capture.stop().expect("stop");
        assert_eq!(seen.tcp_service_ports(), [TUNNEL_PORT], "{topology:?}");
        drop(servers);
    }
}

/// Allows only pods labeled `app: good` to reach the server.
const ONLY_GOOD: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-good, namespace: default}
spec:
  podSelector: {matchLabels: {app: b}}
  policyTypes: [Ingress]
  ingress:
    - from: [{podSelector: {matchLabels: {app: good}}}]
";

#[test]
fn reused_address_does_not_inherit_identity() {
    for node in [1, 2] {
        let mut mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
        let b = mesh.pod("b");
        let mut server = b.serve("--tcp [::]:7000 --report").expect("server");
        mesh.apply_text("only-good", ONLY_GOOD).expect("apply");
        // Who was never good is refused: the policy is in force before the first good one comes.
        let a = mesh.pod("a");
        eventually("the policy to be in force", SOON, || {
            let refused = |to: &SocketAddr| {
                !a.tcp(&format!("--to {to} --timeout-ms 1000"))
                    .expect("report")
                    .ok
            };
            b.all_at(7000).iter().all(refused).then_some(())
        })
        .expect("in force");
        for _round in 0..2 {
            let good = PodSpec::new("good", node).host_number(77);
            let good = mesh.add_pod(good).expect("pod");
            reached(&mesh, &good, &b, 7000);
            // One connection stays open while its pod is deleted.
            let line = format!("hold --to {} --count 1 --pulse-ms 20", b.all_at(7000)[0]);
            let client = good.start_probe(&line).expect("client");
            let opened = client.line(SOON).expect("line").expect("open");
            assert!(opened.contains("open"), "{opened}");
            let gone = mesh.delete_pod("good").expect("delete");
            drop(client);
            // At once, before anybody may have noticed.
            let bad = PodSpec::new("bad", node).host_number(77);
            let bad = mesh.add_pod(bad).expect("pod");
            assert_eq!(bad.addresses(), gone.addresses());
            server.kill().expect("kill");
            server = b.serve("--tcp [::]:7000 --report").expect("server");
            for _attempt in 0..20 {
                for to in b.all_at(7000) {
                    let report = bad
                        .tcp(&format!("--to {to} --timeout-ms 1000"))
                        .expect("report");
                    assert!(!report.ok && report.identity.is_none(), "{report:?}");
                }
            }
            eventually("its namespace to go", Duration::from_secs(1), || {
                (!gone.node().has_link(gone.host_if()).expect("node")).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e:#}: {}", mesh.agent_of(&gone).log_tail()));
            // The server saw nothing of all that.
            server
                .line(Duration::from_millis(200))
                .expect_err("nobody was let in");
            mesh.delete_pod("bad").expect("delete");
        }
    }
}

/// Returns the current rejections of the agent: object and field.
fn rejections(agent: &Agent) -> Vec<(String, String)> {
    let status = agent.ask("/status").expect("status");
    let list = status["rejections"].as_array().expect("a list").clone();
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::Array(_)
        | Value::Object(_)) => other.to_string(),
    };
    list.iter()
        .map(|rejection| (text(&rejection["object"]), text(&rejection["field"])))
        .collect()
}

fn rejected(mesh: &Mesh, name: &str, field: &str) {
    for agent in &mesh.agents {
        let named = || {
            let all = rejections(agent);
            let is = |(object, at): &(String, String)| object.contains(name) && at.contains(field);
            all.iter().any(is).then_some(())
        };
        eventually("the rejection", SOON, named)
            .with_context(|| format!("{:?}", rejections(agent)))
            .expect("rejected");
    }
}

#[test]
fn invalid_object_is_rejected_and_others_stay_enforced() {
    let mut lab = lab(Topology::Routed);
    lab.add_pod(PodSpec::new("good", 1)).expect("pod");
    let mesh = Mesh::start(lab).expect("mesh");
    let [a, b, good] = ["a", "b", "good"].map(|name| mesh.pod(name));
    let _servers = [&a, &b].map(|pod| pod.serve("--tcp [::]:7000").expect("server"));
    let is_refused = |from: &Pod, to: &Pod| {
        to.all_at(7000).iter().all(|to| {
            !from
                .tcp(&format!("--to {to} --timeout-ms 1000"))
                .expect("report")
                .ok
        })
    };
    let refused = |from: &Pod, to: &Pod, what: &str| {
        eventually(what, SOON, || is_refused(from, to).then_some(())).expect(what);
    };
    reached(&mesh, &a, &b, 7000);
    mesh.apply_text("only-good", ONLY_GOOD).expect("apply");
    refused(&a, &b, "the policy to be in force");
    reached(&mesh, &good, &b, 7000);

    // A change that is rejected: the last good version stays.
    let broken = ONLY_GOOD.replace(
        "app: good}}",
        "app: good}, matchExpressions: [{key: x, operator: Sometimes}]}",
    );
    assert_ne!(broken, ONLY_GOOD);
    mesh.apply_text("only-good", &broken).expect("apply");
    rejected(&mesh, "only-good", "operator");
    assert!(is_refused(&a, &b));
    reached(&mesh, &good, &b, 7000);

    // A new policy that is rejected isolates whom it selects, and nobody else.
    let new = broken
        .replace("only-good", "newcomer")
        .replace("app: b", "app: a");
    mesh.apply_text("newcomer", &new).expect("apply");
    rejected(&mesh, "newcomer", "operator");
    refused(&good, &a, "the broken policy to isolate");
    reached(&mesh, &good, &b, 7000);

    // A file that does not parse keeps its last good objects.
    mesh.apply_text("only-good", "kind: [").expect("apply");
    rejected(&mesh, "only-good.yaml", "");
    assert!(is_refused(&a, &b));
    reached(&mesh, &good, &b, 7000);

    // All is well again when all is mended.
    mesh.apply_text("only-good", ONLY_GOOD).expect("apply");
    mesh.withdraw("newcomer").expect("withdraw");
    for agent in &mesh.agents {
        let none = || rejections(agent).is_empty().then_some(());
        eventually("no rejection", SOON, none)
            .unwrap_or_else(|e| panic!("{e:#}: {:?}", rejections(agent)));
    }
    reached(&mesh, &good, &a, 7000);
    assert!(is_refused(&a, &b));
    mesh.withdraw("only-good").expect("withdraw");
    reached(&mesh, &a, &b, 7000);
}
