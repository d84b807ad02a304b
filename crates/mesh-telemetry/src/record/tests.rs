// SPDX-License-Identifier: Apache-2.0
//! Exactly one record for each connection, and metrics that are the sum of the records.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_common::event::{Event, closed_by, kind};
use mesh_common::policy::RuleId;
use mesh_common::service::ServiceKey;
use mesh_common::{Addr, Port, Reason};
use mesh_plan::Plan;
use mesh_plan::cluster::{ObjectName, ObjectRef, Pod};
use mesh_plan::plan::{LocalPod, RuleName};
use serde_json::Value;
use tokio::sync::watch;

use super::bytes::COUNT_EVERY;
use super::*;
use crate::flows::{Flows, Target};

const RULE: RuleId = RuleId(77);

fn at(text: &str) -> Endpoint {
    text.parse::<std::net::SocketAddr>().unwrap().into()
}

fn noon() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250)
}

fn plan() -> Plan {
    let mut plan = Plan::default();
    for (ip, name) in [("10.1.1.2", "web"), ("10.1.2.2", "db")] {
        let ip: IpAddr = ip.parse().unwrap();
        let workload = Pod {
            name: ObjectName::new("shop", format!("{name}-0")),
            uid: name.into(),
            workload: ("Deployment".to_owned(), name.to_owned()),
            service_account: format!("{name}-sa"),
            node: "n1".to_owned(),
            ..Pod::default()
        };
        plan.names.workloads.insert(ip.into(), Arc::new(workload));
        let local = LocalPod {
            addresses: [ip].into(),
            ..LocalPod::default()
        };
        plan.pods.insert(name.to_owned(), local);
    }
    let rule = RuleName {
        object: ObjectRef::new("NetworkPolicy", "shop", "db"),
        rule: "ingress[0]".to_owned(),
    };
    plan.names.rules.insert(RULE, rule);
    let vip = ServiceKey::new(at("10.96.0.9:5432"), Protocol::TCP);
    plan.names
        .services
        .insert(vip, ObjectName::new("shop", "db"));
    plan
}

struct Rig {
    metrics: Metrics,
    recorder: Recorder,
    policy: watch::Sender<Policy>,
    flows: Flows,
    file: tempfile::NamedTempFile,
}

impl Rig {
    fn new() -> Self {
        let metrics = Metrics::new();
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = Target::File(file.path().to_owned());
        let flows = Flows::start(&log, &metrics).unwrap();
        let first = Policy {
            revision: 7,
            plan: Arc::new(Index::new(plan())),
        };
        let (policy, latest) = watch::channel(first);
        let latest = move || latest.borrow().clone();
        let recorder = Recorder::new("n1", latest, metrics.clone(), flows.sink(), noon);
        Self {
            metrics,
            recorder,
            policy,
            flows,
            file,
        }
    }

    fn open(&self) -> ConnectionRecord {
        self.recorder.open(ConnectionOpen {
            reporter: Reporter::Source,
            source: at("10.1.1.2:40000"),
            destination: at("10.1.2.2:5432"),
            service: Some(at("10.96.0.9:5432")),
            verdict: Verdict::allow(Reason::Policy, RULE),
            evidence: Evidence::Tls,
            peer_identity: Some("spiffe://cluster.local/ns/shop/sa/db-sa".into()),
            security: Security::MutualTls,
        })
    }

