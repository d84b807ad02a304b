// SPDX-License-Identifier: Apache-2.0
//! Records of what the kernel programs report: direct connections, refusals, dropped packets.
//!
//! A pod's last events arrive after the plan has forgotten it, so names of pods that went are
//! kept for a while.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::event::{Event, kind};
use mesh_common::policy::RuleId;
use mesh_common::{Addr, Direction, Endpoint, Evidence, Protocol, Reason};
use mesh_plan::Index;
use mesh_plan::cluster::Pod;

use super::names::{self, Party};
use super::{
    Close, ClosedBy, Endings, FlowRecord, Kind, Recorder, Reporter, Security, protocol_label,
    verdict_label,
};
use crate::metrics::Labels;

/// How long names of pods that went are kept.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Makes records of events. One task owns it.
#[derive(Debug)]
pub struct KernelRecords {
    recorder: Recorder,
    endings: Endings,
    plan: Arc<Index>,
    gone: BTreeMap<Addr, (Instant, Arc<Pod>)>,
    /// Who had an address in an earlier event under this plan: a busy node reports the same few
    /// ends thousands of times a second.
    known: BTreeMap<Addr, Party>,
}

/// Ends that are kept named.
const MOST_KNOWN: usize = 4096;

impl KernelRecords {
    /// With no pod gone yet.
    #[must_use]
    pub fn new(recorder: Recorder, endings: Endings) -> Self {
        Self {
            endings,
            plan: recorder.plan(),
            recorder,
            gone: BTreeMap::new(),
            known: BTreeMap::new(),
        }
    }

    /// Takes the latest plan; to be called before a batch of events.
    pub fn refresh(&mut self, now: Instant) {
        self.endings.forget(now);
        let latest = self.recorder.plan();
        if Arc::ptr_eq(&latest, &self.plan) {
            return;
        }
        self.gone
            .retain(|_, (since, _)| now.saturating_duration_since(*since) < REMEMBERED);
        for pod in self.plan.pods.values() {
            for addr in pod.addresses.iter().map(|ip: &IpAddr| Addr::from(*ip)) {
                if let Some(workload) = self.plan.names.workloads.get(&addr)
                    && !latest.names.workloads.contains_key(&addr)
                {
                    self.gone.insert(addr, (now, Arc::clone(workload)));
                }
            }
        }
        self.plan = latest;
        self.known.clear();
    }

    fn party(&mut self, at: Endpoint) -> Party {
        if let Some(party) = self.known.get(&at.addr) {
            return Party {
                port: at.port.get(),
                ..party.clone()
            };
        }
        let party = self.name(at);
        if self.known.len() == MOST_KNOWN {
            self.known.clear();
        }
        self.known.insert(at.addr, party.clone());
        party
    }

    fn name(&self, at: Endpoint) -> Party {
        match self.gone.get(&at.addr) {
            Some((_, workload)) if !self.plan.names.workloads.contains_key(&at.addr) => {
                Party::pod(workload, at)
            }
            Some(_) | None => Party::of(&self.plan, at),
        }
    }

    /// Records one event. An event that this version does not know is left alone: a newer agent's
    /// programs may still be attached during an update.
    pub fn report(&mut self, event: &Event) {
        let kind = match event.kind {
            kind::CLOSED => Kind::Connection,
            kind::DENIED => Kind::Denied,
            kind::DROPPED => Kind::Dropped,
            kind::AUDIT => Kind::Audit,
            unknown => {
                tracing::debug!(kind = unknown, "an event of an unknown kind");
                return;
            }
        };
        let close = self.close(kind, event);
        let record = self.record(kind, event, &close);
        if kind == Kind::Connection {
            let metrics = &self.recorder.0.metrics;
            let counted = metrics.open(Labels {
                reporter: record.reporter,
                source: Arc::clone(&record.source.group),
                destination: Arc::clone(&record.destination.group),
                service: record.service.clone().unwrap_or_default(),
                security: record.security,
            });
            counted.add(record.bytes_sent, record.bytes_received);
            metrics.closed(record.reporter, &close);
        } else if kind == Kind::Audit {
            self.recorder.count_audited(&record);
        }
        self.recorder.emit(record);
    }

