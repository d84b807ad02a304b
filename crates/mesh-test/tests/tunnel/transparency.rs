// SPDX-License-Identifier: Apache-2.0
//! A connection from pod to pod across nodes, as both applications and the wire see it, and peers that
//! are refused.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use mesh_test::apps::{Content, Nginx};
use mesh_test::authority::{authority, certificate};
use mesh_test::capture::Captured;
use mesh_test::mesh::{ENROLLED, TUNNEL_PORT};
use mesh_test::pod::SOCKETS;
use mesh_test::reports::{Bulk, Storm};
use mesh_test::{AgentConfig, Cmd, Families, Lab, Mesh, Pod, PodSpec, Topology, eventually};

const MARKER: &str = "the-marker-that-must-not-be-seen";
const SOON: Duration = Duration::from_secs(10);
const TOPOLOGIES: [Topology; 2] = [Topology::Routed, Topology::Bridged];

fn lab_of(topology: Topology, families: Families) -> Lab {
    let pods = [PodSpec::new("a", 1), PodSpec::new("b", 2)];
    Lab::builder(topology)
        .outside()
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pods(pods.map(|pod| pod.families(families)))
        .build()
        .expect("lab")
}

fn lab(topology: Topology) -> Lab {
    lab_of(topology, Families::Dual)
}

/// Nothing readable, and nothing but tunnels.
fn assert_tunnelled(seen: &Captured, what: &str) {
    seen.complete().expect("no frame lost");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), [], "{what}");
    assert_eq!(seen.tcp_service_ports(), [TUNNEL_PORT], "{what}");
}

/// Fetches a page that holds the marker and compares what curl says of its own end with nginx's log.
fn curl_all(a: &Pod, b: &Pod, what: &str) {
    let page = format!("{MARKER}\n");
    let content = Content::Files(&[("index.html", page.as_bytes())]);
    let nginx = Nginx::start(b, 80, content).expect("nginx");
    for to in b.all_at(80) {
        let url = format!("http://{to}/");
        let curl =
            Cmd::new("curl").args(["-sSg", "--max-time", "5", "-w", "%{local_ip} %{local_port}"]);
        let output = a
            .run(curl.args([&url]), SOON)
            .expect("run")
            .ok()
            .expect(what);
        let text = output.text();
        let own = text.strip_prefix(&page).expect("the page");
        let (ip, port) = own.split_once(' ').expect("both");
        let own = SocketAddr::new(ip.parse().expect("ip"), port.parse().expect("port"));
        assert!(a.addresses().contains(&own.ip()), "{what}: {own}");
        // nginx logs after it has answered.
        let logged = || {
            nginx
                .requests()
                .ok()?
                .pop()
                .filter(|seen| seen.client == own)
        };
        eventually("nginx to log the client's own address", SOON, logged)
            .with_context(|| format!("{what}: {own}: {:?}", nginx.requests()))
            .expect("logged");
    }
}

#[test]
fn curl_across_nodes_is_tunneled_and_transparent() {
    for topology in TOPOLOGIES {
        let lab = lab(topology);
        let capture = lab.capture_wire().expect("capture");
        curl_all(&lab.pod("a"), &lab.pod("b"), "without the mesh");
        let seen = capture.stop().expect("stop");
        assert_ne!(seen.find(MARKER.as_bytes()).expect("search"), [], "control");
        drop(lab);

        let what = format!("{topology:?}");
        let mesh = Mesh::start(self::lab(topology)).expect("mesh");
        let capture = mesh.capture_wire().expect("capture");
        curl_all(&mesh.pod("a"), &mesh.pod("b"), &what);
        assert_tunnelled(&capture.stop().expect("stop"), &what);
    }
}

#[test]
fn single_stack_pods_are_tunneled() {
    for families in [Families::V6, Families::V4] {
        let what = format!("{families:?}");
        let mesh = Mesh::start(lab_of(Topology::Routed, families)).expect("mesh");
        let capture = mesh.capture_wire().expect("capture");
        curl_all(&mesh.pod("a"), &mesh.pod("b"), &what);
        assert_tunnelled(&capture.stop().expect("stop"), &what);
    }
}

#[test]
fn every_kind_of_client_socket_is_tunneled() {
    for topology in TOPOLOGIES {
        let mesh = Mesh::start(lab(topology)).expect("mesh");
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let _server = b.serve("--tcp [::]:7000 --name b").expect("server");
        let capture = mesh.capture_wire().expect("capture");
        for (to, own) in b.all_at(7000).into_iter().zip(a.all_at(4711)) {
            for option in SOCKETS {
                let from = if option.ends_with("--from") {
                    own.to_string()
                } else {
                    String::new()
                };
                let line = format!("--to {to} --say {MARKER} {option} {from}");
                let report = a.tcp(&line).expect("report");
                assert!(report.ok && report.ends_agree(), "{line}: {report:?}");
                assert_eq!(report.peer, Some(to), "{line}");
                assert_eq!(report.received.as_deref(), Some(MARKER), "{line}");
                assert_eq!(report.local.expect("local").ip(), own.ip(), "{line}");
                if !from.is_empty() {
                    assert_eq!(report.local, Some(own), "{line}");
                }
            }
        }
        assert_tunnelled(&capture.stop().expect("stop"), &format!("{topology:?}"));
    }
}