    /// Everything that was written, after every record is on disk.
    fn lines(self) -> Vec<Value> {
        drop(self.recorder);
        self.flows.finish(Duration::from_secs(10));
        std::fs::read_to_string(self.file.path())
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

fn event(kind: u8, direction: mesh_common::Direction) -> Event {
    Event {
        time_ns: 5_000_000,
        start_ns: 2_000_000,
        rule: RULE.0,
        sent: 10,
        received: 200,
        local: at("10.1.1.2:40000"),
        remote: at("10.1.2.2:5432"),
        service: Endpoint::NONE,
        pod: 1,
        rtt_us: 30,
        retransmits: 1,
        kind,
        direction: direction as u8,
        protocol: Protocol::TCP.0,
        reason: Reason::Policy as u8,
        plaintext: Reason::SameNode as u8,
        closed_by: closed_by::LOCAL,
        spare: 0,
        spare_end: 0,
    }
}

#[test]
fn a_tunnelled_connection_names_everything() {
    let rig = Rig::new();
    let mut record = rig.open();
    record.bytes().add_sent(5);
    record.bytes().add_received(7);
    record.set_transport(120, 2);
    record.finish(Close::Finished(ClosedBy::Local));
    let lines = rig.lines();
    assert_eq!(lines.len(), 1);
    let mut line = lines[0].clone();
    assert!(line["duration_us"].take().is_u64());
    let expected = serde_json::json!({
        "time": "2023-11-14T22:13:20.25Z",
        "kind": "connection",
        "node": "n1",
        "reporter": "source",
        "protocol": "tcp",
        "duration_us": null,
        "source": {"address": "10.1.1.2", "port": 40000, "pod": "web-0", "namespace": "shop",
            "workload": "web", "service_account": "web-sa"},
        "destination": {"address": "10.1.2.2", "port": 5432, "pod": "db-0", "namespace": "shop",
            "workload": "db", "service_account": "db-sa"},
        "service": "shop/db",
        "service_address": "10.96.0.9:5432",
        "bytes_sent": 5,
        "bytes_received": 7,
        "verdict": "allowed",
        "reason": "policy",
        "rule": "NetworkPolicy shop/db ingress[0]",
        "security": "mutual_tls",
        "evidence": "tls",
        "peer_identity": "spiffe://cluster.local/ns/shop/sa/db-sa",
        "rtt_us": 120,
        "retransmits": 2,
        "close": "finished",
        "closed_by": "local",
        "policy_revision": 7,
    });
    assert_eq!(line, expected);
}

#[test]
fn however_it_ends_there_is_one_record() {
    let rig = Rig::new();
    let refused = Verdict::refuse(Reason::UnknownPeer);
    let ends = [
        (
            Some(Close::Finished(ClosedBy::Remote)),
            "finished",
            "remote",
        ),
        (Some(Close::Reset(ClosedBy::Reset)), "reset", "reset"),
        (Some(Close::Refused(refused)), "unknown_peer", "failed"),
        (
            Some(Close::Failed(Reason::PeerUnreachable)),
            "peer_unreachable",
            "failed",
        ),
        (
            Some(Close::Failed(Reason::PolicyChanged)),
            "policy_changed",
            "agent",
        ),
        (Some(Close::Aborted), "aborted", "agent"),
        (None, "aborted", "agent"),
    ];
    for (close, ..) in &ends {
        let record = rig.open();
        match close {
            Some(close) => record.finish(*close),
            None => drop(record),
        }
    }
    // As a panicking task does.
    let record = rig.open();
    let thread = std::thread::spawn(move || {
        let _held = record;
        panic!("on purpose");
    });
    assert!(thread.join().is_err());

    let metrics = rig.metrics.clone();
    let lines = rig.lines();
    assert_eq!(lines.len(), ends.len() + 1);
    for (line, (_, close, by)) in lines.iter().zip(&ends) {
        assert_eq!(
            (&line["close"], &line["closed_by"]),
            (&(*close).into(), &(*by).into())
        );
    }
    assert_eq!(lines[2]["verdict"], "denied");
    let rows = metrics.connections(Instant::now());
    assert_eq!((rows[0].1.opened, rows[0].1.closed), (8, 8));
}

#[test]
fn both_reporters_of_a_direct_connection_say_the_same() {
    let rig = Rig::new();
    let mut records = KernelRecords::new(rig.recorder.clone(), close_reasons().1);
    records.report(&event(kind::CLOSED, mesh_common::Direction::Egress));
    let mut other = event(kind::CLOSED, mesh_common::Direction::Ingress);
    std::mem::swap(&mut other.local, &mut other.remote);
    std::mem::swap(&mut other.sent, &mut other.received);
    records.report(&other);
    drop(records);
    let lines = rig.lines();
    assert_eq!(lines.len(), 2);
    for (line, reporter) in lines.iter().zip(["source", "destination"]) {
        assert_eq!(line["reporter"], reporter);
        assert_eq!(line["source"]["workload"], "web");
        assert_eq!(line["destination"]["workload"], "db");
        assert_eq!(
            (&line["bytes_sent"], &line["bytes_received"]),
            (&10.into(), &200.into())
        );
        assert_eq!(line["security"], "same_node");
        assert_eq!(line["evidence"], "node");
        assert_eq!(line["duration_us"], 3000);
    }
}

#[test]
fn a_connection_closed_at_the_socket_names_its_reason() {
    let rig = Rig::new();
    let (closing, reasons) = close_reasons();
    let mut records = KernelRecords::new(rig.recorder.clone(), reasons);
    let mut reset = event(kind::CLOSED, mesh_common::Direction::Egress);
    reset.closed_by = closed_by::RESET;
    let by_rule = Verdict::deny(Reason::Policy, RuleId(77));
    let by_none = Verdict::refuse(Reason::DefaultDeny);
    let now = Instant::now();
    records.report(&reset);
    closing.closing(reset.local, reset.remote, by_rule, now);
    records.report(&reset);
    // The other end of it, and a connection between the same ends afterwards.
    let mut other = reset;
    std::mem::swap(&mut other.local, &mut other.remote);
    records.report(&other);
    records.report(&reset);
    closing.closing(reset.local, reset.remote, by_none, now);
    records.report(&reset);
    // Its application was quicker, and nobody asks any more.
    closing.closing(reset.local, reset.remote, by_none, now);
    records.report(&event(kind::CLOSED, mesh_common::Direction::Egress));
    records.refresh(now + Duration::from_secs(60));
    records.report(&reset);
    drop(records);
    let lines = rig.lines();
    let said = |line: &serde_json::Value| {
        let text = |field: &str| line[field].as_str().unwrap_or("").to_owned();
        [text("close"), text("closed_by"), text("ended_by")].join(" ")
    };
    let said: Vec<String> = lines.iter().map(said).collect();
    let rule = "policy_changed agent NetworkPolicy shop/db ingress[0]";
    let expected = [
        "reset reset ",
        rule,
        rule,
        "reset reset ",
        "policy_changed agent default_deny",
        "finished local ",
        "reset reset ",
    ];
    assert_eq!(said, expected);
    assert!(lines.iter().all(|line| line["verdict"] == "allowed"));
}

#[test]
fn kernel_refusals_are_recorded_and_not_counted_as_connections() {
    let rig = Rig::new();
    let mut records = KernelRecords::new(rig.recorder.clone(), close_reasons().1);
    let mut denied = event(kind::DENIED, mesh_common::Direction::Egress);
    denied.reason = Reason::DefaultDeny as u8;
    denied.remote = at("192.0.2.1:443");
    denied.plaintext = Reason::NotAWorkload as u8;
    records.report(&denied);
    records.report(&event(kind::AUDIT, mesh_common::Direction::Egress));
    records.report(&event(200, mesh_common::Direction::Egress));
    // The pod is gone when its last event arrives.
    rig.policy.send_replace(Policy {
        revision: 8,
        plan: Arc::default(),
    });
    records.refresh(Instant::now());
    records.report(&event(kind::DROPPED, mesh_common::Direction::Egress));
    records.refresh(Instant::now());
    drop(records);
    let metrics = rig.metrics.clone();
    let lines = rig.lines();
    assert_eq!(lines.len(), 3);
    let kinds: Vec<_> = lines
        .iter()
        .map(|line| line["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["denied", "audit", "dropped"]);
    assert_eq!(lines[0]["verdict"], "denied");
    assert_eq!(lines[0]["close"], "default_deny");
    assert_eq!(lines[0]["rule"], "NetworkPolicy shop/db ingress[0]");
    assert_eq!(lines[0]["destination"]["entity"], "world");
    assert_eq!(lines[1]["verdict"], "allowed");
    assert_eq!(
        lines[2]["source"]["workload"], "web",
        "its name is remembered"
    );
    assert_eq!(
        lines[2]["rule"], "000000000000004d",
        "a rule that is gone has its number"
    );
    let revisions: Vec<_> = lines.iter().map(|line| &line["policy_revision"]).collect();
    assert_eq!(
        revisions,
        [7, 7, 8],
        "the revision of the plan that has the names"
    );
    assert!(metrics.connections(Instant::now()).is_empty());
}

/// A small generator of numbers (SplitMix64, Steele et al. 2014), so that a run can be repeated.
struct Numbers(u64);

impl Numbers {
    fn below<T: TryFrom<u64>>(&mut self, limit: u64) -> T {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let number = (z ^ (z >> 31)) % limit;
        T::try_from(number).ok().expect("the limit fits the type")
    }
}

/// Opens, carries and ends connections in a random order, those of the proxy and of the kernel
/// mixed, and keeps the queue from overflowing.
fn play(rig: &Rig, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut records = KernelRecords::new(rig.recorder.clone(), close_reasons().1);
    let mut open: Vec<ConnectionRecord> = Vec::new();
    for _ in 0..500 {
        match numbers.below::<u8>(6) {
            0 | 1 => open.push(rig.open()),
            2 if !open.is_empty() => {
                let which = numbers.below::<usize>(open.len() as u64);
                open[which].bytes().add_sent(numbers.below(3 << 20));
                open[which].bytes().add_received(numbers.below(3 << 20));
            }
            3 if !open.is_empty() => {
                let which = numbers.below::<usize>(open.len() as u64);
                let record = open.swap_remove(which);
                match numbers.below::<u8>(3) {
                    0 => record.finish(Close::Finished(ClosedBy::Remote)),
                    1 => record.finish(Close::Failed(Reason::PodDeleted)),
                    _ => drop(record),
                }
            }
            4 => {
                let mut event = event(kind::CLOSED, mesh_common::Direction::Egress);
                event.sent = numbers.below(1 << 40);
                event.received = numbers.below(1 << 40);
                event.local.addr = Addr::from(IpAddr::from([10, 9, 9, numbers.below(9)]));
                event.local.port = Port::new(numbers.below(60_000));
                event.closed_by = numbers.below(6);
                records.refresh(Instant::now());
                records.report(&event);
            }
            _ => {}
        }
    }
}

#[test]
fn metrics_are_the_sum_of_the_records() {
    for seed in 0..20 {
        let rig = Rig::new();
        play(&rig, seed);
        let metrics = rig.metrics.clone();
        let lines = rig.lines();
        let mut sums: BTreeMap<(String, String), [u64; 3]> = BTreeMap::new();
        for line in &lines {
            let party = |end: &str| {
                let end = &line[end];
                let name = end["workload"].as_str().or(end["entity"].as_str());
                name.unwrap().to_owned()
            };
            let sum = sums
                .entry((party("source"), party("destination")))
                .or_default();
            sum[0] += 1;
            sum[1] += line["bytes_sent"].as_u64().unwrap();
            sum[2] += line["bytes_received"].as_u64().unwrap();
        }
        let counted: BTreeMap<_, _> = metrics
            .connections(Instant::now())
            .into_iter()
            .map(|(labels, totals)| {
                assert_eq!(totals.opened, totals.closed);
                let key = (
                    labels.source.workload.clone(),
                    labels.destination.workload.clone(),
                );
                (key, [totals.closed, totals.sent, totals.received])
            })
            .collect();
        assert_eq!(counted, sums, "seed {seed}");
        let failed: u64 = lines
            .iter()
            .filter(|line| line["close"] != "finished")
            .count() as u64;
        let page = metrics.page(crate::metrics::Format::Prometheus);
        let shown: u64 = page
            .lines()
            .filter(|line| line.starts_with("mesh_tcp_connections_failed_total{"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum();
        assert_eq!(shown, failed);
    }
}

#[test]
fn an_open_connection_shows_in_metrics_before_it_ends() {
    let rig = Rig::new();
    let record = rig.open();
    record.bytes().add_sent(COUNT_EVERY - 1);
    let totals = || rig.metrics.connections(Instant::now())[0].1;
    assert_eq!((totals().opened, totals().closed, totals().sent), (1, 0, 0));
    record.bytes().add_sent(1);
    assert_eq!(totals().sent, COUNT_EVERY);
    record.bytes().add_sent(3);
    record.finish(Close::Finished(ClosedBy::Local));
    assert_eq!(totals().sent, COUNT_EVERY + 3);
}
