// SPDX-License-Identifier: Apache-2.0
//! The modes of MeshAuthentication over real connections: what single ports accept, as plaintext and
//! through tunnels, and what a pod reaches that must not send plaintext.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::mesh::{ENROLLED, TUNNEL_PORT, sum};
use mesh_test::reports::Tcp;
use mesh_test::{AgentConfig, Cmd, Host, Lab, Mesh, Pod, PodSpec, Topology};

const SOON: Duration = Duration::from_secs(20);
const PORTS: [u16; 2] = [7000, 7001];
const VERDICTS: &str = "mesh_policy_verdicts_total";
/// The host on the wire that is not part of the cluster.
const OUTSIDE: &str = "192.168.50.100";
const MARKER: &str = "seen-by-whoever-looks-at-the-wire";

/// `a` and `plain` on node 1, `b` and `beside` on node 2; `plain` and `beside` are not in the mesh.
fn mesh(tunnel_port: &str) -> Mesh {
    let lab = Lab::builder(Topology::Routed)
        .outside()
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pod(PodSpec::new("a", 1))
        .pod(PodSpec::new("plain", 1).namespace("plain"))
        .pod(PodSpec::new("b", 2))
        .pod(PodSpec::new("beside", 2).namespace("plain"))
        .build()
        .expect("lab");
    let config = AgentConfig::new(&Mesh::own_ca(&lab)).flag("--tunnel-port", tunnel_port);
    Mesh::start_with(lab, &config).expect("mesh")
}

/// Puts the MeshAuthentication of the mesh's pods in force.
fn enforce(mesh: &Mesh, spec: &str) {
    let text = format!(
        "apiVersion: mesh.rs/v1alpha1\nkind: MeshAuthentication\n\
         metadata: {{name: case, namespace: default}}\nspec: {spec}\n"
    );
    mesh.enforce(&text).expect("in force");
}

/// A connection to one port that says [`MARKER`] and hears it again.
fn reach(from: &Host, to: SocketAddr) -> Tcp {
    let line = format!("tcp --to {to} --say {MARKER} --timeout-ms 3000");
    let output = from.probe(&line).expect("run");
    output.json().expect("a report")
}

/// `+` or `-` for each port.
fn reaches(from: &Host, to: &Pod) -> String {
    let sign = |port: &u16| {
        let report = reach(from, SocketAddr::new(to.v4().into(), *port));
        assert_eq!(report.ok, report.received.is_some(), "{report:?}");
        if report.ok { '+' } else { '-' }
    };
    PORTS.iter().map(sign).collect()
}

fn serve(pod: &Pod) -> mesh_test::Proc {
    let listen = PORTS.map(|port| format!("--tcp [::]:{port}")).join(" ");
    pod.serve(&listen).expect("server")
}

/// Refusals of plaintext at `b`'s node.
fn turned_away(mesh: &Mesh) -> f64 {
    let page = mesh.agent(2).metrics().expect("metrics");
    sum(&page, VERDICTS, &[("reason", "plaintext_refused")])
}

/// Refusals at `a`'s node to send in clear.
fn refused(mesh: &Mesh) -> f64 {
    let page = mesh.agent(1).metrics().expect("metrics");
    let labels = [
        ("reason", "peer_not_enrolled"),
        ("direction", "egress"),
        ("verdict", "denied"),
    ];
    sum(&page, VERDICTS, &labels)
}

#[test]
fn port_mode_is_independent_of_other_ports() {
    for tunnels in ["15008", "real"] {
        let mesh = mesh(tunnels);
        let [a, plain, b, beside] = ["a", "plain", "b", "beside"].map(|name| mesh.pod(name));
        let outside = mesh.outside().expect("outside");
        let _server = serve(&b);
        let both = "{mtls: Permissive}";
        let rows = [
            (both, "++"),
            (
                "{mtls: Strict, ports: [{port: 7001, mtls: Permissive}]}",
                "-+",
            ),
            (
                "{mtls: Permissive, ports: [{port: 7001, mtls: Strict}]}",
                "+-",
            ),
            ("{ports: [{port: 7000, mtls: Strict}]}", "-+"),
            (both, "++"),
        ];
        for (spec, clear) in rows {
            enforce(&mesh, spec);
            let what = format!("{tunnels}: {spec}");
            // In clear, from another node, the same node and outside.
            let before = turned_away(&mesh);
            for from in [&plain as &Host, &beside, outside] {
                assert_eq!(reaches(from, &b), clear, "{what}: {from:?}");
            }
            let refused = turned_away(&mesh) - before;
            let expected = if clear.contains('-') { 3.0 } else { 0.0 };
            assert!(
                (refused > 0.0) == (expected > 0.0) && refused >= expected,
                "{what}: {refused} refused"
            );
            // Through tunnels every port is reached, and nothing is seen of it.
            let capture = mesh.capture_wire().expect("capture");
            assert_eq!(reaches(&a, &b), "++", "{what}");
            let seen = capture.stop().expect("stop");
            seen.complete().expect("no frame lost");
            assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), [], "{what}");
            let own = match tunnels {
                "real" => PORTS.to_vec(),
                _ => vec![TUNNEL_PORT],
            };
            let ports = seen.tcp_service_ports();
            assert!(
                own.iter().all(|port| ports.contains(port)),
                "{what}: {ports:?}"
            );
        }
    }
}

/// A pod that must not send in clear reaches what is in the mesh, and what is no pod; nothing else.
#[test]
fn outbound_plaintext_is_refused_in_strict_mode() {
    let mesh = mesh("15008");
    let [a, plain, b, beside] = ["a", "plain", "b", "beside"].map(|name| mesh.pod(name));
    let _servers = [&plain, &b, &beside].map(|pod| serve(pod));
    let outside = mesh.outside().expect("outside");
    let listen = "import socket, sys\ns = socket.create_server(('0.0.0.0', 7000)); print('up')\n\
                  while True:\n c, _ = s.accept(); c.close()";
    let elsewhere = outside
        .spawn_lines(Cmd::new("python3").args(["-uc", listen]))
        .expect("python3");
    assert_eq!(elsewhere.line(SOON).expect("line").as_deref(), Some("up"));
    let world = format!("tcp --to {OUTSIDE}:{} --no-id --timeout-ms 3000", PORTS[0]);
    // The control, and again behind it: all are reached while nothing forbids it.
    for required in [false, true, false] {
        let mode = if required {
            "Required"
        } else {
            "Opportunistic"
        };
        let spec = format!("{{outbound: {mode}}}");
        enforce(&mesh, &spec);
        let before = refused(&mesh);
        // On another node, and on its own: where a pod runs makes no difference.
        for outside in [&beside, &plain] {
            let report = reach(&a, SocketAddr::new(outside.v4().into(), PORTS[0]));
            assert_eq!(report.ok, !required, "{spec}: {report:?}");
            let errno = required.then_some(libc::ECONNREFUSED);
            assert_eq!(report.errno, errno, "{spec}: {report:?}");
        }
        let refused = refused(&mesh) - before;
        assert_eq!(
            refused.to_string(),
            if required { "2" } else { "0" },
            "{spec}"
        );
        let capture = mesh.capture_wire().expect("capture");
        assert_eq!(reaches(&a, &b), "++", "{spec}");
        let seen = capture.stop().expect("stop");
        assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), [], "{spec}");
        let report: Tcp = a.probe(&world).expect("run").json().expect("a report");
        assert!(report.ok, "{spec}: what is no pod: {report:?}");
    }
}
