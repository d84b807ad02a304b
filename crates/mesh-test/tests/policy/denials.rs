// SPDX-License-Identifier: Apache-2.0
//! Denials as clients see them: reset or dropped, by the agent's setting and the namespace's label, for
//! incoming and outgoing connections.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::{Tcp, Udp};
use mesh_test::{AgentConfig, Host, Lab, Mesh, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(10);
const ECONNREFUSED: i32 = 111;
const PORT: u16 = 7000;
/// The connect timeout of a client. The kernel sends a SYN again after a second.
const PATIENCE_MS: u32 = 1500;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Passes,
    AtOnce,
    Silence,
}

fn tcp(from: &Host, to: SocketAddr) -> Look {
    let begun = Instant::now();
    let line = format!("tcp --to {to} --timeout-ms {PATIENCE_MS}");
    let report: Tcp = from.probe(&line).expect("run").json().expect("report");
    let waited = begun.elapsed() >= Duration::from_millis(PATIENCE_MS.into());
    match (report.ok, report.errno, waited) {
        (true, _, false) => Look::Passes,
        (false, Some(ECONNREFUSED), false) => Look::AtOnce,
        (false, Some(error), true) if error != ECONNREFUSED => Look::Silence,
        other => unreachable!("{to}: {other:?}: {report:?}"),
    }
}

/// Every namespace the same: the pod takes nothing and may send nothing but to `open`.
fn isolate(namespace: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: closed, namespace: {namespace}}}
spec:
  podSelector: {{}}
  policyTypes: [Ingress, Egress]
  egress: [{{to: [{{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: open}}}}}}]}}]
---
"
    )
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: red, namespace: red}
spec: {clusterIP: 10.96.9.9, selector: {app: red}, ports: [{port: 80, targetPort: 7000}]}
";

/// Namespaces: `red` says nothing, `blue` says drop, `green` says reject; `inside` is in the mesh
/// and says drop.
fn mesh(deny: &str) -> Mesh {
    let builder = Lab::builder(Topology::Routed)
        .outside()
        .namespace("open", &[])
        .namespace("red", &[])
        .namespace("blue", &[("mesh.rs/deny", "drop")])
        .namespace("green", &[("mesh.rs/deny", "reject")])
        .namespace("inside", &[ENROLLED, ("mesh.rs/deny", "drop")])
        .pod(PodSpec::new("open", 1).namespace("open"));
    let servers = ["red", "blue", "green", "inside"];
    let lab = builder
        .pods(servers.map(|name| PodSpec::new(name, 2).namespace(name).label("app", name)))
        .build()
        .expect("lab");
    let config = AgentConfig::new(&Mesh::own_ca(&lab)).flag("--deny", deny);
    Mesh::start_with(lab, &config).expect("mesh")
}

fn enforce(mesh: &Mesh) {
    let policies: String = ["red", "blue", "green", "inside"].map(isolate).concat();
    mesh.enforce(&format!("{policies}{SERVICE}"))
        .expect("in force");
}

/// What each namespace's pod shows: to a pod of another node, to a host outside, and to its own
/// calls.
fn look(mesh: &Mesh, name: &str) -> [Look; 3] {
    let pod = mesh.pod(name);
    let outside = mesh.outside().expect("outside");
    // Not to `open`, which it may reach: to another pod of its own node.
    let other = mesh.pod(if name == "red" { "blue" } else { "red" });
    let open = mesh.pod("open");
    let pairs: [(&Host, _); 3] = [
        (&open, pod.at(PORT)),
        (outside, pod.at(PORT)),
        (&pod, other.at(PORT)),
    ];
    std::thread::scope(|scope| {
        pairs
            .map(|(from, to)| to.map(|to| scope.spawn(move || tcp(from, to))))
            .map(|families| {
                let [v4, v6] = families.map(|thread| thread.join().expect("no panic"));
                assert_eq!(v4, v6, "{name}: the families differ");
                v4
            })
    })
}

