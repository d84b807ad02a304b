// SPDX-License-Identifier: Apache-2.0
//! A service with unreachable endpoints: clients do not notice as long as one endpoint is reachable,
//! within the number of retries in docs/tunnel.md.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::reports::Tcp;
use mesh_test::{Lab, Mesh, PodSpec, Topology, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 80;
const ENDPOINTS: [&str; 3] = ["one", "two", "three"];
/// Connections. The chance that none of so many has to try all endpoints is (2/3)^32.
const COUNT: usize = 32;
/// The number of other endpoints that may be tried for a connection.
const OTHERS: f64 = 2.0;

/// Services of all three endpoints: on `OPEN`'s port one of them has an application, on `CLOSED`'s
/// none.
const OPEN: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 50), 8080);
const CLOSED: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 51), 8081);

fn service(mesh: &Mesh, name: &str, (address, port): (Ipv4Addr, u16)) -> String {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "uid": name},
        "spec": {"clusterIP": address, "ports": [{"name": "tcp", "port": PORT, "protocol": "TCP"}]},
    });
    let endpoint = |name| {
        let pod = mesh.pod(name);
        json!({
            "addresses": [pod.v4()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": pod.node().name(),
        })
    };
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-1"),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "endpoints": ENDPOINTS.map(endpoint),
        "ports": [{"name": "tcp", "port": port, "protocol": "TCP"}],
    });
    format!("{service}\n---\n{slice}")
}

/// A client on node 1, and the endpoints of both services on node 2.
fn mesh() -> Mesh {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pod(PodSpec::new("client", 1))
        .pods(ENDPOINTS.map(|name| (name, 2)))
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let services = [("open", OPEN), ("closed", CLOSED)];
    let services = services.map(|(name, of)| service(&mesh, name, of));
    mesh.enforce(&services.join("\n---\n")).expect("in force");
    mesh
}

fn retried(mesh: &Mesh) -> f64 {
    let page = mesh.agent(1).metrics().expect("metrics");
    let name = "mesh_tcp_connections_retried_total";
    let all = sum(&page, name, &[]);
    let labels = [("reason", "connect_failed")];
    assert!(sum(&page, name, &labels) >= all, "for this reason only");
    all
}

/// Returns the result of a connection, and the number of other endpoints that were tried.
fn connect(mesh: &Mesh, to: SocketAddr) -> (Tcp, f64) {
    let before = retried(mesh);
    let output = mesh.pod("client").probe(&format!("tcp --to {to}"));
    let report = output.expect("run").json().expect("report");
    (report, retried(mesh) - before)
}

fn was_reset(report: &Tcp) -> bool {
    let gone = [libc::ECONNRESET, libc::EPIPE, libc::ENOTCONN];
    !report.ok && report.errno.is_some_and(|errno| gone.contains(&errno))
}

/// The records of a node, once it has as many of connections to a port.
fn records(mesh: &Mesh, node: u8, port: u16, count: usize) -> Vec<Value> {
    let of = || -> Vec<Value> {
        let flows = mesh.agent(node).flows().expect("flows").into_iter();
        flows.filter(|f| f["destination"]["port"] == port).collect()
    };
    let found = eventually("the records", SOON, || (of().len() >= count).then(of));
    let found = found.unwrap_or_else(|_late| of());
    assert_eq!(found.len(), count, "node {node}: {found:?}");
    found
}

fn with<'a>(records: &'a [Value], close: &str) -> Vec<&'a Value> {
    let all = records.iter();
    all.filter(|record| record["close"] == close).collect()
}

#[test]
fn service_with_one_reachable_endpoint_serves_every_connection() {
    let mesh = mesh();
    let listen = format!("--tcp [::]:{} --name two", OPEN.1);
    let _server = mesh.pod("two").serve(&listen).expect("server");
    let to = SocketAddr::from((OPEN.0, PORT));
    let mut often = Vec::new();
    for _ in 0..COUNT {
        let (report, others) = connect(&mesh, to);
        assert!(report.ok && report.peer == Some(to), "{report:?}");
        let seen = report.identity.expect("an identity");
        assert_eq!(seen.name, "two");
        assert_eq!(Some(seen.client), report.local, "the client's own address");
        assert!(others <= OTHERS, "{others} others for one connection");
        often.push(others);
    }
    println!("others that were tried, by connection: {often:?}");
    // Each that had to be tried occurs.
    for others in [0.0, 1.0, OTHERS] {
        assert!(often.contains(&others), "never {others}: {often:?}");
    }
    // The client's node has a record for each connection, and says that it went well. The other node
    // has one for each endpoint that was tried.
    let all: f64 = often.iter().sum();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small count"
    )]
    let failed = all as usize;
    let near = records(&mesh, 1, OPEN.1, COUNT);
    assert_eq!(with(&near, "finished").len(), COUNT, "{near:?}");
    let far = records(&mesh, 2, OPEN.1, COUNT + failed);
    assert_eq!(with(&far, "finished").len(), COUNT, "{far:?}");
    assert_eq!(with(&far, "connect_failed").len(), failed, "{far:?}");
}

#[test]
fn service_without_reachable_endpoint_fails_after_two_retries() {
    let mesh = mesh();
    let (report, others) = connect(&mesh, SocketAddr::from((CLOSED.0, PORT)));
    assert!(was_reset(&report), "{report:?}");
    assert_eq!(others.to_string(), OTHERS.to_string());
    for (node, count) in [(1, 1), (2, 3)] {
        let records = records(&mesh, node, CLOSED.1, count);
        let failed = with(&records, "connect_failed");
        assert_eq!(failed.len(), count, "node {node}: {records:?}");
        let refused = |record: &&Value| record["cause"] == "refused";
        assert!(failed.iter().all(refused), "node {node}: {records:?}");
    }
    // Who asks for an endpoint by its own address wants no other one.
    let one = mesh.pod("one").v4();
    let (report, others) = connect(&mesh, SocketAddr::from((one, CLOSED.1)));
    assert!(was_reset(&report), "{report:?}");
    assert_eq!(others.to_string(), "0");
    let near = records(&mesh, 1, CLOSED.1, 2);
    assert_eq!(with(&near, "connect_failed").len(), 2, "{near:?}");
}
