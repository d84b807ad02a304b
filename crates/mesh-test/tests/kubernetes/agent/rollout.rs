// SPDX-License-Identifier: Apache-2.0
//! A pod that is in the mesh, on a node that has not reported it: what others may send to it.

use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::reports::{Storm, Tcp};
use mesh_test::{Pod, eventually};

use super::fixture::{Fixture, PORT, SOON, serve};

const METRIC: &str = "mesh_unencrypted_bytes_total";
const VERDICTS: &str = "mesh_policy_verdicts_total";
const REASON: (&str, &str) = ("reason", "peer_not_ready");

const REQUIRED: &str = "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: required, namespace: default}
spec: {podSelector: {matchLabels: {app: a}}, outbound: Required}
";

/// Of node 1.
fn counted(fixture: &Fixture, metric: &str, labels: &[(&str, &str)]) -> f64 {
    sum(
        &fixture.mesh.agent(1).metrics().expect("metrics"),
        metric,
        labels,
    )
}

/// Bytes that a client wrote and read in 200 short connections.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn storm(from: &Pod, to: &Pod) -> f64 {
    let line = format!("storm --to {}:{PORT} --count 200 --threads 2", to.v4());
    let storm: Storm = from.probe(&line).expect("run").json().expect("a report");
    let outcome = (storm.ok, storm.wrong, storm.failed);
    assert_eq!(outcome, (200, 0, 0), "{storm:?}");
    (storm.bytes_sent + storm.bytes_received) as f64
}

fn grown_by(fixture: &Fixture, expected: f64, before: [f64; 2]) {
    let grown = || {
        let now = [&[REASON][..], &[]].map(|labels| counted(fixture, METRIC, labels));
        [now[0] - before[0], now[1] - before[1]]
    };
    // The last connection ends a moment after its client has.
    let complete = eventually("the bytes to be counted", SOON, || {
        (grown()[0] >= expected).then_some(())
    });
    // To the byte, and under no other reason.
    let text = |both: [f64; 2]| both.map(|one| one.to_string());
    let [grown, expected] = [text(grown()), text([expected; 2])];
    assert_eq!(grown, expected, "{complete:?}");
}

#[test]
fn pod_on_unreported_node_gets_counted_plaintext_or_refusal() {
    let mut fixture = Fixture::open();
    let a = fixture.mesh.pod("a");
    // Nobody is there to adopt what comes now, and to report it.
    fixture.mesh.agents[1].kill_9().expect("kill");
    fixture
        .kube
        .namespace("late", &[ENROLLED])
        .expect("created");
    let late = fixture.add_in("late", "late", 2);
    let _server = serve(&late);
    let address = late.v4().to_string();
    eventually("node 1 to know it", SOON, || {
        let plan = fixture.mesh.agent(1).ask_text("/plan").ok()?;
        plan.contains(&address).then_some(())
    })
    .expect("known");

    let both =
        |fixture: &Fixture| [&[REASON][..], &[]].map(|labels| counted(fixture, METRIC, labels));
    let before = both(&fixture);
    let bytes = storm(&a, &late);
    grown_by(&fixture, bytes, before);

    // Who must not send in clear does not.
    let refused =
        |fixture: &Fixture| counted(fixture, VERDICTS, &[REASON, ("direction", "egress")]);
    assert_eq!(refused(&fixture).to_string(), "0");
    fixture.kube.apply_text(REQUIRED).expect("apply");
    fixture.until(&a, &late, false);
    let before = both(&fixture);
    let line = format!("tcp --to {address}:{PORT} --timeout-ms 1500");
    let report: Tcp = a.probe(&line).expect("run").json().expect("a report");
    assert_eq!(report.errno, Some(libc::ECONNREFUSED), "{report:?}");
    assert!(refused(&fixture) >= 2.0);
    assert_eq!(
        both(&fixture).map(|n| n.to_string()),
        before.map(|n| n.to_string())
    );

    // The control: once its node has reported it, it is reached, and by nothing that is counted.
    fixture.mesh.agents[1].start_again().expect("a successor");
    fixture.until(&a, &late, true);
    let before = both(&fixture);
    storm(&a, &late);
    eventually("the records of all", SOON, || {
        let labels = [("security", "mutual_tls"), ("reporter", "source")];
        let closed = counted(&fixture, "mesh_tcp_connections_closed_total", &labels);
        (closed >= 200.0).then_some(())
    })
    .expect("through tunnels");
    assert_eq!(
        both(&fixture).map(|n| n.to_string()),
        before.map(|n| n.to_string())
    );
}
