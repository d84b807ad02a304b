// SPDX-License-Identifier: Apache-2.0
//! UDP under policy: replies pass, strangers do not, flows live and expire, a policy ends them.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::pod::probe_cmd;
use mesh_test::reports::Udp;
use mesh_test::{Lab, Mesh, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);

/// `client` and `stranger` on node 1, `server` on node 2.
fn mesh() -> Mesh {
    let pods = [
        PodSpec::new("client", 1).label("app", "client"),
        PodSpec::new("stranger", 1).label("app", "stranger"),
        PodSpec::new("server", 2).label("app", "server"),
    ];
    let builder = Lab::builder(Topology::Routed).namespace("default", &[ENROLLED]);
    let lab = pods
        .into_iter()
        .fold(builder, |lab, pod| lab.pod(pod))
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

/// A policy that isolates `app` in a direction and allows nothing.
fn isolate(app: &str, direction: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: isolate-{app}, namespace: default}}
spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, policyTypes: [{direction}]}}
"
    )
}

fn udp(pod: &Pod, line: &str) -> Udp {
    pod.probe(line).expect("run").json().expect("report")
}

fn at(pod: &Pod, port: u16) -> [SocketAddr; 2] {
    [(pod.v4(), port).into(), (pod.v6(), port).into()]
}

/// Waits until a datagram from `from` to `to` has become impossible, or possible.
fn until(from: &Pod, to: SocketAddr, possible: bool) {
    eventually("the policy to be in force", SOON, || {
        let report = udp(from, &format!("udp --to {to} --timeout-ms 300"));
        ((report.received == 1) == possible).then_some(())
    })
    .expect("in force");
}

#[test]
fn a_client_isolated_for_ingress_gets_its_replies_and_nobody_else_gets_in() {
    let mesh = mesh();
    let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
    let _server = server.serve("--udp [::]:7000").expect("server");
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    until(&stranger, at(&client, 7001)[0], true);
    mesh.apply_text("isolate", &isolate("client", "Ingress"))
        .expect("apply");
    until(&stranger, at(&client, 7001)[0], false);
    for to in at(&server, 7000) {
        for connected in ["", "--connected"] {
            let report = udp(&client, &format!("udp --to {to} {connected} --count 3"));
            assert_eq!(
                (report.sent, report.received),
                (3, 3),
                "{to} {connected}: {report:?}"
            );
        }
    }
    for (from, to) in [(&stranger, 0), (&server, 0), (&stranger, 1), (&server, 1)] {
        let to = at(&client, 7001)[to];
        let report = udp(from, &format!("udp --to {to} --timeout-ms 300"));
        assert_eq!(report.received, 0, "{} gets in", from.name());
    }
}

#[test]
fn a_server_isolated_for_egress_can_answer_and_nothing_more() {
    let mesh = mesh();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _server = server.serve("--udp [::]:7000").expect("server");
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    until(&server, at(&client, 7001)[0], true);
    mesh.apply_text("isolate", &isolate("server", "Egress"))
        .expect("apply");
    until(&server, at(&client, 7001)[0], false);
    for to in at(&server, 7000) {
        let report = udp(&client, &format!("udp --to {to} --count 3"));
        assert_eq!((report.sent, report.received), (3, 3), "{to}: {report:?}");
    }
    for to in at(&client, 7001) {
        let report = udp(&server, &format!("udp --to {to} --timeout-ms 300"));
        assert_eq!(report.sent, 0, "{to}: refused at once: {report:?}");
    }
}

#[test]
fn a_busy_connected_flow_outlives_the_idle_time_and_an_idle_one_expires() {
    let mesh = mesh();
    let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
    let _server = server.serve("--udp [::]:7000 --report").expect("server");
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    mesh.apply_text("isolate", &isolate("client", "Ingress"))
        .expect("apply");
    until(&stranger, at(&client, 7001)[0], false);
    let to = at(&server, 7000)[0];
    // One flow with a datagram a second for longer than 30 s; another that was only ever sent to,
    // and is tried from the other end after it must have expired.
    let silent = at(&server, 7999)[0];
    let once = format!("udp --to {silent} --from {}:7777 --no-answer", client.v4());
    let report = udp(&client, &once);
    assert_eq!(report.sent, 1, "{report:?}");
    let _late = client.serve("--udp [::]:7777").expect("listener");
    let back = format!(
        "udp --to {}:7777 --from {silent} --timeout-ms 500",
        client.v4()
    );
    let report = udp(&server, &back.replace(":7999", ":7998"));
    assert_eq!(
        report.received, 0,
        "another port is no part of the flow: {report:?}"
    );
    let busy = format!("udp --to {to} --connected --count 36 --interval-ms 1000");
    let report: Udp = client
        .run(probe_cmd(&busy).expect("probe"), Duration::from_secs(60))
        .expect("run")
        .json()
        .expect("report");
    assert_eq!((report.sent, report.received), (36, 36), "{report:?}");
    let report = udp(&server, &back);
    assert_eq!(report.received, 0, "the entry has expired: {report:?}");
}

#[test]
fn a_policy_that_denies_a_flow_ends_it() {
    let mesh = mesh();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _server = server.serve("--udp [::]:7000").expect("server");
    let to = at(&server, 7000)[0];
    until(&client, to, true);
    let busy = client
        .start_probe(&format!(
            "udp --to {to} --connected --count 100 --interval-ms 50 --timeout-ms 200"
        ))
        .expect("client");
    until(&client, to, true);
    mesh.apply_text("isolate", &isolate("server", "Ingress"))
        .expect("apply");
    let line = busy
        .line(Duration::from_secs(60))
        .expect("line")
        .expect("report");
    let report: Udp = serde_json::from_str(&line).expect("report");
    assert!(report.received > 0, "it ran: {report:?}");
    assert!(report.received < 100, "it was ended: {report:?}");
    let report = udp(&client, &format!("udp --to {to} --timeout-ms 300"));
    assert_eq!(report.received, 0, "{report:?}");
}
