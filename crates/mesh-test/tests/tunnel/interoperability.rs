// SPDX-License-Identifier: Apache-2.0
//! The agent against another implementation of `mesh/1`, written from `docs/tunnel.md` alone, in Python on
//! OpenSSL: once as the opening peer, once as the accepting one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_common::Reason;
use mesh_test::authority::{authority, certificate};
use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::{AgentConfig, Cmd, Lab, Pod, Proc, Topology, eventually};

const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peer/mesh1.py");
const SOON: Duration = Duration::from_secs(20);
const VERDICTS: &str = "mesh_policy_verdicts_total";
const SOURCE_OF_A: &str = "spiffe://cluster.local/ns/default/sa/a";

/// A lab without agents, and certificates for both pods from files.
fn lab() -> (Lab, PathBuf) {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab");
    let (ca, certs) = (lab.dir().join("authority"), lab.dir().join("certs"));
    authority(&ca);
    for account in ["a", "b"] {
        certificate(&certs, &ca, account, account);
    }
    (lab, certs)
}

fn config(certs: &std::path::Path) -> AgentConfig {
    AgentConfig::new(&format!("files:{}", certs.display()))
}

fn python(pod: &Pod, args: &[String]) -> Proc {
    let cmd = Cmd::new("python3").args(["-uB", PEER]).args(args);
    pod.spawn_lines(cmd).expect("python3")
}

fn refused(reason: Reason, cause: u16) -> String {
    format!("refused {} {cause}", reason as u16)
}

#[test]
fn python_peer_opens_streams() {
    let (lab, certs) = lab();
    // Node 1 has no agent: the peer is one.
    let agent = lab.node(2).start_agent(config(&certs)).expect("agent");
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000 --name b").expect("server");
    let certs = certs.join("default/a").display().to_string();
    let args = [
        "open",
        &certs,
        &a.v4().to_string(),
        &b.v4().to_string(),
        "7000",
        "7001",
    ];
    let peer = python(&a, &args.map(str::to_owned));
    let to = SocketAddr::new(b.v4().into(), 7000);
    let client = SocketAddr::new(a.v4().into(), 40001);
    let expected = [
        "peer spiffe://cluster.local/ns/default/sa/b".to_owned(),
        format!("identity {to} {client} b"),
        "ends True".to_owned(),
        "echo True".to_owned(),
        refused(Reason::ConnectFailed, 1),
        refused(Reason::Spoofed, 0),
        refused(Reason::TunnelPort, 0),
        refused(Reason::NotTunnelled, 0),
        format!("violation {}", Reason::Protocol as u16),
    ];
    for expected in expected {
        assert_eq!(
            peer.next_line(SOON).expect("a line in time"),
            expected,
            "{}\n{}",
            peer.log_tail(),
            agent.log_tail()
        );
    }
}

/// The port that the SYN has reached is the one that packet filters between the nodes have allowed:
/// no other may be asked for behind their backs.
#[test]
fn tunnel_on_application_port_reaches_only_that_port() {
    let (lab, certs) = lab();
    let real = config(&certs).flag("--tunnel-port", "real");
    let agent = lab.node(2).start_agent(real).expect("agent");
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let listen = "--tcp [::]:7000 --tcp [::]:7001 --name b";
    let _server = b.serve(listen).expect("server");
    let certs = certs.join("default/a").display().to_string();
    let (own, peer) = (a.v4().to_string(), b.v4().to_string());
    let client = python(
        &a,
        &["marked", &certs, &own, &peer, "7000", "7001"].map(str::to_owned),
    );
    let proven = "peer spiffe://cluster.local/ns/default/sa/b".to_owned();
    let answered = |port: u16, client: u16| format!("{port} {peer}:{port} {own}:{client} b");
    let expected = [
        proven.clone(),
        answered(7000, 40001),
        format!("7001 {}", refused(Reason::NotTunnelled, 0)),
        answered(7000, 40003),
        // The control: the other port is there.
        proven,
        answered(7000, 40001),
        answered(7001, 40002),
    ];
    for expected in expected {
        assert_eq!(
            client.next_line(SOON).expect("a line"),
            expected,
            "{}\n{}",
            client.log_tail(),
            agent.log_tail()
        );
    }
    let closes = || -> Vec<serde_json::Value> {
        let flows = agent.flows().expect("flows");
        let other = flows.iter().filter(|f| f["destination"]["port"] == 7001);
        other.map(|flow| flow["close"].clone()).collect()
    };
    eventually("the records of the other port", SOON, || {
        (closes() == ["not_tunnelled", "finished"]).then_some(())
    })
    .map_err(|late| format!("{late}: {:?}", closes()))
    .expect("recorded");
    let labels = [("reason", "not_tunnelled"), ("direction", "ingress")];
    let counted = sum(&agent.metrics().expect("metrics"), VERDICTS, &labels);
    assert_eq!(counted.to_string(), "1");
}

