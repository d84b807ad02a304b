// SPDX-License-Identifier: Apache-2.0
//! Handshakes that are begun and left, by the thousand, at one pod's tunnel port: what a neighbour
//! of that pod notices, and what is left behind.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::mesh::{ENROLLED, TUNNEL_PORT, sum};
use mesh_test::reports::Storm;
use mesh_test::{Cmd, Lab, Mesh, PodSpec, Proc, Topology, eventually};

const SOON: Duration = Duration::from_secs(30);
const PORT: u16 = 7000;
const ROUNDS: usize = 5;

/// Keeps 1,500 connections open that have sent a whole ClientHello and then nothing: the server has
/// done its part of the handshake for each. What is closed is opened again, 2,000 a second at most:
/// faster, the measurement would be of this program's own share of the processors.
const FLOOD: &str = r#"
import resource, select, socket, ssl, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
to, count = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.set_alpn_protocols(["mesh/1"])
def hello():
    given, taken = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(given, taken).do_handshake()
    except ssl.SSLWantReadError:
        return taken.read()
hello = hello()
epoll, conns, opened, told = select.epoll(), {}, 0, False
missing, last = count, 0.0
def begin():
    c = socket.socket()
    c.setblocking(False)
    c.connect_ex(to)
    conns[c.fileno()] = c
    epoll.register(c, select.EPOLLOUT | select.EPOLLRDHUP)
while True:
    if time.monotonic() - last >= 0.01:
        last = time.monotonic()
        for _ in range(min(missing, 20)):
            begin()
            missing -= 1
    for fd, event in epoll.poll(0.01):
        c, over = conns[fd], event & (select.EPOLLERR | select.EPOLLHUP | select.EPOLLRDHUP)
        if not over:
            try:
                c.send(hello)
                opened += 1
                epoll.modify(fd, select.EPOLLRDHUP)
            except ConnectionError:
                # Refused a place since it was looked at.
                over = True
        if over:
            epoll.unregister(fd)
            del conns[fd]
            c.close()
            missing += 1
    if opened >= 500 and not told:
        told = True
        print("up", flush=True)
"#;

/// Descriptors that a process has open.
fn descriptors(of: &Proc) -> usize {
    let open = std::fs::read_dir(format!("/proc/{}/fd", of.id()));
    open.expect("it runs").count()
}

#[test]
fn half_open_handshakes_by_the_thousand_leave_a_neighbours_connections_alone() {
    let lab = Lab::builder(Topology::Routed)
        .outside()
        .namespace("default", &[ENROLLED])
        .pod(PodSpec::new("a", 1))
        .pod(PodSpec::new("victim", 2))
        .pod(PodSpec::new("neighbour", 2))
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let (a, victim, neighbour) = (mesh.pod("a"), mesh.pod("victim"), mesh.pod("neighbour"));
    let _server = neighbour
        .serve(&format!("--tcp [::]:{PORT}"))
        .expect("server");
    let storm = || {
        let to = SocketAddr::new(neighbour.v4().into(), PORT);
        let line = format!("storm --to {to} --threads 2 --count 500");
        let storm: Storm = a.probe(&line).expect("run").json().expect("a report");
        assert_eq!(
            (storm.ok, storm.wrong, storm.failed),
            (500, 0, 0),
            "{storm:?}"
        );
        storm.p99_us
    };
    let flood = || {
        let args = [
            victim.v4().to_string(),
            TUNNEL_PORT.to_string(),
            "1500".to_owned(),
        ];
        let cmd = Cmd::new("python3").args(["-uc", FLOOD]).args(args);
        let flood = mesh
            .outside()
            .expect("outside")
            .spawn_lines(cmd)
            .expect("python3");
        assert_eq!(flood.said(SOON).expect("a line in time"), "up");
        flood
    };
    storm();
    let agent = mesh.agent(2);
    let before = descriptors(agent.process());
    let [mut alone, mut beside] = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        alone.push(storm());
        let mut flood = flood();
        beside.push(storm());
        flood.kill().expect("kill");
    }
    let page = agent.metrics().expect("metrics");
    let count = |result| {
        sum(
            &page,
            "mesh_tls_handshakes_total",
            &[("role", "server"), ("result", result)],
        )
    };
    let seconds = |pod| sum(&page, "mesh_worker_seconds_total", &[("workload", pod)]);
    println!(
        "p99 of a neighbour's connections, us: {alone:?} without, {beside:?} with the flood; \
         handshakes that timed out {}, were closed {}, were refused a place {}; \
         seconds of workers for the victim {:.2}, for the neighbour {:.2}",
        count("timeout"),
        count("closed"),
        count("limit_reached"),
        seconds("victim"),
        seconds("neighbour"),
    );
    // Each is counted, and none is left.
    assert!(count("timeout") + count("closed") >= 500.0);
    let left = || descriptors(agent.process());
    let gone = eventually("its connections to be gone", SOON, || {
        (left() <= before + 16).then_some(())
    });
    assert!(
        gone.is_ok(),
        "{before} descriptors before, {} after",
        left()
    );
}
