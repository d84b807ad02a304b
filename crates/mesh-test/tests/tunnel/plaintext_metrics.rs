// SPDX-License-Identifier: Apache-2.0
//! `mesh_unencrypted_bytes_total` equals what the applications count, to the byte: all traffic without
//! mTLS, at each endpoint, by reason.

use std::time::Duration;

use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::reports::Storm;
use mesh_test::{Lab, Mesh, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;
const METRIC: &str = "mesh_unencrypted_bytes_total";

/// Pods of the mesh on both nodes, two of them on the first, and one beside it on the second.
fn mesh() -> Mesh {
    let plain = PodSpec::new("plain", 2).namespace("plain");
    let specs = [
        PodSpec::new("a", 1),
        PodSpec::new("near", 1),
        PodSpec::new("far", 2),
        plain,
    ];
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pods(specs)
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a counter far below 2^53"
)]
fn counted(mesh: &Mesh, node: u8, reason: &str) -> u64 {
    let page = mesh.agent(node).metrics().expect("metrics");
    sum(&page, METRIC, &[("reason", reason)]) as u64
}

/// Every reason and what it has counted, of one node.
fn page(mesh: &Mesh, node: u8) -> String {
    let page = mesh.agent(node).metrics().expect("metrics");
    let lines = page.lines().filter(|line| line.starts_with(METRIC));
    lines.map(|line| format!("node {node}: {line}\n")).collect()
}

/// Checks that the counters of both nodes grow by these: node, reason, bytes.
fn grows(mesh: &Mesh, what: &str, by: &[(u8, &str, u64)], traffic: impl FnOnce() -> u64) {
    let before: Vec<u64> = by
        .iter()
        .map(|(node, reason, _)| counted(mesh, *node, reason))
        .collect();
    let all = |mesh: &Mesh| -> f64 { mesh.metric(METRIC, &[]).expect("metrics") };
    let total = all(mesh);
    let bytes = traffic();
    assert!(bytes > 0, "{what}: nothing was sent");
    let grown = || -> Vec<u64> {
        let now = by
            .iter()
            .map(|(node, reason, _)| counted(mesh, *node, reason));
        now.zip(&before).map(|(now, before)| now - before).collect()
    };
    let expected: Vec<u64> = by.iter().map(|(_, _, times)| bytes * times).collect();
    // The last connection ends a moment after its client has.
    let complete = eventually("the bytes to be counted", SOON, || {
        (grown() == expected).then_some(())
    });
    assert_eq!(
        grown(),
        expected,
        "{what}: {complete:?}\n{}{}",
        page(mesh, 1),
        page(mesh, 2)
    );
    // And under no other reason.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let sum = expected.iter().sum::<u64>() as f64;
    assert_eq!((all(mesh) - total).to_string(), sum.to_string(), "{what}");
}

/// Bytes that a client wrote and read in 200 short connections.
fn storm(from: &Pod, to: &Pod) -> u64 {
    let line = format!("storm --to {} --count 200 --threads 2", to.at(PORT)[0]);
    let storm: Storm = from.probe(&line).expect("run").json().expect("a report");
    assert_eq!(
        (storm.ok, storm.wrong, storm.failed),
        (200, 0, 0),
        "{storm:?}"
    );
    storm.bytes_sent + storm.bytes_received
}

/// Each end counts both directions of what leaves its node; on one node each end counts what it
/// sends.
#[test]
fn plaintext_connections_are_counted_at_both_endpoints_by_reason() {
    let mesh = mesh();
    let [a, near, far, plain] = ["a", "near", "far", "plain"].map(|name| mesh.pod(name));
    let listen = format!("--tcp [::]:{PORT}");
    let _servers = [&a, &near, &far, &plain].map(|pod| pod.serve(&listen).expect("server"));
    let rows = [
        (
            "to a pod outside the mesh",
            &a,
            &plain,
            vec![(1, "peer_not_enrolled", 1), (2, "opted_out", 1)],
        ),
        (
            "from a pod outside the mesh",
            &plain,
            &a,
            vec![(2, "opted_out", 1), (1, "permissive_plaintext", 1)],
        ),
        ("on one node", &a, &near, vec![(1, "same_node", 1)]),
        (
            "on one node, outside the mesh",
            &plain,
            &far,
            vec![(2, "same_node", 1)],
        ),
    ];
    for (what, from, to, by) in rows {
        grows(&mesh, what, &by, || storm(from, to));
    }
    // The control: under mTLS nothing is counted.
    let before = mesh.metric(METRIC, &[]).expect("metrics");
    storm(&a, &far);
    let after = mesh.metric(METRIC, &[]).expect("metrics");
    assert_eq!(before.to_string(), after.to_string());
}

