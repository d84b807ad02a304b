// SPDX-License-Identifier: Apache-2.0
//! Attempts of hostile or careless pods to bypass the mesh, judged by the packets on the wire.
//!
//! Every attempt is also made without the mesh, as a control: there it must succeed.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use mesh_test::capture::Scope;
use mesh_test::manifests::isolate;
use mesh_test::mesh::ENROLLED;
use mesh_test::pod::probe_cmd;
use mesh_test::reports::Tcp;
use mesh_test::{Capture, Cmd, Lab, Mesh, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);
const MARKER: &str = "application-bytes-in-clear";

const STRICT: &str = "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: Strict}
";

/// `a` and its neighbour `n` on node 1, `b` on node 2, all enrolled; `u` on node 1 is not.
fn lab(topology: Topology) -> Lab {
    let pods = [
        PodSpec::new("a", 1),
        PodSpec::new("n", 1),
        PodSpec::new("u", 1).namespace("plain"),
        PodSpec::new("b", 2),
    ];
    Lab::builder(topology)
        .outside()
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pods(pods)
        .build()
        .expect("lab")
}

/// The addresses of two pods, family by family.
fn pairs(a: &Pod, b: &Pod) -> [(IpAddr, IpAddr); 2] {
    [
        (a.v4().into(), b.v4().into()),
        (a.v6().into(), b.v6().into()),
    ]
}

fn at(addr: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(addr, port)
}

/// The segments and frames with application bytes that `a` tries to get to `b`.
fn bypasses(a: &Pod, b: &Pod) -> Vec<String> {
    let mut lines = Vec::new();
    for (own, peer) in pairs(a, b) {
        for (from, to, flags) in [
            (40_000, 8080, "S"),
            (15_008, 8080, "S"),
            (40_001, 8080, "PA"),
            (15_008, 8080, "PA"),
            (40_003, 15_008, "S"),
            (40_004, 15_008, "PA"),
        ] {
            let (src, dst) = (at(own, from), at(peer, to));
            lines.push(format!(
                "raw --src {src} --dst {dst} --flags {flags} --payload {MARKER}"
            ));
        }
        let (src, dst) = (at(own, 40_002), at(peer, 8080));
        let (src_mac, dst_mac) = (a.mac(), a.gateway_mac());
        lines.push(format!(
            "frame --src {src} --dst {dst} --flags S --payload {MARKER} --bypass \
             --src-mac {src_mac} --dst-mac {dst_mac}"
        ));
    }
    lines
}

fn send_all(pod: &Pod, lines: &[String]) {
    for line in lines {
        let cmd = probe_cmd(line).expect("probe").cap_net_raw_only();
        pod.run(cmd, SOON).expect("run").ok().expect(line);
    }
}

fn drops(mesh: &Mesh, reason: &str) -> f64 {
    let labels = [("reason", reason), ("verdict", "denied")];
    mesh.metric("mesh_policy_verdicts_total", &labels)
        .expect("metrics")
}

#[test]
fn raw_and_packet_sockets_cannot_bypass_tunnel() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let plain = lab(topology);
        let lines = bypasses(&plain.pod("a"), &plain.pod("b"));
        let capture = plain.capture_wire().expect("capture");
        send_all(&plain.pod("a"), &lines);
        eventually("every marker in clear without the mesh", SOON, || {
            let hits = capture.so_far().ok()?.find(MARKER.as_bytes()).ok()?;
            (hits.len() == lines.len()).then_some(())
        })
        .expect("control");
        drop(capture);
        drop(plain);

        let mesh = Mesh::start(lab(topology)).expect("mesh");
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let lines = bypasses(&a, &b);
        let capture = mesh.capture_wire().expect("capture");
        send_all(&a, &lines);
        #[expect(clippy::cast_precision_loss, reason = "a handful of packets")]
        let sent = lines.len() as f64;
        eventually("every packet to be dropped and counted", SOON, || {
            (drops(&mesh, "bypass") + drops(&mesh, "tunnel_port") >= sent).then_some(())
        })
        .expect("counted");
        let seen = capture.stop().expect("stop");
        seen.complete().expect("no frame lost");
        assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
    }
}

/// Script that connects from a local port, prints a line, and prints another when the connection closes.
const FROM_PORT: &str = "
import socket, sys
family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
c = socket.socket(family, socket.SOCK_STREAM)
c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
c.bind((sys.argv[1], int(sys.argv[3])))
c.connect((sys.argv[2], 8080)); print('connected', flush=True)
try:
    c.recv(1); print('closed')
