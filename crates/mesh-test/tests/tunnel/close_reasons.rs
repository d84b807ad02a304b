// SPDX-License-Identifier: Apache-2.0
//! Connections that the client's node has accepted and the other endpoint has not made: the error of the
//! application, and the reason in both records, as in the table of docs/tunnel.md.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::Tcp;
use mesh_test::{Cmd, Lab, Mesh, Topology, eventually};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

/// The action of the pod's own packet filter on connections from the agent to the application.
const FILTER: &str = "table inet app { chain input { type filter hook input priority 0;
   tcp dport 7002 drop
   tcp dport 7003 reject with icmpx type host-unreachable
   }
 }";

#[test]
fn every_failure_resets_client_and_is_recorded_at_both_endpoints() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab");
    let mut mesh = Mesh::start(lab).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = b
        .serve("--tcp [::]:7000 --tcp [::]:7002 --tcp [::]:7003")
        .expect("server");
    b.run(Cmd::new("nft").args(["-f", "-"]).input(FILTER), SOON)
        .expect("nft")
        .ok()
        .expect("rules");
    let ask = |port: u16| {
        let begun = Instant::now();
        let to = SocketAddr::new(b.v4().into(), port);
        let output = a
            .probe(&format!("tcp --to {to} --timeout-ms 15000"))
            .expect("run");
        let report: Tcp = output.json().expect("report");
        (report, begun.elapsed())
    };
    let record = |mesh: &Mesh, node: u8, port: u16| {
        let found = || {
            let flows = mesh.agent(node).flows().ok()?;
            flows
                .into_iter()
                .find(|flow| flow["destination"]["port"] == port)
        };
        eventually("a record", SOON, found).expect("a record")
    };
    // The control.
    let (report, _) = ask(7000);
    assert!(report.ok && report.ends_agree(), "{report:?}");
    for (port, cause, seconds) in [
        (7001, "refused", 0..2),
        (7002, "timed_out", 9..14),
        (7003, "unreachable", 0..2),
    ] {
        let (report, took) = ask(port);
        let gone = [libc::ECONNRESET, libc::EPIPE, libc::ENOTCONN];
        assert!(
            report.errno.is_some_and(|errno| gone.contains(&errno)),
            "{cause}: {report:?}"
        );
        assert!(seconds.contains(&took.as_secs()), "{cause}: {took:?}");
        for node in [1, 2] {
            let record = record(&mesh, node, port);
            assert_eq!(record["close"], "connect_failed", "node {node}: {record}");
            assert_eq!(record["cause"], cause, "node {node}: {record}");
        }
    }
    // The other node's agent is gone: nobody reaches the application in clear instead.
    let agent = &mut mesh.agents[1];
    agent.kill_9().expect("kill");
    let (report, took) = ask(7000);
    assert!(
        !report.ok && took < Duration::from_secs(13),
        "{took:?}: {report:?}"
    );
    println!("without the other agent: {took:.1?}, {report:?}");
    let failed = || {
        let flows = mesh.agent(1).flows().ok()?;
        let close = |flow: &Value, what: &str| flow["close"] == what;
        flows
            .into_iter()
            .filter(|flow| flow["destination"]["port"] == 7000)
            .find(|flow| close(flow, "peer_unreachable") || close(flow, "reset"))
    };
    eventually("a record that says so", SOON, failed).expect("a record");
}
