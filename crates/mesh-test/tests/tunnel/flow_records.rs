// SPDX-License-Identifier: Apache-2.0
//! Records and metrics equal what the clients count, to the connection and byte.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::reports::Storm;
use mesh_test::{Lab, Mesh, Topology, eventually};
use serde_json::Value;

const PORT: u16 = 7000;

/// The records and metrics of one node about the connections between two workloads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    connections: u64,
    sent: u64,
    received: u64,
}

/// The selected connections, by labels of metrics and fields of records.
struct Scene {
    name: &'static str,
    to: SocketAddr,
    reporters: [u8; 2],
    destination: &'static str,
    security: &'static str,
    expected: Count,
}

fn workload(end: &Value) -> &str {
    end["workload"]
        .as_str()
        .or(end["entity"].as_str())
        .unwrap_or("")
}

fn by_records(records: &[Value], reporter: &str, scene: &Scene) -> Count {
    let number = |record: &Value, field: &str| record[field].as_u64().unwrap_or(u64::MAX);
    records
        .iter()
        .filter(|r| r["kind"] == "connection" && r["reporter"] == reporter)
        .filter(|r| workload(&r["destination"]) == scene.destination)
        .filter(|r| workload(&r["source"]) == "client" && r["security"] == scene.security)
        .fold(Count::default(), |count, r| Count {
            connections: count.connections + 1,
            sent: count.sent + number(r, "bytes_sent"),
            received: count.received + number(r, "bytes_received"),
        })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counters far below 2^53"
)]
fn by_metrics(page: &str, reporter: &str, scene: &Scene) -> Count {
    let labels = [
        ("reporter", reporter),
        ("source_workload", "client"),
        ("destination_workload", scene.destination),
        ("security", scene.security),
    ];
    let total = |name: &str| sum(page, name, &labels) as u64;
    assert_eq!(
        total("mesh_tcp_connections_opened_total"),
        total("mesh_tcp_connections_closed_total"),
        "{}",
        scene.name
    );
    Count {
        connections: total("mesh_tcp_connections_closed_total"),
        sent: total("mesh_tcp_sent_bytes_total"),
        received: total("mesh_tcp_received_bytes_total"),
    }
}

/// Whether Prometheus's own tool reads the page and has nothing to say about it.
fn accepted_by_promtool(page: &str) {
    let mut tool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (Debian package prometheus; cargo xtask setup)");
    let mut input = tool.stdin.take().expect("it is piped");
    input.write_all(page.as_bytes()).expect("it reads");
    drop(input);
    let output = tool.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn metrics_and_records_match_client_counts() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("client", 1), ("near", 1), ("far", 2)])
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let client = mesh.pod("client");
    let listen = format!("--tcp [::]:{PORT}");
    let _servers = ["near", "far"].map(|pod| mesh.pod(pod).serve(&listen).expect("server"));
    let at = |pod: &str| SocketAddr::new(mesh.pod(pod).v4().into(), PORT);
    let mut scenes = [
        Scene {
            name: "through a tunnel",
            to: at("far"),
            reporters: [1, 2],
            destination: "far",
            security: "mutual_tls",
            expected: Count::default(),
        },
        Scene {
            name: "on one node",
            to: at("near"),
            reporters: [1, 1],
            destination: "near",
            security: "same_node",
            expected: Count::default(),
        },
    ];
    for scene in &mut scenes {
        let line = format!("storm --to {} --count 1000 --threads 4", scene.to);
        let storm: Storm = client.probe(&line).expect("run").json().expect("a report");
        assert_eq!(
            (storm.ok, storm.wrong, storm.failed),
            (1000, 0, 0),
            "{}",
            scene.name
        );
        assert!(storm.bytes_sent > 0 && storm.bytes_received > 0);
        scene.expected = Count {
            connections: 1000,
            sent: storm.bytes_sent,
            received: storm.bytes_received,
        };
    }
    for scene in &scenes {
        for (reporter, node) in ["source", "destination"].into_iter().zip(scene.reporters) {
            let agent = mesh.agent(node);
            let found = || by_records(&agent.flows().expect("flows"), reporter, scene);
            // The last connections end a moment after the client has.
            let complete = eventually("records", Duration::from_secs(5), || {
                (found().connections >= 1000).then_some(())
            });
            assert_eq!(
                found(),
                scene.expected,
                "{}, {reporter}: {complete:?}",
                scene.name
            );
            let page = agent.metrics().expect("metrics");
            assert_eq!(
                by_metrics(&page, reporter, scene),
                scene.expected,
                "{}, {reporter}: metrics",
                scene.name
            );
            assert_eq!(sum(&page, "mesh_flow_events_lost_total", &[]), 0.0);
            accepted_by_promtool(&page);
        }
    }
}
