// SPDX-License-Identifier: Apache-2.0
//! Flow records: one for each endpoint of a connection, closed exactly once. Metrics and the flow log
//! are both made of it, so they cannot disagree.
//!
//! The proxy opens a [`ConnectionRecord`] for every connection it carries; [`KernelRecords`] makes
//! records of the events of the kernel programs. Nothing is written here.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_common::{Direction, Endpoint, Evidence, Protocol, Verdict};
use mesh_plan::Index;

use crate::flows::FlowSink;
use crate::metrics::{Labels, Metrics};

mod bytes;
mod close;
mod close_reasons;
mod flow_record;
mod kernel;
mod names;

pub use bytes::Bytes;
pub use close::{Close, ClosedBy};
pub use close_reasons::{CloseReasons, CloseReporter, close_reasons};
pub use flow_record::{FlowRecord, Kind};
pub use kernel::KernelRecords;
pub use names::Party;

use flow_record::{Closed, Observed, Opened};

/// The policy in force: records take names, rules and the revision from the same one.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Revision of the plan; 0 = no plan yet.
    pub revision: u64,
    /// The plan.
    pub plan: Arc<Index>,
}

/// The endpoint whose node reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reporter {
    /// The pod that opened the connection.
    Source = 0,
    /// The pod that was reached.
    Destination = 1,
}

impl Reporter {
    /// Both endpoints.
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// Returns the label in metrics and records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Protection of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Security {
    /// Mutual TLS between the nodes.
    MutualTls,
    /// The connection did not leave the node.
    SameNode,
    /// None: plaintext.
    None,
}

impl Security {
    /// Returns the label in metrics and records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::SameNode => "same_node",
            Self::None => "none",
        }
    }
}

/// A connection that the proxy begins to carry.
#[derive(Clone, Debug)]
pub struct ConnectionOpen {
    /// Endpoint on this node.
    pub reporter: Reporter,
    /// Endpoint that opened the connection: the application's own address and port.
    pub source: Endpoint,
    /// Endpoint that is reached, after service translation.
    pub destination: Endpoint,
    /// Service endpoint that the application used.
    pub service: Option<Endpoint>,
    /// Verdict that allowed the connection.
    pub verdict: Verdict,
    /// Strength of the evidence of the peer's identity.
    pub evidence: Evidence,
    /// Authenticated identity of the peer.
    pub peer_identity: Option<Arc<str>>,
    /// Protection of the connection.
    pub security: Security,
}

impl ConnectionOpen {
    /// Names the endpoints and the service.
    fn named(&self, plan: &Index) -> Opened {
        Opened {
            reporter: self.reporter,
            protocol: Protocol::TCP,
            source: Party::of(plan, self.source),
            destination: Party::of(plan, self.destination),
            service: names::service(plan, self.service, self.destination, Protocol::TCP),
            service_address: self.service,
            security: self.security,
            evidence: self.evidence,
            peer_identity: self.peer_identity.clone(),
        }
    }
}

/// Opens records. Clones share everything.
#[derive(Clone)]
pub struct Recorder(Arc<Shared>);

struct Shared {
    node: Arc<str>,
    policy: Box<dyn Fn() -> Policy + Send + Sync>,
    metrics: Metrics,
    flows: FlowSink,
    clock: fn() -> SystemTime,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

impl Recorder {
    /// Makes records of `node`. `policy` returns the policy in force; `clock` tells the time of day.
    #[must_use]
    pub fn new(
        node: &str,
        policy: impl Fn() -> Policy + Send + Sync + 'static,
        metrics: Metrics,
        flows: FlowSink,
        clock: fn() -> SystemTime,
    ) -> Self {
        Self(Arc::new(Shared {
            node: node.into(),
            policy: Box::new(policy),
            metrics,
            flows,
            clock,
        }))
    }

    /// Returns the metrics that this recorder counts in.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn policy(&self) -> Policy {
        (self.0.policy)()
    }

    /// Opens the record of a connection that the proxy carries.
    #[must_use = "a record that is dropped counts as aborted"]
    pub fn open(&self, open: ConnectionOpen) -> ConnectionRecord {
        let named = open.named(&self.policy().plan);
        let counted = self.0.metrics.open(labels(&named));
        ConnectionRecord {
            began: Instant::now(),
            bytes: Bytes::new(counted),
            open: Some(Unfinished {
                recorder: self.clone(),
                named,
                verdict: open.verdict,
                rtt_us: 0,
                retransmits: 0,
                cause: None,
            }),
        }
    }