#[test]
fn denial_is_reset_or_dropped() {
    let all = [
        ("reject", [("red", Look::AtOnce), ("blue", Look::Silence)]),
        ("drop", [("red", Look::Silence), ("green", Look::AtOnce)]),
    ];
    for (deny, expected) in all {
        let mesh = mesh(deny);
        let line = format!("--tcp [::]:{PORT} --udp [::]:{PORT}");
        let _servers = ["open", "red", "blue", "green", "inside"]
            .map(|name| mesh.pod(name).serve(&line).expect("server"));
        let names = expected.map(|(name, _)| name).into_iter().chain(["inside"]);
        for name in names.clone() {
            assert_eq!(look(&mesh, name), [Look::Passes; 3], "{name}, no policy");
        }
        enforce(&mesh);
        for (name, look_of) in expected.into_iter().chain([("inside", Look::Silence)]) {
            assert_eq!(look(&mesh, name), [look_of; 3], "{name}, --deny {deny}");
            // What is allowed is so in either case.
            let open = mesh.pod("open").at(PORT)[0];
            assert_eq!(tcp(&mesh.pod(name), open), Look::Passes, "{name}");
        }
        // Through a service: translated, or its packets would go past what was decided.
        let red = expected[1].1;
        let virtual_address: SocketAddr = "10.96.9.9:80".parse().expect("an address");
        let client = mesh.pod(expected[1].0);
        assert_eq!(tcp(&client, virtual_address), red, "a service");
        datagrams(&mesh, &client, red);
        let told = |record: &serde_json::Value| {
            record["kind"] == "denied" && record["service"] == "red/red"
        };
        eventually("the refused call's record", SOON, || {
            let flows = mesh.agent(2).flows().expect("flows");
            flows.iter().any(told).then_some(())
        })
        .expect("recorded");
    }
}

/// A datagram that policy refuses: the call fails, or seems to succeed.
fn datagrams(mesh: &Mesh, client: &Pod, look: Look) {
    let to = mesh.pod("red").at(PORT)[0];
    for connected in ["", "--connected"] {
        let line = format!("udp --to {to} {connected} --timeout-ms 500");
        let report: Udp = client.probe(&line).expect("run").json().expect("report");
        let sent = usize::from(look == Look::Silence);
        let seen = (usize::try_from(report.sent).expect("few"), report.received);
        assert_eq!(seen, (sent, 0), "{connected}: {report:?}");
    }
}

/// A connection through a tunnel to a pod that refuses it: what the client sees after connect().
fn through_a_tunnel(from: &Host, to: SocketAddr) -> Look {
    let begun = Instant::now();
    let line = format!("tcp --to {to} --timeout-ms {PATIENCE_MS}");
    let report: Tcp = from.probe(&line).expect("run").json().expect("report");
    let waited = begun.elapsed() >= Duration::from_millis(PATIENCE_MS.into());
    // connect() itself has succeeded in either case.
    assert!(report.local.is_some(), "{to}: {report:?}");
    match (report.ok, report.errno, waited) {
        (true, _, false) => Look::Passes,
        // ENOTCONN: the reset was there before the client asked who the other end is.
        (false, Some(libc::ECONNRESET | libc::ENOTCONN) | None, false) => Look::AtOnce,
        (false, Some(libc::EAGAIN), true) => Look::Silence,
        other => unreachable!("{to}: {other:?}: {report:?}"),
    }
}

#[test]
fn denial_through_tunnel_is_reset_or_dropped() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("callers", &[ENROLLED])
        .namespace("quiet", &[ENROLLED, ("mesh.rs/deny", "drop")])
        .namespace("loud", &[ENROLLED])
        .pod(PodSpec::new("caller", 1).namespace("callers"))
        .pod(PodSpec::new("quiet", 2).namespace("quiet"))
        .pod(PodSpec::new("loud", 2).namespace("loud"))
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let line = format!("--tcp [::]:{PORT}");
    let _servers = ["quiet", "loud"].map(|name| mesh.pod(name).serve(&line).expect("server"));
    let caller = mesh.pod("caller");
    let look = |name: &str| {
        mesh.pod(name)
            .at(PORT)
            .map(|to| through_a_tunnel(&caller, to))
    };
    for name in ["quiet", "loud"] {
        assert_eq!(look(name), [Look::Passes; 2], "{name}, no policy");
    }
    mesh.apply_text("closed", &["quiet", "loud"].map(isolate).concat())
        .expect("apply");
    eventually("the policies to be in force", SOON, || {
        let looks = ["quiet", "loud"].map(look).concat();
        (!looks.contains(&Look::Passes)).then_some(())
    })
    .expect("in force");
    assert_eq!(look("loud"), [Look::AtOnce; 2]);
    assert_eq!(look("quiet"), [Look::Silence; 2]);
    // Everybody but the client is told at once, at both ends.
    for number in [1, 2] {
        let told = |record: &serde_json::Value| {
            let to = record["destination"].to_string();
            record["close"] == "default_deny" && to.contains("quiet")
        };
        eventually("the record of a silent refusal", SOON, || {
            let flows = mesh.agent(number).flows().expect("flows");
            flows.iter().any(told).then_some(())
        })
        .expect("recorded");
    }
    let counted = "mesh_policy_silent_refusals_total";
    let held = mesh.metric(counted, &[("result", "held")]).expect("metric");
    assert!(held >= 2.0, "{held}");
    // Held connections do not stand in the way of others, nor of the policy's end.
    mesh.withdraw("closed").expect("withdraw");
    eventually("the policies to be gone", SOON, || {
        (look("quiet") == [Look::Passes; 2]).then_some(())
    })
    .expect("open again");
}
