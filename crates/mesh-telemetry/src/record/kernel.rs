// SPDX-License-Identifier: Apache-2.0
//! Records of kernel events: direct connections, refusals, dropped packets.
//!
//! A pod's last events arrive after the plan has dropped the pod, so names of removed pods are kept
//! for a while.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::event::{Event, kind};
use mesh_common::policy::RuleId;
use mesh_common::{Addr, Direction, Endpoint, Evidence, Protocol, Reason, Verdict};
use mesh_plan::Index;
use mesh_plan::cluster::Pod;

use super::flow_record::{Closed, Opened};
use super::names::{self, Party};
use super::{Close, CloseReasons, ClosedBy, Kind, Policy, Recorder, Reporter, Security, labels};

/// Time that names of removed pods are kept.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Cached endpoints.
const MAX_CACHED: usize = 4096;

/// Makes records of kernel events. One task owns it.
#[derive(Debug)]
pub struct KernelRecords {
    recorder: Recorder,
    reasons: CloseReasons,
    policy: Policy,
    /// Pods of this node that the plan no longer has.
    removed: BTreeMap<Addr, (Instant, Arc<Pod>)>,
    /// Names of addresses under the current plan: a busy node reports the same few endpoints thousands
    /// of times a second.
    cache: BTreeMap<Addr, Party>,
}

impl KernelRecords {
    /// Starts with the policy in force.
    #[must_use]
    pub fn new(recorder: Recorder, reasons: CloseReasons) -> Self {
        Self {
            reasons,
            policy: recorder.policy(),
            recorder,
            removed: BTreeMap::new(),
            cache: BTreeMap::new(),
        }
    }

    fn plan(&self) -> &Index {
        &self.policy.plan
    }

    /// Takes the latest policy; to be called before a batch of events.
    pub fn refresh(&mut self, now: Instant) {
        self.reasons.expire(now);
        let latest = self.recorder.policy();
        if Arc::ptr_eq(&latest.plan, &self.policy.plan) {
            return;
        }
        self.removed
            .retain(|_, (since, _)| now.saturating_duration_since(*since) < REMEMBERED);
        let old = std::mem::replace(&mut self.policy, latest);
        let names = &self.policy.plan.names.workloads;
        for pod in old.plan.pods.values() {
            for addr in pod.addresses.iter().map(|ip: &IpAddr| Addr::from(*ip)) {
                if let Some(workload) = old.plan.names.workloads.get(&addr)
                    && !names.contains_key(&addr)
                {
                    self.removed.insert(addr, (now, Arc::clone(workload)));
                }
            }
        }
        self.cache.clear();
    }

    fn party(&mut self, at: Endpoint) -> Party {
        if let Some(party) = self.cache.get(&at.addr) {
            return Party {
                port: at.port.get(),
                ..party.clone()
            };
        }
        let party = self.name(at);
        if self.cache.len() == MAX_CACHED {
            self.cache.clear();
        }
        self.cache.insert(at.addr, party.clone());
        party
    }

    fn name(&self, at: Endpoint) -> Party {
        match self.removed.get(&at.addr) {
            Some((_, workload)) if !self.plan().names.workloads.contains_key(&at.addr) => {
                Party::pod(workload, at)
            }
            Some(_) | None => Party::of(self.plan(), at),
        }
    }

    /// Records one event. Unknown events are ignored: a newer agent's programs may still be attached
    /// during an update.
    pub fn report(&mut self, event: &Event) {
        let kind = match event.kind {
            kind::CLOSED => Kind::Connection,
            kind::DENIED => Kind::Denied,
            kind::DROPPED => Kind::Dropped,
            kind::AUDIT => Kind::Audit,
            unknown => {
                tracing::debug!(kind = unknown, "kernel event of an unknown kind");
                return;
            }
        };
        let open = self.opened(kind, event);
        let end = self.closed(kind, event, open.reporter);
        let counted = (kind == Kind::Connection).then(|| labels(&open));
        let record = self.recorder.record(&self.policy, open, end);
        let metrics = self.recorder.metrics();
        if let Some(labels) = counted {
            let counted = metrics.open(labels);
            counted.add(record.bytes_sent, record.bytes_received);
            metrics.closed(record.reporter, &end.close);
        } else if kind == Kind::Audit {
            self.recorder.count_audited(&record);
        }
        self.recorder.emit(record);
    }

    fn opened(&mut self, kind: Kind, event: &Event) -> Opened {
        let (local, remote) = (self.party(event.local), self.party(event.remote));
        let egress = event.direction == Direction::Egress as u8;
        let (reporter, source, destination, at) = if egress {
            (Reporter::Source, local, remote, event.remote)
        } else {
            (Reporter::Destination, remote, local, event.local)
        };
        let protocol = Protocol(event.protocol);
        let service = Some(event.service).filter(|at| *at != Endpoint::NONE);
        let same_node = clear(event) == Reason::SameNode;
        Opened {
            reporter,
            protocol,
            source,
            destination,
            service: names::service(self.plan(), service, at, protocol),
            service_address: service,
            security: if same_node {
                Security::SameNode
            } else {
                Security::None
            },
            evidence: self.evidence(kind, event.remote, same_node),
            peer_identity: None,
        }
    }

    fn closed(&mut self, kind: Kind, event: &Event, reporter: Reporter) -> Closed {
        let (bytes_sent, bytes_received) = match reporter {
            Reporter::Source => (event.sent, event.received),
            Reporter::Destination => (event.received, event.sent),
        };
        let nanoseconds = match event.start_ns {
            0 => 0,
            start => event.time_ns.saturating_sub(start),
        };
        Closed {
            kind,
            duration: Duration::from_nanos(nanoseconds),
            bytes_sent,
            bytes_received,
            verdict: Verdict {
                // An audit policy refuses nothing.
                allowed: matches!(kind, Kind::Connection | Kind::Audit),
                reason: reason(event),
                rule: RuleId(event.rule),
            },
            clear: (kind == Kind::Connection).then(|| clear(event)),
            rtt_us: event.rtt_us,
            retransmits: event.retransmits,
            close: self.close(kind, event),
            cause: None,
        }
    }

    /// The outcome of the connection or packet of an event.
    fn close(&mut self, kind: Kind, event: &Event) -> Close {
        if kind != Kind::Connection {
            return Close::Failed(reason(event));
        }
        let closed_by = ClosedBy::from_code(event.closed_by);
        if let ClosedBy::Reset | ClosedBy::Failed = closed_by
            && let Some(verdict) = self.reasons.take(event.local, event.remote)
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

    fn evidence(&self, kind: Kind, remote: Endpoint, same_node: bool) -> Evidence {
        let workload = self.plan().names.workloads.get(&remote.addr);
        // A packet that the gate drops may have a forged address.
        let local =
            |workload: &Arc<Pod>| kind != Kind::Dropped && *workload.node == *self.recorder.0.node;
        if same_node || workload.is_some_and(local) {
            Evidence::Node
        } else if workload.is_some() {
            Evidence::Address
        } else {
            Evidence::None
        }
    }
}

fn reason(event: &Event) -> Reason {
    Reason::from_code(event.reason).unwrap_or(Reason::NoPolicy)
}

/// The reason for plaintext.
fn clear(event: &Event) -> Reason {
    Reason::from_code(event.plaintext).unwrap_or(Reason::NoPolicy)
}