except OSError:
    print('reset')
";

#[test]
fn tunnel_port_as_source_port_does_not_escape_policy() {
    for (app, direction) in [("a", "Egress"), ("b", "Ingress"), ("n", "Ingress")] {
        let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
        let a = mesh.pod("a");
        let to = mesh.pod(if app == "n" { "n" } else { "b" });
        let _server = to.serve("--tcp [::]:8080").expect("server");
        // The control: another source port.
        let clients: Vec<_> = pairs(&a, &to)
            .into_iter()
            .flat_map(|(own, peer)| [("15008", own, peer), ("15009", own, peer)])
            .map(|(port, own, peer)| {
                let args = [own.to_string(), peer.to_string(), port.to_owned()];
                let client = Cmd::new("python3").args(["-uc", FROM_PORT]);
                let client = a.spawn_lines(client.args(args)).expect("python3");
                assert_eq!(client.next_line(SOON).expect("a line"), "connected");
                (port, peer, client)
            })
            .collect();
        mesh.enforce(&isolate("default", app, direction))
            .expect("in force");
        for (port, peer, client) in clients {
            let end = client.next_line(SOON);
            let end = end.with_context(|| format!("{port} to {peer}, {app} {direction}"));
            assert_eq!(end.expect("the end"), "reset");
        }
    }
}

