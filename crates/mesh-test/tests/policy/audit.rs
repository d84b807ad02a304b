// SPDX-License-Identifier: Apache-2.0
//! Policies in audit mode: each denial passes and is reported once, at the kernel's hooks and behind a
//! tunnel; enforced, the same policies deny exactly these connections.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::{Tcp, Udp};
use mesh_test::{Lab, Mesh, Pod, PodSpec, Topology, eventually};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 7000;
/// Nothing listens here.
const CLOSED: u16 = 7009;

/// The server takes nothing but from `near`; the client sends nothing to its own node.
const POLICIES: &str = "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: server, namespace: default}
spec:
  podSelector: {matchLabels: {app: server}}
  mode: MODE
  ingress: [{from: [{podSelector: {matchLabels: {app: near}}}]}]
---
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: client, namespace: default}
spec:
  podSelector: {matchLabels: {app: client}}
  mode: MODE
  action: Deny
  egress: [{to: [{podSelector: {matchLabels: {app: neighbour}}}]}]
";

const SERVER: &str = "MeshPolicy default/server";
const CLIENT: &str = "MeshPolicy default/client egress[0]";

fn mesh() -> Mesh {
    let pods = [("client", 1), ("neighbour", 1), ("near", 2), ("server", 2)];
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pods(pods.map(|(name, node)| PodSpec::new(name, node).label("app", name)))
        .pod(PodSpec::new("plain", 1).namespace("plain"))
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

fn tcp(from: &Pod, to: SocketAddr) -> Tcp {
    let output = from.probe(&format!("tcp --to {to}")).expect("run");
    output.json().expect("report")
}

fn udp(from: &Pod, to: SocketAddr, connected: &str) -> Udp {
    let line = format!("udp --to {to} {connected} --count 3 --timeout-ms 500");
    from.probe(&line).expect("run").json().expect("report")
}

/// Returns the audited pairs of pods, each with protocol, rule and number of records.
type Audits = BTreeMap<(String, String, String, String), usize>;

fn audits(mesh: &Mesh) -> Audits {
    let mut audits = Audits::new();
    for agent in &mesh.agents {
        for record in agent.flows().expect("flows") {
            if record["kind"] != "audit" {
                continue;
            }
            assert_eq!(record["verdict"], "allowed", "{record:#}");
            let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
            let key = (
                text(&record["source"]["workload"]),
                text(&record["destination"]["workload"]),
                text(&record["protocol"]),
                text(&record["rule"]),
            );
            *audits.entry(key).or_default() += 1;
        }
    }
    audits
}

fn expected(rows: &[(&str, &str, &str, &str, usize)]) -> Audits {
    rows.iter()
        .map(|(from, to, protocol, rule, count)| {
            let key = [from, to, protocol, rule].map(|text| (*text).to_owned());
            let [from, to, protocol, rule] = key;
            ((from, to, protocol, rule), *count)
        })
        .collect()
}

/// Everybody talks to whom they can; what came about, by name.
fn talk(mesh: &Mesh) -> BTreeMap<&'static str, bool> {
    let pod = |name: &str| mesh.pod(name);
    let (client, plain, near) = (pod("client"), pod("plain"), pod("near"));
    let (server, neighbour) = (pod("server"), pod("neighbour"));
    let all = |results: Vec<bool>| {
        assert!(
            results.windows(2).all(|two| two[0] == two[1]),
            "the families differ"
        );
        results[0]
    };
    let tcp_to = |from: &Pod, to: &Pod| all(to.at(PORT).map(|to| tcp(from, to).ok).to_vec());
    let udp_to = |from: &Pod, to: &Pod, how: &str| {
        all(to
            .at(PORT)
            .map(|to| udp(from, to, how).received == 3)
            .to_vec())
    };
    for to in server.at(CLOSED) {
        assert!(!tcp(&plain, to).ok, "nothing listens");
    }
    BTreeMap::from([
        ("through a tunnel", tcp_to(&client, &server)),
        ("in clear", tcp_to(&plain, &server)),
        ("as meant", tcp_to(&near, &server)),
        ("on one node", tcp_to(&client, &neighbour)),
        ("udp, one socket for each", udp_to(&client, &server, "")),
        ("udp, connected", udp_to(&client, &server, "--connected")),
        ("udp, as meant", udp_to(&near, &server, "")),
        (
            "udp, on one node",
            udp_to(&client, &neighbour, "--connected"),
        ),
    ])
}

#[test]
fn audit_reports_and_allows_what_enforcement_denies() {
    let mesh = mesh();
    let line = format!("--tcp [::]:{PORT} --udp [::]:{PORT}");
    let _servers = ["server", "neighbour"].map(|name| mesh.pod(name).serve(&line).expect("server"));
    let before = talk(&mesh);
    assert!(before.values().all(|ok| *ok), "{before:?}");
    assert_eq!(audits(&mesh), Audits::new(), "there is no policy yet");

    mesh.enforce(&POLICIES.replace("MODE", "Audit"))
        .expect("in force");
    let audited = talk(&mesh);
    assert_eq!(audited, before, "audit refuses nothing");
    // Two families each; UDP twice. The refusal of the closed port is the application's.
    let wanted = expected(&[
        ("client", "server", "tcp", SERVER, 2),
        ("plain", "server", "tcp", SERVER, 4),
        ("client", "server", "udp", SERVER, 4),
        ("client", "neighbour", "tcp", CLIENT, 2),
        ("client", "neighbour", "udp", CLIENT, 2),
    ]);
    eventually("all to be recorded", SOON, || {
        let seen: usize = audits(&mesh).values().sum();
        (seen >= wanted.values().sum()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:#?}", audits(&mesh)));
    assert_eq!(audits(&mesh), wanted);
    for (rule, labels) in [(SERVER, "ingress"), (CLIENT, "egress")] {
        let labels = [("direction", labels), ("rule", rule)];
        let count = mesh
            .metric("mesh_policy_audit_total", &labels)
            .expect("metric");
        let of_rule = wanted.iter().filter(|((.., of), _)| of == rule);
        let wanted: usize = of_rule.map(|(_, count)| count).sum();
        assert_eq!(count.to_string(), wanted.to_string(), "{rule}");
    }

    mesh.enforce(&POLICIES.replace("MODE", "Enforce"))
        .expect("in force");
    let enforced = talk(&mesh);
    let meant = |name: &&str| name.contains("as meant");
    for (name, passes) in &enforced {
        assert_eq!(*passes, meant(name), "{name}");
    }
    assert_eq!(audits(&mesh), wanted, "enforced policies are not audited");
}

#[test]
fn unconnected_udp_socket_is_audited_once_per_flow() {
    let mesh = mesh();
    let (client, neighbour) = (mesh.pod("client"), mesh.pod("neighbour"));
    let _server = neighbour
        .serve(&format!("--udp [::]:{PORT}"))
        .expect("server");
    mesh.enforce(&POLICIES.replace("MODE", "Audit"))
        .expect("in force");
    let to = neighbour.at(PORT)[0];
    let line = format!("udp --to {to} --count 50 --timeout-ms 500");
    let report: Udp = client.probe(&line).expect("run").json().expect("report");
    assert_eq!(report.received, 50, "{report:?}");
    eventually("it to be recorded", SOON, || {
        (!audits(&mesh).is_empty()).then_some(())
    })
    .expect("recorded");
    let wanted = expected(&[("client", "neighbour", "udp", CLIENT, 1)]);
    assert_eq!(audits(&mesh), wanted);
}
