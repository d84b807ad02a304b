// SPDX-License-Identifier: Apache-2.0
//! Tunnels on the application's own port: packet filters between nodes, and networks that strip the mark
//! of tunnels.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_test::apps::{Content, Nginx};
use mesh_test::mesh::{ENROLLED, TUNNEL_PORT};
use mesh_test::reports::Storm;
use mesh_test::{AgentConfig, Cmd, Lab, Mesh, Output, Pod, PodSpec, Topology, eventually};

const MARKER: &str = "the-marker-that-must-not-be-seen";
const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;

fn lab(topology: Topology) -> Lab {
    Lab::builder(topology)
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab")
}

fn mesh(topology: Topology, port: &str) -> Mesh {
    start(lab(topology), port)
}

fn start(lab: Lab, port: &str) -> Mesh {
    let config = AgentConfig::new(&Mesh::own_ca(&lab)).flag("--tunnel-port", port);
    Mesh::start_with(lab, &config).expect("mesh")
}

fn nginx(pod: &Pod) -> Nginx {
    let page = format!("{MARKER}\n");
    Nginx::start(
        pod,
        PORT,
        Content::Files(&[("index.html", page.as_bytes())]),
    )
    .expect("nginx")
}

fn get(from: &Pod, to: SocketAddr) -> Output {
    let curl = Cmd::new("curl").args(["-sSg", "--max-time", "9", &format!("http://{to}/")]);
    from.run(curl, SOON).expect("run")
}

/// Rules of the CNI, or of something between the nodes.
fn filter(mesh: &Mesh, node: u8, rules: &str) {
    mesh.node(node)
        .run(Cmd::new("nft").args(["-f", "-"]).input(rules), SOON)
        .expect("nft")
        .ok()
        .expect("rules");
}

#[test]
fn wire_shows_application_port_and_no_plaintext() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let mesh = mesh(topology, "real");
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let server = nginx(&b);
        let capture = mesh.capture_wire().expect("capture");
        for to in b.addresses().iter().map(|ip| SocketAddr::new(*ip, PORT)) {
            for _ in 0..3 {
                assert!(get(&a, to).text().contains(MARKER), "{topology:?} {to}");
            }
        }
        let seen = capture.stop().expect("stop");
        seen.complete().expect("no frame lost");
        assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
        assert_eq!(seen.tcp_service_ports(), [PORT], "{topology:?}");
        let own = |client: SocketAddr| a.addresses().contains(&client.ip());
        assert!(
            server
                .requests()
                .expect("log")
                .iter()
                .all(|r| own(r.client))
        );
        let lost = mesh.metric("mesh_tunnel_marks_lost_total", &[]);
        assert_eq!(lost.expect("metrics").to_string(), "0");
        // Both ends know the tunnels that wait for their next connection, one of each family.
        assert_eq!(entries(&mesh, "TUNNELS"), "4", "{topology:?}");
        assert_eq!(entries(&mesh, "MARKED"), "0", "{topology:?}");
    }
}

/// Returns the number of entries of a map, of both nodes together.
fn entries(mesh: &Mesh, map: &str) -> String {
    let entries = mesh.metric("mesh_map_entries", &[("map", map)]);
    entries.expect("metrics").to_string()
}

/// Only the policy's port between the two pods, as a CNI that filters packets would have it.
fn only_the_port(a: &Pod, b: &Pod) -> String {
    let rules = |ip: &str, a: IpAddr, b: IpAddr| {
        format!(
            "{ip} saddr {a} {ip} daddr {b} tcp dport {PORT} accept
             {ip} saddr {b} {ip} daddr {a} tcp sport {PORT} accept
             {ip} saddr {a} drop
             {ip} daddr {a} drop"
        )
    };
    let four = rules("ip", a.v4().into(), b.v4().into());
    let six = rules("ip6", a.v6().into(), b.v6().into());
    format!(
        "table inet cni {{ chain forward {{ type filter hook forward priority 0;
           {four}
           {six}
         }}
         }}"
    )
}

#[test]
fn packet_filter_for_application_port_passes_tunnels() {
    for (port, passes) in [("real", true), ("15008", false)] {
        let mesh = mesh(Topology::Routed, port);
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let _server = nginx(&b);
        filter(&mesh, 2, &only_the_port(&a, &b));
        for to in b.addresses() {
            let output = get(&a, SocketAddr::new(*to, PORT));
            assert_eq!(output.text().contains(MARKER), passes, "{port} {to}");
        }
        if port == "15008" {
            // The filtered tunnels are forgotten when the agent gives up.
            let none = || (entries(&mesh, "TUNNELS") == "0").then_some(());
            eventually("no tunnels", SOON, none).expect("forgotten");
        }
    }
}