/// A network namespace nested in the pod, behind a masquerade to the pod's own address.
const NESTED: &str = "
set -e
unshare -n sleep 60 & inner=$!
trap 'kill $inner' EXIT
until [ \"$(readlink /proc/$inner/ns/net)\" != \"$(readlink /proc/$$/ns/net)\" ]; do :; done
ip link add nested type veth peer name inside netns $inner
ip addr add 172.31.0.1/30 dev nested
ip link set nested up
nsenter -t $inner -n ip addr add 172.31.0.2/30 dev inside
nsenter -t $inner -n ip link set inside up
nsenter -t $inner -n ip route add default via 172.31.0.1
echo 1 > /proc/sys/net/ipv4/ip_forward
nft add table ip nested
nft 'add chain ip nested out { type nat hook postrouting priority 100; }'
nft add rule ip nested out ip saddr 172.31.0.0/30 masquerade
until nsenter -t $inner -n ping -c1 -W1 172.31.0.1 >/dev/null; do :; done
nsenter -t $inner -n curl -sS --max-time 3 http://SERVER:8080/MARKER
";

fn nested(a: &Pod, b: &Pod) -> bool {
    let script = NESTED
        .replace("SERVER", &b.v4().to_string())
        .replace("MARKER", MARKER);
    let output = a.run(Cmd::shell(&script), SOON).expect("run");
    output.status.success()
}

#[test]
fn nested_network_namespace_cannot_bypass_tunnel() {
    let plain = lab(Topology::Routed);
    let _server = nginx(&plain.pod("b"));
    let capture = plain.capture_wire().expect("capture");
    let _reached = nested(&plain.pod("a"), &plain.pod("b"));
    let seen = capture.stop().expect("stop");
    assert_ne!(seen.find(MARKER.as_bytes()).expect("search"), [], "control");
    drop(plain);

    let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let _server = nginx(&mesh.pod("b"));
    let capture = mesh.capture_wire().expect("capture");
    assert!(!nested(&mesh.pod("a"), &mesh.pod("b")));
    assert!(drops(&mesh, "bypass") >= 1.0);
    let seen = capture.stop().expect("stop");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
}

fn nginx(pod: &Pod) -> mesh_test::apps::Nginx {
    let content = mesh_test::apps::Content::Files(&[(MARKER, b"served\n")]);
    mesh_test::apps::Nginx::start(pod, 8080, content).expect("nginx")
}

#[test]
fn flushing_rules_in_pod_fails_closed() {
    let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = nginx(&b);
    let capture = mesh.capture_wire().expect("capture");
    let url = format!("http://{}:8080/{MARKER}", b.v4());
    // Flushed again and again while a client tries, so that it meets the pod without rules.
    let script = format!(
        "( while :; do ip rule del priority 9000; done 2>/dev/null ) & flusher=$!
         for i in 1 2 3; do curl -s --max-time 1 {url}; done
         kill $flusher"
    );
    let _outcome = a.run(Cmd::shell(&script), SOON).expect("run");
    // The agent restores the rules and logs it.
    eventually("the rules to be repaired", SOON, || {
        let page = a.curl(&url).ok()?;
        (page.text() == "served\n").then_some(())
    })
    .expect("works again");
    let seen = capture.stop().expect("stop");
    seen.complete().expect("no frame lost");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
    let log = mesh.agent_of(&a).log_tail();
    assert!(log.contains("restored network configuration"), "{log}");
}

#[test]
fn killed_agent_fails_closed() {
    let mut mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = nginx(&b);
    let url = format!("http://{}:8080/{MARKER}", b.v4());
    a.curl(&url).expect("run").ok().expect("works before");
    let capture = mesh.capture_wire().expect("capture");
    let dead = mesh.agents[0].process().id();
    mesh.agents[0].kill_9().expect("kill");

    let refused = a.curl(&url).expect("run");
    assert_eq!(refused.status.code(), Some(7), "curl: connection refused");
    // A process of the pod with the pid of the dead agent is nobody special. Other processes of
    // the machine may take the pid first: then it is tried again.
    let last = dead - 1;
    let script = format!(
        "while :; do
           echo {last} > /proc/sys/kernel/ns_last_pid
           sh -c 'test $$ = {dead} && exec curl -sS --max-time 3 {url}' && exit 0
           code=$?; test $code = 1 || exit $code
         done"
    );
    let reused = a
        .run(Cmd::shell(&script), Duration::from_secs(60))
        .expect("run");
    assert_eq!(reused.status.code(), Some(7), "{}", reused.text());

    mesh.agents[0].start_again().expect("a successor");
    eventually("the successor to carry", SOON, || {
        (a.curl(&url).ok()?.text() == "served\n").then_some(())
    })
    .expect("works again");
    let seen = capture.stop().expect("stop");
    seen.complete().expect("no frame lost");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
}

/// Agents on both nodes, and a pod on each whose namespace is not enrolled yet.
fn not_enrolled() -> Mesh {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

#[test]
fn strict_enrollment_closes_older_plaintext_connections() {
    let mesh = not_enrolled();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve("--tcp [::]:8080").expect("server");
    let to = at(b.v4().into(), 8080);
    let client = a
        .start_probe(&format!(
            "hold --to {to} --count 1 --pulse-ms 20 --timeout-ms 3000"
        ))
        .expect("client");
    let opened = client.line(SOON).expect("line").expect("open");
    assert!(opened.contains("open"), "{opened}");
    mesh.apply_text("strict", STRICT).expect("apply");
    mesh.enrol("default").expect("enrol");
    let closed = client.line(SOON).expect("line").expect("closed");
    assert!(closed.contains("closed"), "{closed}");
}

/// Datagrams under addresses that are not their sender's, towards `a`.
fn spoofs(lab: &Lab) -> Vec<(String, String)> {
    let (a, n, u, b) = (lab.pod("a"), lab.pod("n"), lab.pod("u"), lab.pod("b"));
    let mut all = Vec::new();
    for (sender, who) in [("n", &n), ("u", &u), ("outside", &n)] {
        for ((own, _), ((third, _), (far, _))) in pairs(&a, &a)
            .into_iter()
            .zip(pairs(&n, &n).into_iter().zip(pairs(&b, &b)))
        {
            let other = if sender == "n" {
                lab.pod("u").addresses()[usize::from(own.is_ipv6())]
            } else {
                third
            };
            let _ = who;
            for source in [other, own] {
                let (src, dst) = (at(source, 7), at(own, 7000));
                all.push((
                    sender.to_owned(),
                    format!("raw --proto udp --src {src} --dst {dst} --payload {MARKER}"),
                ));
            }
            if sender != "outside" {
                let (src, dst) = (at(far, 7), at(own, 7000));
                all.push((
                    sender.to_owned(),
                    format!("raw --proto udp --src {src} --dst {dst} --payload {MARKER}"),
                ));
            }
        }
    }
    all
}

#[test]
fn spoofed_pod_addresses_are_dropped() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let arrived = |lab: &Lab| {
            let a = lab.pod("a");
            let capture =
                Capture::start(&a, &Scope::Interface("eth0".to_owned())).expect("capture");
            for (sender, line) in spoofs(lab) {
                let cmd = probe_cmd(&line).expect("probe").cap_net_raw_only();
                let place: &mesh_test::Host = match sender.as_str() {
                    "outside" => lab.outside().expect("outside"),
                    name => &lab.pod(name),
                };
                let _sent = place.run(cmd, SOON).expect("run");
            }
            // A true datagram behind them: when it has arrived, they would have.
            let (own, neighbour) = (at(a.v4().into(), 7000), at(lab.pod("n").v4().into(), 9));
            let last = format!("raw --proto udp --src {neighbour} --dst {own} --payload the-end");
            lab.pod("n").probe(&last).expect("run").ok().expect("sent");
            let seen = eventually("the last datagram", SOON, || {
                let seen = capture.so_far().ok()?;
                (!seen.find(b"the-end").ok()?.is_empty()).then_some(seen)
            })
            .expect("the last datagram");
            seen.find(MARKER.as_bytes()).expect("search").len()
        };
        let control = arrived(&lab(topology));
        assert!(
            control >= 6,
            "{topology:?}: only {control} arrive without the mesh"
        );

        let mesh = Mesh::start(lab(topology)).expect("mesh");
        assert_eq!(arrived(&mesh), 0, "{topology:?}");
        assert!(drops(&mesh, "spoofed") >= 6.0);
    }
}

