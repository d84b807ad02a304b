// SPDX-License-Identifier: Apache-2.0
//! Two pods of one node that want more than its agent can carry: the latency of one does not depend on
//! the number of the other's connections.

use std::time::Duration;

use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::reports::{Bulk, RequestResponse};
use mesh_test::{Lab, Mesh, Topology, eventually};

const SOON: Duration = Duration::from_secs(60);
const PORT: u16 = 7000;
const ROUNDS: usize = 3;
/// Streams of the pod that wants the most.
const MANY: u32 = 16;
/// What half of the other one's requests may take beside them at most, in microseconds: 8 to 10 ms
/// on two busy processors where this was written, and 200 to 800 ms without taking turns.
const MOST_US: f64 = 40_000.0;

/// `many` and `one` on node 1, and a server for each on node 2.
fn mesh() -> Mesh {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("many", 1), ("one", 1), ("to-many", 2), ("to-one", 2)])
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

/// The measurements of the rounds of one kind.
#[derive(Debug)]
struct Part {
    /// Of the requests, in microseconds.
    p50: Vec<f64>,
    requests: u64,
    /// Seconds of workers for the pod with requests and for the other one.
    worked: [f64; 2],
}

impl Part {
    const fn new() -> Self {
        Self {
            p50: Vec::new(),
            requests: 0,
            worked: [0.0; 2],
        }
    }

    fn round(&mut self, worked: impl Fn(&str) -> f64, requests: impl Fn() -> RequestResponse) {
        let worked = || ["one", "many"].map(&worked);
        let before = worked();
        let report = requests();
        self.p50.push(report.p50_us);
        self.requests += report.requests;
        for ((sum, before), now) in self.worked.iter_mut().zip(before).zip(worked()) {
            *sum += now - before;
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    fn requests(&self) -> f64 {
        self.requests as f64
    }
}

#[test]
fn pod_with_many_streams_does_not_delay_others() {
    let mesh = mesh();
    let [many, one, to_many, to_one] = ["many", "one", "to-many", "to-one"].map(|n| mesh.pod(n));
    let listen = format!("--tcp [::]:{PORT}");
    let _servers = [&to_many, &to_one].map(|pod| pod.serve(&listen).expect("server"));
    let requests = || {
        let line = format!("rr --to {} --size 64 --seconds 2", to_one.at(PORT)[0]);
        let output = one.probe(&line).expect("run");
        output.json::<RequestResponse>().expect("a report")
    };
    let worked = |pod: &str| mesh.agent(1).worker_seconds(pod).expect("exported");
    let [mut alone, mut beside] = [const { Part::new() }; 2];
    let mut rates = Vec::new();
    let mut expected = 0.0;
    for _ in 0..ROUNDS {
        expected += f64::from(MANY);
        alone.round(worked, requests);
        let line = format!(
            "bulk --to {} --streams {MANY} --seconds 4",
            to_many.at(PORT)[0]
        );
        let busy = many.start_probe(&line).expect("client");
        let labels = [("reporter", "source"), ("destination_workload", "to-many")];
        eventually("the streams to be carried", SOON, || {
            let page = mesh.agent(1).metrics().ok()?;
            let opened = sum(&page, "mesh_tcp_connections_opened_total", &labels);
            (opened >= expected).then_some(())
        })
        .expect("carried");
        beside.round(worked, requests);
        let bulk: Bulk =
            serde_json::from_str(&busy.next_line(SOON).expect("a report")).expect("json");
        assert_eq!(bulk.bytes, bulk.confirmed, "{bulk:?}");
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        rates.push(bulk.bytes as f64 / bulk.seconds / 1e9);
    }
    println!(
        "p50 of requests, us: {:.0?} alone, {:.0?} beside {MANY} streams of another pod, which carry \
         {rates:.2?} GB/s; requests, and seconds of workers for them and for the other pod: {} in \
         {:.2?} and {} in {:.2?}",
        alone.p50,
        beside.p50,
        alone.requests(),
        alone.worked,
        beside.requests(),
        beside.worked,
    );
    beside.p50.sort_by(f64::total_cmp);
    assert!(beside.p50[ROUNDS / 2] <= MOST_US, "{beside:?}");
    // What the workers say to have spent goes to whom it was spent for, and the pod that wants little
    // gets as much for each of its requests as it does alone.
    let [[usual, none], [one, many]] = [alone.worked, beside.worked];
    assert!(none < usual / 10.0 && many > one, "{alone:?}, {beside:?}");
    assert!(
        one * alone.requests() >= usual * beside.requests() / 2.0,
        "{alone:?}, {beside:?}"
    );
}