/// Sends datagrams to a server that sends each back, and says how many bytes went each way.
const DATAGRAMS: &str = "
import socket, sys
c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); c.settimeout(5)
c.connect((sys.argv[1], int(sys.argv[2]))); sent = received = 0
for i in range(200):
    sent += c.send(b'x' * (i + 1)); received += len(c.recv(2000))
print(sent + received)
";

const MIRROR: &str = "
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', int(sys.argv[1]))); print('up')
while True:
    data, who = s.recvfrom(2000); s.sendto(data, who)
";

#[test]
fn plaintext_datagrams_are_counted_at_both_endpoints() {
    let mesh = mesh();
    let (a, far) = (mesh.pod("a"), mesh.pod("far"));
    let server = far.python(MIRROR, &[&PORT.to_string()]).expect("python3");
    assert_eq!(server.next_line(SOON).expect("a line in time"), "up");
    grows(&mesh, "udp", &[(1, "udp", 1), (2, "udp", 1)], || {
        let client = a
            .python(DATAGRAMS, &[&far.v4().to_string(), &PORT.to_string()])
            .expect("python3");
        client
            .next_line(SOON)
            .expect("a line in time")
            .parse()
            .expect("bytes")
    });
}

/// Opens a connection, waits to be told to go on, and says how many bytes it then exchanged.
const PATIENT: &str = "
import socket, sys
c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); c.settimeout(15)
c.sendall(b'ECHO\\n' + b'before'); c.recv(6, socket.MSG_WAITALL); print('open')
sys.stdin.readline()
for i in range(50):
    c.sendall(b'x' * 1000); c.recv(1000, socket.MSG_WAITALL)
c.shutdown(socket.SHUT_WR); c.recv(1); print(5 + 12 + 100000)
";

#[test]
fn connection_older_than_enrollment_is_counted_as_plaintext() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[])
        .pods([("a", 1), ("far", 2)])
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let (a, far) = (mesh.pod("a"), mesh.pod("far"));
    let _server = far.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let to = far.at(PORT)[0];
    let script = PATIENT.replace(
        "sys.stdin.readline()",
        "import time, os\nwhile not os.path.exists(sys.argv[3]): time.sleep(0.05)",
    );
    let go = mesh.dir().join("go").display().to_string();
    let client = a
        .python(
            &script,
            &[&to.ip().to_string(), &to.port().to_string(), &go],
        )
        .expect("python3");
    assert_eq!(client.next_line(SOON).expect("a line in time"), "open");
    mesh.enrol("default").expect("enrol");
    eventually("both to be enrolled", SOON, || {
        let enrolled = mesh.metric("mesh_pods", &[("state", "enrolled")]).ok()?;
        (enrolled >= 2.0).then_some(())
    })
    .expect("enrolled");
    std::fs::write(&go, "").expect("go");
    let bytes: u64 = client
        .next_line(SOON)
        .expect("a line in time")
        .parse()
        .expect("bytes");
    let both = |reason| [1, 2].map(|node| counted(&mesh, node, reason));
    let complete = eventually("the bytes to be counted", SOON, || {
        (both("pre_enrolment") == [bytes; 2]).then_some(())
    });
    assert_eq!(
        (both("pre_enrolment"), both("opted_out")),
        ([bytes; 2], [0; 2]),
        "{complete:?}\n{}{}",
        page(&mesh, 1),
        page(&mesh, 2)
    );
}