#[test]
fn stripped_mark_falls_back_to_tunnel_port_and_is_counted() {
    let mesh = mesh(Topology::Routed, "real");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = nginx(&b);
    filter(
        &mesh,
        2,
        "table inet middlebox { chain pre { type filter hook prerouting priority -300;
           tcp flags syn reset tcp option 254
         }
         }",
    );
    let capture = mesh.capture_wire().expect("capture");
    for (to, families) in b.addresses().iter().zip([1.0, 2.0]) {
        for _ in 0..3 {
            let page = get(&a, SocketAddr::new(*to, PORT));
            assert!(page.text().contains(MARKER), "{to}");
        }
        let lost = mesh.metric("mesh_tunnel_marks_lost_total", &[]);
        assert!(lost.expect("metrics") >= families, "{to}");
    }
    let seen = capture.stop().expect("stop");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
    assert!(seen.tcp_service_ports().contains(&TUNNEL_PORT));
}

#[test]
fn agents_with_and_without_application_port_interoperate() {
    let lab = lab(Topology::Routed);
    let config = AgentConfig::new(&Mesh::own_ca(&lab));
    let mut mesh = Mesh::start_with(lab, &config).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let (first, second) = (nginx(&a), nginx(&b));
    let old = mesh.agents.remove(0);
    drop(old);
    let real = config.flag("--tunnel-port", "real");
    let agent = mesh.node(1).start_agent(real).expect("agent");
    mesh.agents.insert(0, agent);
    mesh.settled().expect("settled");
    for (from, to) in [(&a, &b), (&b, &a)] {
        let to = SocketAddr::new(to.v4().into(), PORT);
        assert!(get(from, to).text().contains(MARKER), "{to}");
    }
    drop((first, second));
}

/// Many short connections, and that nothing of them is seen in clear or on another port.
fn storm_unseen(mesh: &Mesh, count: u64, what: &str) {
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let to = SocketAddr::new(b.v4().into(), PORT);
    let capture = mesh.capture_wire().expect("capture");
    let line = format!("storm --to {to} --threads 4 --count {count} --timeout-ms 15000");
    let storm: Storm = a.probe(&line).expect("run").json().expect("a report");
    assert_eq!(
        (storm.ok, storm.wrong, storm.failed),
        (count, 0, 0),
        "{what}: {storm:?}"
    );
    let seen = capture.stop().expect("stop");
    // What the server answers: long enough not to be found in ciphertext by chance.
    let answer = format!("{to} ");
    let hits = seen.find(answer.as_bytes()).expect("search");
    assert_eq!(hits, [], "{what}");
    let ports = seen.tcp_service_ports();
    let known = |port: &u16| [PORT, TUNNEL_PORT].contains(port);
    assert!(
        ports.contains(&PORT) && ports.iter().all(known),
        "{what}: {ports:?}"
    );
}

#[test]
fn syn_cookies_and_lost_syns_keep_tunnels() {
    let mesh = mesh(Topology::Routed, "real");
    let b = mesh.pod("b");
    let _server = b.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    // No state is kept for a SYN: who it was for must be known when the answer comes.
    let sysctl = Cmd::line("sysctl -qw net.ipv4.tcp_syncookies=2");
    b.run(sysctl, SOON).expect("run").ok().expect("sysctl");
    storm_unseen(&mesh, 200, "cookies");
    let cookies = Cmd::line("nstat -asz TcpExtSyncookiesRecv");
    let counted = b.run(cookies, SOON).expect("run").text();
    let received = counted.split_whitespace().rev().nth(1).unwrap_or_default();
    assert!(received.parse::<u64>().is_ok_and(|n| n > 0), "{counted}");
    // Each SYN that arrives is the first of its connection or not.
    filter(
        &mesh,
        2,
        "table inet loss { chain pre { type filter hook prerouting priority -300;
           tcp flags & (syn | ack) == syn numgen random mod 3 == 0 drop
         }
         }",
    );
    storm_unseen(&mesh, 60, "lost SYNs");
}

/// Of bytes in pairs (RFC 1071).
const CHECKSUM: &str = r#"
def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
"#;

fn python(script: &str) -> Cmd {
    Cmd::new("python3").args([
        "-c",
        &format!("import socket, struct, sys{CHECKSUM}{script}"),
    ])
}

/// Sends SYNs with the tunnels' option from as many addresses and ports as there are SYNs.
const SYNS: &str = r#"
to, port, count = socket.inet_aton(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
sent = 0
for i in range(count):
    source = bytes([198, 18, (i >> 8) & 255, i & 255])
    tcp = struct.pack(">HHIIBBHHH", 1024 + i % 60000, port, i, 0, 6 << 4, 2, 65535, 0, 0)
    tcp += bytes([0xfe, 4, 0x6d, 0x53])
    pseudo = source + to + struct.pack(">BBH", 0, 6, len(tcp))
    tcp = tcp[:16] + struct.pack(">H", checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), i & 0xffff, 0, 64, 6, 0) + source + to
    try:
        sent += s.sendto(ip + tcp, (sys.argv[1], 0)) > 0
    except OSError:
        pass
print(sent)
"#;