    /// Records that a policy with `mode: Audit` would have refused a connection that the proxy carries.
    pub fn audited(&self, open: &ConnectionOpen, verdict: &Verdict) {
        let policy = self.policy();
        let end = Closed {
            kind: Kind::Audit,
            duration: Duration::ZERO,
            bytes_sent: 0,
            bytes_received: 0,
            verdict: Verdict {
                allowed: true,
                ..*verdict
            },
            clear: None,
            rtt_us: 0,
            retransmits: 0,
            close: Close::Failed(verdict.reason),
            cause: None,
        };
        let record = self.record(&policy, open.named(&policy.plan), end);
        self.count_audited(&record);
        self.emit(record);
    }

    fn count_audited(&self, record: &FlowRecord) {
        let direction = match record.reporter {
            Reporter::Source => Direction::Egress,
            Reporter::Destination => Direction::Ingress,
        };
        let rule = record.rule.as_deref().unwrap_or_default();
        self.0.metrics.audited(direction, rule, record.reason);
    }

    fn record(&self, policy: &Policy, open: Opened, end: Closed) -> FlowRecord {
        let observed = Observed {
            time: (self.0.clock)(),
            node: &self.0.node,
            policy,
        };
        FlowRecord::of(&observed, open, end)
    }

    /// Sends a record to the flow log.
    fn emit(&self, record: FlowRecord) {
        self.0.flows.send(record, &self.0.metrics);
    }
}

/// The labels of a connection in metrics.
fn labels(open: &Opened) -> Labels {
    Labels {
        reporter: open.reporter,
        source: Arc::clone(&open.source.group),
        destination: Arc::clone(&open.destination.group),
        service: open.service.clone().unwrap_or_default(),
        security: open.security,
    }
}

/// The record of an open connection. [`ConnectionRecord::finish`] closes it; dropping it unfinished
/// closes it as [`Close::Aborted`].
#[derive(Debug)]
pub struct ConnectionRecord {
    began: Instant,
    bytes: Bytes,
    open: Option<Unfinished>,
}

#[derive(Debug)]
struct Unfinished {
    recorder: Recorder,
    named: Opened,
    verdict: Verdict,
    rtt_us: u32,
    retransmits: u32,
    cause: Option<&'static str>,
}

impl ConnectionRecord {
    /// Returns the byte counters.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Changes the destination: the connection is made to another endpoint of its service. Metrics keep
    /// the labels of the first endpoint: endpoints of a service hardly ever differ in them.
    pub fn redirect(&mut self, to: Endpoint, verdict: Verdict, identity: Arc<str>) {
        let Some(open) = &mut self.open else {
            return;
        };
        open.named.destination = Party::of(&open.recorder.policy().plan, to);
        open.named.peer_identity = Some(identity);
        open.verdict = verdict;
        open.cause = None;
    }

    /// Sets the cause of a failed connect to the application.
    pub fn set_cause(&mut self, cause: Option<&'static str>) {
        if let Some(open) = &mut self.open {
            open.cause = cause;
        }
    }

    /// Sets the transport statistics of the tunnel's socket: smoothed round-trip time, and segments
    /// retransmitted during this connection.
    pub fn set_transport(&mut self, rtt_us: u32, retransmits: u32) {
        if let Some(open) = &mut self.open {
            open.rtt_us = rtt_us;
            open.retransmits = retransmits;
        }
    }

    /// Closes the record.
    pub fn finish(mut self, close: Close) {
        self.close(close);
    }

    fn close(&mut self, close: Close) {
        let Some(open) = self.open.take() else {
            return;
        };
        let (bytes_sent, bytes_received) = self.bytes.finish();
        let recorder = open.recorder;
        recorder.metrics().closed(open.named.reporter, &close);
        let verdict = match close {
            Close::Refused(verdict) => verdict,
            Close::Finished(_)
            | Close::Reset(_)
            | Close::Failed(_)
            | Close::Changed(_)
            | Close::Aborted => open.verdict,
        };
        let end = Closed {
            kind: Kind::Connection,
            duration: self.began.elapsed(),
            bytes_sent,
            bytes_received,
            verdict,
            clear: (open.named.security == Security::None).then_some(verdict.reason),
            rtt_us: open.rtt_us,
            retransmits: open.retransmits,
            close,
            cause: open.cause,
        };
        let record = recorder.record(&recorder.policy(), open.named, end);
        recorder.emit(record);
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        self.close(Close::Aborted);
    }
}

#[cfg(test)]
mod tests;
