// SPDX-License-Identifier: Apache-2.0
//! Tunnels do not change the stream of bytes that both applications see; and the cost of many of them.

use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::Storm;
use mesh_test::{Agent, Lab, Mesh, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(300);
const PORT: u16 = 7000;
const MIB: u64 = 1 << 20;

fn mesh() -> Mesh {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

/// Sends so many bytes by chance while it receives until the end, and then says what went each way:
/// length and SHA-256. The server accepts one connection.
const BOTH_WAYS: &str = r#"
import hashlib, os, socket, sys, threading
role, host, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if role == "server":
    listener = socket.create_server((host, port))
    print("up")
    c, _ = listener.accept()
else:
    c = socket.create_connection((host, port))
sent, seen = [0, hashlib.sha256()], [0, hashlib.sha256()]
def send():
    block = os.urandom(1 << 20)
    while sent[0] < count:
        # Another block each time, and not of a round length.
        block = block[7919:] + block[:7919]
        part = block[:min(len(block) - 13, count - sent[0])]
        c.sendall(part)
        sent[0] += len(part)
        sent[1].update(part)
    c.shutdown(socket.SHUT_WR)
sender = threading.Thread(target=send)
sender.start()
buffer = bytearray(1 << 20)
while n := c.recv_into(buffer):
    seen[0] += n
    seen[1].update(memoryview(buffer)[:n])
sender.join()
for count, digest in (sent, seen):
    print(count, digest.hexdigest())
"#;

#[test]
fn bidirectional_gibibyte_arrives_intact() {
    let mesh = mesh();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let (host, port) = (b.v4().to_string(), PORT.to_string());
    let count = (1_u64 << 30).to_string();
    let server = b
        .python(BOTH_WAYS, &["server", &host, &port, &count])
        .expect("python3");
    assert_eq!(server.next_line(SOON).expect("a line in time"), "up");
    let begun = std::time::Instant::now();
    let client = a
        .python(BOTH_WAYS, &["client", &host, &port, &count])
        .expect("python3");
    let [sent, received] = [
        client.next_line(LONG).expect("a line in time"),
        client.next_line(SOON).expect("a line in time"),
    ];
    let took = begun.elapsed();
    assert_eq!(
        [
            server.next_line(SOON).expect("a line in time"),
            server.next_line(SOON).expect("a line in time")
        ],
        [received.clone(), sent.clone()]
    );
    assert!(sent.starts_with(&format!("{count} ")), "{sent}");
    assert!(received.starts_with(&format!("{count} ")), "{received}");
    assert_ne!(sent, received, "each has bytes of its own");
    println!("1 GiB each way at once in {took:.1?}");
}

/// Ends its connection as it is told, after one exchange of bytes: `reset` with RST, `wait` = tells
/// how the other side did.
const ENDS: &str = r#"
import socket, struct, sys
role, host, port, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
if role == "server":
    listener = socket.create_server((host, port))
    print("up")
    c, _ = listener.accept()
else:
    c = socket.create_connection((host, port))
c.settimeout(15)
c.sendall(b"hello")
while c.recv(5, socket.MSG_WAITALL) != b"hello":
    pass
if how == "reset":
    # The other side has read everything, and waits.
    c.recv(1)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()
    print("reset")
else:
    c.sendall(b"!")
    try:
        print(repr(c.recv(1)))
    except OSError as e:
        print(type(e).__name__)
"#;

#[test]
fn reset_is_relayed_in_both_directions() {
    let mesh = mesh();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    for (port, serving, asking) in [("7001", "reset", "wait"), ("7002", "wait", "reset")] {
        let host = b.v4().to_string();
        let server = b
            .python(ENDS, &["server", &host, port, serving])
            .expect("python3");
        assert_eq!(server.next_line(SOON).expect("a line in time"), "up");
        let client = a
            .python(ENDS, &["client", &host, port, asking])
            .expect("python3");
        let mut ends = [
            server.next_line(SOON).expect("a line in time"),
            client.next_line(SOON).expect("a line in time"),
        ];
        ends.sort();
        assert_eq!(
            ends,
            ["ConnectionResetError", "reset"],
            "the server is to {serving}"
        );
    }
}

/// Opens connections and writes until none takes more for a second; says how much they took.
const WRITERS: &str = r#"
import select, socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
conns = [socket.create_connection((host, port)) for _ in range(count)]
for c in conns:
    c.setblocking(False)
block, taken = b"x" * (1 << 18), 0
while True:
    ready = select.select([], conns, [], 1)[1]
    if not ready:
        break
    for c in ready:
        taken += c.send(block)
print(taken)
time.sleep(60)
"#;

/// Accepts and reads nothing.
const DEAF: &str = r#"
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=128)
print("up")
kept = []
while True:
    kept.append(listener.accept())
"#;

fn resident(agents: &[Agent]) -> Vec<u64> {
    let of = |agent: &Agent| agent.process().resident_bytes().expect("its memory");
    agents.iter().map(of).collect()
}

#[test]
fn stalled_readers_cost_only_their_buffers() {
    let mesh = mesh();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let (host, port) = (b.v4().to_string(), PORT.to_string());
    let server = b.python(DEAF, &[&host, &port]).expect("python3");
    assert_eq!(server.next_line(SOON).expect("a line in time"), "up");
    // What is loaded once is loaded.
    let one = a.python(WRITERS, &[&host, &port, "1"]).expect("python3");
    let first: u64 = one
        .next_line(SOON)
        .expect("a line in time")
        .parse()
        .expect("bytes");
    let before = resident(&mesh.agents);
    let many = a.python(WRITERS, &[&host, &port, "40"]).expect("python3");
    let taken: u64 = many
        .next_line(LONG)
        .expect("a line in time")
        .parse()
        .expect("bytes");
    let after = resident(&mesh.agents);
    // Far more than the agents may keep was written: it lies in sockets, where TCP bounds it.
    let bound = 40 * 2 * 256 * 1024 + 4 * MIB;
    println!("1 writer: {first} bytes, 40 more: {taken}; agents: {before:?} then {after:?}");
    assert!(taken > bound, "{taken}: nothing was to be held back");
    for (before, after) in before.iter().zip(&after) {
        assert!(
            after.saturating_sub(*before) < bound,
            "{before} then {after}"
        );
    }
}

#[test]
fn thousand_concurrent_connections_are_answered() {
    let mesh = mesh();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let script = r#"
import socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
conns = [socket.create_connection((host, port)) for _ in range(count)]
for c in conns:
    c.settimeout(30)
    c.sendall(b"ID\n")
# Every one of them is open now, and none has been read from.
print(sum(b"\n" in c.recv(4096) for c in conns))
"#;
    let to = b.at(PORT)[0];
    let args = [
        to.ip().to_string(),
        to.port().to_string(),
        "1000".to_owned(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let client = a.python(script, &args).expect("python3");
    assert_eq!(
        client
            .next_line(Duration::from_secs(120))
            .expect("a line in time"),
        "1000"
    );
    let finished = || {
        let flows = mesh.agent(1).flows().ok()?;
        let ours = flows
            .iter()
            .filter(|flow| flow["destination"]["port"] == PORT);
        (ours.count() >= 1000).then_some(())
    };
    eventually("a record of each", SOON, finished).expect("records");
}

#[test]
fn hundred_thousand_short_connections_across_nodes_at_default_sysctls() {
    let mesh = mesh();
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    // The client closes first, and its port is taken for 60 s: with one destination TCP itself has
    // no port left after 28,000.
    let ports = "--ports 7000-7015";
    let _server = b.serve(&format!("--tcp [::]:0 {ports}")).expect("server");
    let text = format!(
        "storm --to {} {ports} --threads 16 --count 100000",
        b.at(PORT)[0]
    );
    let storm = a.start_probe(&text).expect("storm");
    let report: Storm = serde_json::from_str(
        &storm
            .next_line(Duration::from_secs(600))
            .expect("a line in time"),
    )
    .expect("a report");
    println!(
        "100,000 connections in {:.1} s, p50 {} us, p99 {} us",
        report.seconds, report.p50_us, report.p99_us
    );
    assert_eq!(
        (report.ok, report.wrong, report.failed),
        (100_000, 0, 0),
        "{report:?}"
    );
    let failed = mesh.metric("mesh_tcp_connections_failed_total", &[]);
    assert_eq!(failed.expect("metrics").to_string(), "0");
}