#[test]
fn concurrent_short_connections_reach_their_destinations() {
    let mut lab = lab(Topology::Routed);
    let c = lab.add_pod(PodSpec::new("c", 2)).expect("pod");
    let mesh = Mesh::start(lab).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let ports = "7000-7063";
    let _servers = [(&b, "b"), (&c, "c")].map(|(pod, name)| {
        let line = format!("--tcp [::]:0 --ports {ports} --name {name}");
        pod.serve(&line).expect("server")
    });
    let capture = mesh.capture_wire().expect("capture");
    let to: String = [b.all_at(0), c.all_at(0)]
        .concat()
        .iter()
        .map(|to| format!("--to {to} "))
        .collect();
    let line = format!("storm {to} --ports {ports} --threads 2 --count 10000");
    let storm = a.start_probe(&line).expect("storm");
    let report = Storm::of(&storm).expect("report");
    assert_eq!(
        (report.ok, report.wrong, report.failed),
        (10_000, 0, 0),
        "{report:?}"
    );
    let seen = capture.stop().expect("stop");
    assert_eq!(seen.tcp_service_ports(), [TUNNEL_PORT]);
}

#[test]
fn bulk_transfer_arrives_intact_in_both_directions() {
    let mesh = Mesh::start(lab(Topology::Bridged)).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    for to in b.all_at(7000) {
        for reverse in ["", "--reverse"] {
            let line = format!("bulk --to {to} --streams 4 --bytes 20000003 {reverse}");
            let output = a.probe(&line).expect("run").ok().expect(&line);
            let report: Bulk = output.json().expect("report");
            assert_eq!(
                (report.bytes, report.confirmed),
                (80_000_012, 80_000_012),
                "{line}"
            );
        }
    }
}

/// The error of a connection that is reset, by the first call that returns it.
const GONE: [i32; 4] = [
    libc::ECONNREFUSED,
    libc::ECONNRESET,
    libc::ENOTCONN,
    libc::EPIPE,
];

#[test]
fn refused_port_and_half_close_behave_as_without_mesh() {
    let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    for to in b.all_at(7001) {
        // A captured connect() succeeds before the peer is asked; then it is reset.
        let begun = std::time::Instant::now();
        let report = a.tcp(&format!("--to {to}")).expect("report");
        assert!(
            report.errno.is_some_and(|errno| GONE.contains(&errno)),
            "{report:?}"
        );
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}: {report:?}");
    }
    // The server answers only after it has seen the client's end.
    for to in b.all_at(7002) {
        let serve = format!(
            "import socket; s = socket.create_server(('::', {}), family=socket.AF_INET6, \
             dualstack_ipv6=True); print('up', flush=True); c, _ = s.accept(); n = 0\n\
             while True:\n d = c.recv(65536)\n if not d: break\n n += len(d)\n\
             c.sendall(str(n).encode()); c.close()",
            to.port()
        );
        let server = b
            .spawn_lines(Cmd::new("/usr/bin/python3").args(["-c", &serve]))
            .expect("server");
        assert_eq!(server.line(SOON).expect("line").as_deref(), Some("up"));
        let ask = format!(
            "import socket; c = socket.create_connection(('{}', {})); c.sendall(b'x' * 1000003); \
             c.shutdown(socket.SHUT_WR); print(c.recv(64).decode(), repr(c.recv(64)))",
            to.ip(),
            to.port()
        );
        let output = a.run(Cmd::new("/usr/bin/python3").args(["-c", &ask]), SOON);
        let output = output.expect("run").ok().expect("half close");
        assert_eq!(output.text(), "1000003 b''\n");
    }
}

/// A server that is not the agent: takes any TLS client of the authority and prints what it says.
fn impostor(b: &Pod, certs: &Path, account: &str) -> mesh_test::Proc {
    let of = |name: &str| {
        certs
            .join("default")
            .join(account)
            .join(name)
            .display()
            .to_string()
    };
    let (chain, key, ca) = (of("tls.crt"), of("tls.key"), of("ca.crt"));
    // It ends when its standard input does.
    let script = format!(
        "sleep 60 | openssl s_server -accept 15008 -tls1_3 -alpn mesh/1 -Verify 1 -quiet \
         -cert {chain} -key {key} -CAfile {ca}"
    );
    let cmd = Cmd::shell(&script);
    let server = b.spawn(cmd).expect("openssl");
    eventually("the impostor to listen", SOON, || {
        let sockets = b.tcp_sockets().ok()?;
        let listens = |state: &str| state == "LISTEN";
        sockets
            .iter()
            .any(|socket| listens(&socket.state))
            .then_some(())
    })
    .expect("listens");
    server
}