#[test]
fn spoofed_neighbor_announcements_are_dropped() {
    let claims = |lab: &Lab| {
        let (a, n, u) = (lab.pod("a"), lab.pod("n"), lab.pod("u"));
        let capture = Capture::start(&a, &Scope::Interface("eth0".to_owned())).expect("capture");
        let arp = format!(
            "arp --reply --count 3 --interval-ms 5 --src-mac {} --dst-mac {} --sender-ip {} \
             --target-ip {}",
            u.mac(),
            a.mac(),
            n.v4(),
            a.v4()
        );
        let nd = format!(
            "advertise --count 3 --interval-ms 5 --src-mac {} --dst-mac {} --src {} --dst {} \
             --target {}",
            u.mac(),
            a.mac(),
            u.v6(),
            a.v6(),
            n.v6()
        );
        for line in [arp, nd] {
            let cmd = probe_cmd(&line).expect("probe").cap_net_raw_only();
            u.run(cmd, SOON).expect("run").ok().expect(&line);
        }
        let (own, neighbour) = (at(a.v4().into(), 7000), at(n.v4().into(), 9));
        let last = format!("raw --proto udp --src {neighbour} --dst {own} --payload the-end");
        n.probe(&last).expect("run").ok().expect("sent");
        let seen = eventually("the last datagram", SOON, || {
            let seen = capture.so_far().ok()?;
            (!seen.find(b"the-end").ok()?.is_empty()).then_some(seen)
        })
        .expect("the last datagram");
        let mac = mac_bytes(&u.mac());
        let holds = |frame: &[u8], part: &[u8]| frame.windows(part.len()).any(|at| at == part);
        let about = [n.v4().octets().to_vec(), n.v6().octets().to_vec()];
        about.map(|claimed| {
            seen.frames()
                .filter(|frame| holds(frame, &mac) && holds(frame, &claimed))
                .count()
        })
    };
    assert_eq!(claims(&lab(Topology::Bridged)), [3, 3], "control");
    let mesh = Mesh::start(lab(Topology::Bridged)).expect("mesh");
    assert_eq!(claims(&mesh), [0, 0]);
    assert!(drops(&mesh, "spoofed") >= 6.0);
}

fn mac_bytes(text: &str) -> Vec<u8> {
    text.split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("a MAC address"))
        .collect()
}

#[test]
fn masqueraded_traffic_is_world_and_kubelet_probes_pass() {
    let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let a = mesh.pod("a");
    let _server = nginx(&a);
    let node = mesh.node(1);
    let rules = format!(
        "table ip nodeport {{
           chain pre {{ type nat hook prerouting priority -100; ip daddr 192.168.50.1 tcp dport 30080 dnat to {}:8080; }}
           chain post {{ type nat hook postrouting priority 100; ip daddr {} tcp dport 8080 ct status dnat masquerade; }}
         }}",
        a.v4(),
        a.v4()
    );
    node.run(Cmd::new("nft").args(["-f", "-"]).input(rules), SOON)
        .expect("nft")
        .ok()
        .expect("rules");
    let curl = |url: &str| Cmd::line(&format!("curl -sS --max-time 3 {url}"));
    let outside = format!("http://192.168.50.1:30080/{MARKER}");
    let probe = format!("http://{}:8080/{MARKER}", a.v4());
    let through = || {
        mesh.outside()
            .expect("outside")
            .run(curl(&outside), SOON)
            .expect("run")
            .status
            .success()
    };
    assert!(through(), "control: Permissive lets it in");
    mesh.apply_text("strict", STRICT).expect("apply");
    eventually("Strict to refuse what is not mTLS", SOON, || {
        (!through()).then_some(())
    })
    .expect("refused");
    let probed = node.run(curl(&probe), SOON).expect("run");
    assert!(
        probed.status.success(),
        "kubelet's probes pass: {}",
        probed.text()
    );
    assert!(!through());
}