    /// How what an event tells of has ended.
    fn close(&mut self, kind: Kind, event: &Event) -> Close {
        if kind != Kind::Connection {
            return Close::Failed(reason(event));
        }
        let closed_by = ClosedBy::from_code(event.closed_by);
        if let ClosedBy::Reset | ClosedBy::Failed = closed_by
            && let Some(verdict) = self.endings.take(event.local, event.remote)
        {
            return Close::Changed(verdict);
        }
        match closed_by {
            ClosedBy::Unknown | ClosedBy::Local | ClosedBy::Remote | ClosedBy::Agent => {
                Close::Finished(closed_by)
            }
            ClosedBy::Reset => Close::Reset(closed_by),
            ClosedBy::Failed => Close::Failed(Reason::ConnectFailed),
        }
    }

    fn record(&mut self, kind: Kind, event: &Event, close: &Close) -> FlowRecord {
        let (local, remote) = (self.party(event.local), self.party(event.remote));
        let egress = event.direction == Direction::Egress as u8;
        let (reporter, source, destination, at) = if egress {
            (Reporter::Source, local, remote, event.remote)
        } else {
            (Reporter::Destination, remote, local, event.local)
        };
        let (bytes_sent, bytes_received) = if egress {
            (event.sent, event.received)
        } else {
            (event.received, event.sent)
        };
        let protocol = Protocol(event.protocol);
        let service = Some(event.service).filter(|at| *at != Endpoint::NONE);
        let clear = Reason::from_code(event.plaintext).unwrap_or(Reason::NoPolicy);
        let same_node = clear == Reason::SameNode;
        let closed_by = match kind {
            Kind::Audit => ClosedBy::Unknown,
            Kind::Connection | Kind::Denied | Kind::Dropped => close.closed_by(),
        };
        let shared = &self.recorder.0;
        FlowRecord {
            time: (shared.clock)(),
            kind,
            node: Arc::clone(&shared.node),
            reporter,
            protocol: protocol_label(protocol),
            duration_us: duration_us(event),
            evidence: self.evidence(kind, event.remote, same_node),
            source,
            destination,
            service: names::service(&self.plan, service, at, protocol),
            service_address: service.map(|at| at.to_string()),
            bytes_sent,
            bytes_received,
            // An audit policy refuses nothing.
            verdict: verdict_label(matches!(kind, Kind::Connection | Kind::Audit)),
            reason: reason(event),
            rule: names::rule(&self.plan, RuleId(event.rule)),
            security: if same_node {
                Security::SameNode
            } else {
                Security::None
            },
            clear: (kind == Kind::Connection).then_some(clear),
            peer_identity: None,
            rtt_us: event.rtt_us,
            retransmits: event.retransmits,
            close: close.label(),
            cause: None,
            ended_by: close.ended_by(&self.plan),
            closed_by,
            policy_revision: shared.metrics.policy_revision(),
        }
    }

    fn evidence(&self, kind: Kind, remote: Endpoint, same_node: bool) -> Evidence {
        let workload = self.plan.names.workloads.get(&remote.addr);
        // What the gate drops may have another's address.
        let held =
            |workload: &Arc<Pod>| kind != Kind::Dropped && *workload.node == *self.recorder.0.node;
        if same_node || workload.is_some_and(held) {
            Evidence::Node
        } else if workload.is_some() {
            Evidence::Address
        } else {
            Evidence::None
        }
    }
}

fn duration_us(event: &Event) -> u64 {
    match event.start_ns {
        0 => 0,
        start => event.time_ns.saturating_sub(start) / 1000,
    }
}

fn reason(event: &Event) -> Reason {
    Reason::from_code(event.reason).unwrap_or(Reason::NoPolicy)
}
