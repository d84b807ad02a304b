// SPDX-License-Identifier: Apache-2.0
//! The flow log never blocks a sender, counts each record that it loses, and follows its file.

use mesh_common::Endpoint;
use mesh_common::{Evidence, Verdict};

use super::*;
use crate::metrics::Format;
use crate::record::{Close, ClosedBy, ConnectionOpen, Policy, Reporter, Security, close_reasons};

fn recorder(metrics: &Metrics, sink: FlowSink) -> Recorder {
    let clock = || std::time::SystemTime::UNIX_EPOCH;
    Recorder::new("n1", Policy::default, metrics.clone(), sink, clock)
}

fn connection(recorder: &Recorder) {
    let open = ConnectionOpen {
        reporter: Reporter::Source,
        source: Endpoint::NONE,
        destination: Endpoint::NONE,
        service: None,
        verdict: Verdict::pass(mesh_common::Reason::NoPolicy),
        evidence: Evidence::None,
        peer_identity: None,
        security: Security::None,
    };
    recorder.open(open).finish(Close::Finished(ClosedBy::Local));
}

fn lost(metrics: &Metrics) -> u64 {
    let page = metrics.page(Format::Prometheus);
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix("mesh_flow_events_lost_total{at=\"flow_log\"} "));
    line.unwrap().parse().unwrap()
}

#[test]
fn a_full_queue_counts_what_it_loses() {
    let metrics = Metrics::new();
    // Nobody reads: a writer that hangs.
    let (sender, queue) = mpsc::channel(QUEUE);
    let recorder = recorder(&metrics, FlowSink(sender));
    for _ in 0..QUEUE + 10 {
        connection(&recorder);
    }
    assert_eq!(lost(&metrics), 10);
    assert_eq!(queue.len(), QUEUE);
}

#[tokio::test]
async fn recent_records_are_kept_without_a_log() {
    let metrics = Metrics::new();
    let flows = Flows::start(&Target::Off, &metrics).unwrap();
    let recorder = recorder(&metrics, flows.sink());
    for _ in 0..RECENT + 5 {
        connection(&recorder);
    }
    let recent = flows.sink().recent().await;
    assert_eq!(recent.len(), RECENT);
    assert!(recent[0].starts_with("{\"time\":\"1970-01-01T00:00:00Z\""));
    assert_eq!(lost(&metrics), 0);
}

#[tokio::test]
async fn a_renamed_file_is_reopened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows.json");
    let metrics = Metrics::new();
    let flows = Flows::start(&Target::File(path.clone()), &metrics).unwrap();
    let recorder = recorder(&metrics, flows.sink());
    let sink = flows.sink();
    connection(&recorder);
    sink.recent().await;
    std::fs::rename(&path, dir.path().join("flows.json.1")).unwrap();
    sink.reopen().await;
    connection(&recorder);
    connection(&recorder);
    drop((recorder, sink));
    flows.finish(Duration::from_secs(10));
    let count = |name: &str| {
        let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
        text.lines().count()
    };
    assert_eq!((count("flows.json.1"), count("flows.json")), (1, 2));
}

#[test]
fn an_open_error_names_the_file() {
    let log = Target::File("/does/not/exist".into());
    let error = Flows::start(&log, &Metrics::new()).unwrap_err();
    assert!(error.to_string().contains("/does/not/exist"), "{error}");
}

struct Fake(Vec<Event>);

impl EventSource for Fake {
    fn acquire(&mut self) -> std::io::Result<bool> {
        Ok(true)
    }

    fn release(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn drain(&mut self, each: &mut dyn FnMut(&Event)) {
        self.0.drain(..).for_each(|event| each(&event));
    }
}

#[tokio::test(start_paused = true)]
async fn events_that_wait_at_the_stop_are_recorded() {
    let metrics = Metrics::new();
    let flows = Flows::start(&Target::Off, &metrics).unwrap();
    let recorder = recorder(&metrics, flows.sink());
    let (stop, stopped) = watch::channel(true);
    let event = Event {
        kind: mesh_common::event::kind::CLOSED,
        ..Event::default()
    };
    let (_here, replaced) = watch::channel(false);
    drain(
        Fake(vec![event; 3]),
        (recorder, close_reasons().1),
        replaced,
        stopped,
    )
    .await;
    drop(stop);
    assert_eq!(flows.sink().recent().await.len(), 3);
}