#[test]
fn python_peer_accepts_streams() {
    let (lab, certs) = lab();
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let own = certs.join("default/b").display().to_string();
    let failed = (Reason::ConnectFailed as u16).to_string();
    let args = ["accept", &own, &b.v4().to_string(), &failed];
    let peer = python(&b, &args.map(str::to_owned));
    assert_eq!(peer.next_line(SOON).expect("a line in time"), "up");
    // Node 2 has no agent: the peer is one.
    let agent = lab.node(1).start_agent(config(&certs)).expect("agent");
    let ask = |port: u16, bytes: usize| {
        let script = format!(
            "import errno, socket; c = socket.create_connection(('{}', {port})); c.settimeout(15)\n\
             print(c.getsockname()[1]); sent = bytes(range(256)) * {}\n\
             try:\n c.sendall(sent); c.shutdown(socket.SHUT_WR); got = b''\n \
             while d := c.recv(65536): got += d\n print(got == sent)\n\
             except OSError as e: print(errno.errorcode[e.errno])",
            b.v4(),
            bytes / 256,
        );
        let output = a.run(Cmd::new("python3").args(["-c", &script]), SOON);
        let text = output.expect("run").ok().expect("python3").text();
        let mut lines = text.lines().map(str::to_owned);
        let port = lines.next().expect("its port");
        (port, lines.next().expect("what came of it"))
    };
    let opened = |stream: u32, port: u16, client: &str| {
        format!("open {stream} {}:{port} {}:{client} True", b.v4(), a.v4())
    };
    // A second connection comes through the same tunnel.
    for (stream, bytes) in [(1, 256), (2, 2 << 20)] {
        let (client, said) = ask(7000, bytes);
        assert_eq!(said, "True", "{}\n{}", peer.log_tail(), agent.log_tail());
        if stream == 1 {
            assert_eq!(
                peer.next_line(SOON).expect("a line in time"),
                format!("peer {SOURCE_OF_A}")
            );
        }
        assert_eq!(
            peer.next_line(SOON).expect("a line in time"),
            opened(stream, 7000, &client)
        );
        assert_eq!(
            peer.next_line(SOON).expect("a line in time"),
            format!("served {stream} {bytes}")
        );
    }
    for (stream, port) in [(3, 7001), (4, 7002)] {
        let (client, said) = ask(port, 256);
        assert!(
            ["ECONNRESET", "EPIPE", "ENOTCONN"].contains(&&*said),
            "{said}"
        );
        assert_eq!(
            peer.next_line(SOON).expect("a line in time"),
            opened(stream, port, &client)
        );
    }
    let closes: Vec<_> = agent
        .flows()
        .expect("flows")
        .iter()
        .map(|flow| flow["close"].clone())
        .collect();
    assert_eq!(closes.len(), 4, "{closes:?}");
    assert_eq!(closes[2], "connect_failed", "{closes:?}");
}