#[test]
fn marked_syn_flood_does_not_block_connections() {
    let lab = Lab::builder(Topology::Routed)
        .outside()
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab");
    let mesh = start(lab, "real");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let outside = mesh.outside().expect("outside");
    let args = [b.v4().to_string(), PORT.to_string(), "100000".to_owned()];
    let flood = python(SYNS).args(&args);
    let flood = outside.spawn_lines(flood).expect("python3");
    let to = SocketAddr::new(b.v4().into(), PORT);
    let storm = |count: u64| {
        let line = format!("storm --to {to} --threads 2 --count {count} --timeout-ms 15000");
        let storm: Storm = a.probe(&line).expect("run").json().expect("a report");
        assert_eq!(
            (storm.ok, storm.wrong, storm.failed),
            (count, 0, 0),
            "{storm:?}"
        );
    };
    storm(200);
    let sent = flood.line(Duration::from_secs(120)).expect("line");
    let sent: u64 = sent.expect("a number").parse().expect("a number");
    assert!(sent > 90_000, "{sent}");
    storm(200);
    // More than the map holds came; it forgets the oldest.
    let kept: f64 = entries(&mesh, "MARKED").parse().expect("a number");
    println!("{kept} of {sent} SYNs are remembered");
    let most = f64::from(mesh_common::maps::MAX_MARKED);
    assert!(kept > most / 2.0 && kept <= most, "{kept} of {sent}");
}

/// Opens a connection by hand, as its kernel does not: SYN, then, if told so, the same SYN with the
/// tunnels' option, then the rest. Says each line that comes back; ends when the other end does.
const BY_HAND: &str = r#"
own, to = socket.inet_aton(sys.argv[1]), socket.inet_aton(sys.argv[2])
port, late_mark = int(sys.argv[3]), sys.argv[4] == "late-mark"
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
s.settimeout(10)
def send(flags, seq, ack, data=b"", option=b""):
    words = 5 + len(option) // 4
    tcp = struct.pack(">HHIIBBHHH", 40000, port, seq, ack, words << 4, flags, 65535, 0, 0)
    tcp += option + data
    padded = tcp + b"\0" * (len(tcp) % 2)
    pseudo = own + to + struct.pack(">BBH", 0, 6, len(tcp))
    sum_ = struct.pack(">H", checksum(pseudo + padded))
    s.sendto(tcp[:16] + sum_ + tcp[18:], (sys.argv[2], 0))
def receive(wanted):
    while True:
        packet = s.recv(65536)[20:]
        if packet[:4] == struct.pack(">HH", port, 40000) and packet[13] & wanted:
            seq, _ack = struct.unpack(">II", packet[4:12])
            return packet[13], seq, packet[(packet[12] >> 4) * 4:]
send(2, 1000, 0)
_flags, theirs, _data = receive(2)
if late_mark:
    send(2, 1000, 0, option=bytes([0xfe, 4, 0x6d, 0x53]))
    receive(2)
send(16, 1001, theirs + 1)
send(24, 1001, theirs + 1, b"ECHO\nabcd")
heard = 0
while True:
    flags, seq, data = receive(24 | 1 | 4)
    if flags & 4:
        print("reset", flush=True)
        break
    if data:
        print(data.decode().strip(), flush=True)
        heard = seq + len(data)
        send(16, 1010, heard)
"#;

#[test]
fn mark_after_syn_does_not_turn_connection_into_tunnel() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pod(PodSpec::new("a", 1).namespace("plain"))
        .pod(PodSpec::new("b", 2))
        .build()
        .expect("lab");
    let mesh = start(lab, "real");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    // Its kernel knows nothing of the connection.
    let quiet = "table ip quiet { chain out { type filter hook output priority 0;
        tcp sport 40000 tcp flags rst drop
      }
      }";
    let nft = Cmd::new("nft").args(["-f", "-"]).input(quiet);
    a.run(nft, SOON).expect("run").ok().expect("nft");
    for (ended, late) in [(1, "unmarked"), (2, "late-mark")] {
        mesh.enforce("").expect("in force");
        let ends = [a.v4().to_string(), b.v4().to_string(), PORT.to_string()];
        let client = python(BY_HAND).args(&ends);
        let client = a.spawn_lines(client.args([late])).expect("python3");
        let heard = client.line(SOON).expect("line");
        assert_eq!(heard.as_deref(), Some("abcd"), "{late}");
        assert_eq!(entries(&mesh, "TUNNELS"), "0", "{late}");
        mesh.enforce(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {name: closed, namespace: default}\nspec: {podSelector: {}}\n",
        )
        .expect("in force");
        let end = client.line(Duration::from_secs(1)).expect("in time");
        assert_eq!(end.as_deref(), Some("reset"), "{late}");
        let recorded = eventually("a record", SOON, || {
            let flows = mesh.agent(2).flows().ok()?;
            let of_policy = flows.iter().filter(|r| r["close"] == "policy_changed");
            (of_policy.count() == ended).then_some(())
        });
        recorded.expect(late);
    }
}