#[test]
fn server_identity_must_match_the_cluster() {
    let lab = lab(Topology::Routed);
    let (ca, other, certs) = (
        lab.dir().join("authority"),
        lab.dir().join("other"),
        lab.dir().join("certs"),
    );
    authority(&ca);
    authority(&other);
    for account in ["a", "b", "c"] {
        certificate(&certs, &ca, account, account);
    }
    certificate(&certs, &other, "stranger", "b");
    let config = AgentConfig::new(&format!("files:{}", certs.display()));
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    // Node 2 has no agent: what answers on the tunnel's port is whoever listens there.
    let agent = lab.node(1).start_agent(config).expect("agent");
    for to in b.all_at(7000) {
        for (account, right) in [("b", true), ("c", false), ("stranger", false)] {
            let mut server = impostor(&b, &certs, account);
            let capture = lab.capture_wire().expect("capture");
            let report = a
                .tcp(&format!("--to {to} --say {MARKER} --timeout-ms 2000"))
                .expect("report");
            assert!(!report.ok, "{account}: {report:?}");
            let said = || std::fs::read(server.log()).is_ok_and(|log| contains(&log, b"ID\n"));
            if right {
                eventually("the right one to be spoken to", SOON, || {
                    said().then_some(())
                })
                .unwrap_or_else(|e| panic!("{e:#}: {}", agent.log_tail()));
            } else {
                assert!(
                    report.errno.is_some_and(|errno| GONE.contains(&errno)),
                    "{account}: {report:?}"
                );
                assert!(!said(), "{account}: {}", server.log_tail());
            }
            let seen = capture.stop().expect("stop");
            assert_tunnelled(&seen, account);
            server.kill().expect("kill");
        }
    }
    let flows = agent.flows().expect("flows");
    let refused = flows
        .iter()
        .filter(|flow| flow["close"] == "identity_refused");
    assert_eq!(refused.count(), 4, "{flows:#?}");
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn certificates_from_files_carry_tunnels() {
    let lab = lab(Topology::Bridged);
    let (ca, certs) = (lab.dir().join("authority"), lab.dir().join("certs"));
    authority(&ca);
    for account in ["a", "b"] {
        certificate(&certs, &ca, account, account);
    }
    let config = AgentConfig::new(&format!("files:{}", certs.display()));
    let mesh = Mesh::start_with(lab, &config).expect("mesh");
    let capture = mesh.capture_wire().expect("capture");
    curl_all(&mesh.pod("a"), &mesh.pod("b"), "files");
    assert_tunnelled(&capture.stop().expect("stop"), "files");
}

#[test]
fn tunnel_port_refuses_strangers() {
    let mut lab = lab(Topology::Routed);
    let plain = lab
        .add_pod(PodSpec::new("plain", 1).namespace("plain"))
        .expect("pod");
    let mesh = Mesh::start(lab).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    let report = a
        .tcp(&format!("--to {} --say x", b.all_at(7000)[0]))
        .expect("report");
    assert!(report.ok, "{report:?}");

    let certs = mesh.dir().join("stranger");
    authority(&mesh.dir().join("other"));
    certificate(&certs, &mesh.dir().join("other"), "a", "a");
    let own = certs.join("default/a").display().to_string();
    let outside = mesh.outside().expect("outside");
    for to in b.all_at(TUNNEL_PORT) {
        for chain in ["", "-cert DIR/tls.crt -key DIR/tls.key"] {
            let line = format!("openssl s_client -connect {to} -alpn mesh/1 -ign_eof {chain}");
            let cmd = Cmd::line(&line.replace("DIR", &own)).input("ID\n".repeat(1000));
            let output = outside.run(cmd, SOON).expect("run");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{chain}: {output}");
            assert!(said.contains("alert"), "{chain}: {said}");
        }
        // Without TLS: whatever is said, no answer of the application comes back.
        let report = outside
            .tcp(&format!("--to {to} --no-id --say {MARKER}"))
            .expect("report");
        let answer = report.received.unwrap_or_default();
        assert!(!answer.contains(MARKER), "{to}: {answer}");
        // A process of a pod, enrolled or not, is not the agent.
        for pod in [&a, &plain] {
            let report = pod.tcp(&format!("--to {to} --no-id")).expect("report");
            assert_eq!(report.errno, Some(libc::ECONNREFUSED), "{report:?}");
        }
    }
    // The agent's own listeners are on loopback only.
    let listeners: Vec<SocketAddr> = b
        .tcp_sockets()
        .expect("ss")
        .into_iter()
        .filter(|socket| socket.state == "LISTEN")
        .filter_map(|socket| socket.local)
        .filter(|local| local.port() != 7000)
        .collect();
    assert_eq!(listeners.len(), 4, "{listeners:?}");
    for listener in listeners {
        assert!(listener.ip().is_loopback(), "{listener}");
        let to = b.all_at(listener.port());
        for to in to {
            let report = outside.tcp(&format!("--to {to} --no-id")).expect("report");
            assert_eq!(report.errno, Some(libc::ECONNREFUSED), "{report:?}");
        }
    }
}