#[test]
fn listener_on_agent_ports_receives_nothing() {
    let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = nginx(&b);
    // Root of the pod, with SO_REUSEPORT: on the tunnel's port it may bind, on the agent's own
    // listeners it may not.
    let impostor = b
        .serve("--tcp [::]:15008 --reuseport --report")
        .expect("binds");
    let listeners: Vec<_> = b
        .tcp_sockets()
        .expect("ss")
        .into_iter()
        .filter_map(|socket| socket.local)
        .filter(|local| local.ip().is_loopback())
        .collect();
    assert!(listeners.len() >= 4, "the agent's listeners: {listeners:?}");
    for listener in listeners {
        let stolen = b.serve(&format!("--tcp {listener} --reuseport"));
        assert!(stolen.is_err(), "{listener} could be bound, too");
    }
    let url = format!("http://{}:8080/{MARKER}", b.v4());
    for _ in 0..20 {
        let page = a.curl(&url).expect("run").ok().expect("curl");
        assert_eq!(page.text(), "served\n");
    }
    let arrived = impostor.line(Duration::from_millis(500)).ok().flatten();
    assert_eq!(arrived, None, "a tunnel went to the impostor");
}

/// A connection that says its port, and ends when a file is there.
const OLD: &str = "
import os, socket, sys, time
c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); print(c.getsockname()[1])
while not os.path.exists(sys.argv[3]): time.sleep(0.02)
c.close(); print('closed')
";

/// The plaintext exception of a connection older than the enrollment ends with that connection.
#[test]
fn reused_four_tuple_of_closed_connection_is_not_plaintext() {
    let mesh = not_enrolled();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve("--tcp [::]:8080").expect("server");
    let end = mesh.dir().join("end").display().to_string();
    let to = at(b.v4().into(), 8080);
    let args = [to.ip().to_string(), to.port().to_string(), end.clone()];
    let client = Cmd::new("python3").args(["-uc", OLD]).args(args);
    let client = a.spawn_lines(client).expect("python3");
    let port = client
        .next_line(SOON)
        .expect("a line")
        .parse()
        .expect("a port");
    mesh.enrol("default").expect("enrol");
    // A connection that is new is tunnelled by now, so that the old one is an exception.
    let tunnelled = || {
        let report = a
            .probe(&format!("tcp --to {to}"))
            .ok()?
            .json::<Tcp>()
            .ok()?;
        let made = mesh.metric("mesh_tls_handshakes_total", &[]).ok()?;
        (report.ok && made > 0.0).then_some(())
    };
    eventually("tunnels", SOON, tunnelled).expect("tunnels");
    let src = at(a.v4().into(), port);
    let forged = |word: &str| {
        let line = format!("raw --src {src} --dst {to} --flags A --payload {word}");
        send_all(&a, &[line]);
    };
    let capture = mesh.capture_wire().expect("capture");
    // The control: while it is open, its segments pass, whoever has made them.
    forged("WHILE-OPEN");
    let passed = || {
        let hits = capture.so_far().ok()?.find(b"WHILE-OPEN").ok()?;
        (hits.len() == 1).then_some(())
    };
    eventually("the control", SOON, passed).expect("on the wire");
    // By then nothing is looked at any more because of the enrolment: that would end it, too.
    std::thread::sleep(Duration::from_secs(2));
    std::fs::write(&end, "").expect("end");
    assert_eq!(client.next_line(SOON).expect("a line"), "closed");
    let before = drops(&mesh, "bypass");
    let dropped = || {
        forged("AFTERWARDS");
        (drops(&mesh, "bypass") > before).then_some(())
    };
    eventually("it to be over", Duration::from_secs(2), dropped).expect("dropped");
    // From then on nothing passes.
    let passed = capture.so_far().expect("capture");
    let until_then = passed.find(b"AFTERWARDS").expect("search").len();
    for _ in 0..5 {
        forged("AFTERWARDS");
    }
    let seen = capture.stop().expect("stop");
    seen.complete().expect("no frame lost");
    let all = seen.find(b"AFTERWARDS").expect("search").len();
    assert_eq!(all, until_then, "it goes on");
}
