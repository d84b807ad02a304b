// SPDX-License-Identifier: Apache-2.0
//! One record for each end of a connection, finished exactly once: metrics and flow log are both
//! made of it, so they cannot disagree.
//!
//! The proxy opens a [`ConnectionRecord`] for every connection it carries; [`KernelRecords`] makes
//! records of what the kernel programs report. This room writes nothing anywhere itself.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_common::event::closed_by;
use mesh_common::{Endpoint, Evidence, Protocol, Reason, Verdict};
use mesh_plan::{Index, Plan};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::flows::FlowSink;
use crate::metrics::{Labels, Metrics};

mod audit;
mod bytes;
mod ended;
mod kernel;
mod names;

pub use bytes::Bytes;
pub use ended::{Ended, Endings, endings};
pub use kernel::KernelRecords;
pub use names::Party;

/// Which end's node reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reporter {
    /// The node of the pod that opened the connection.
    Source = 0,
    /// The node of the pod that was reached.
    Destination = 1,
}

impl Reporter {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// The label in metrics and records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How a connection was protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Security {
    /// Mutual TLS between the nodes.
    MutualTls,
    /// It did not leave the node.
    SameNode,
    /// Not at all.
    None,
}

impl Security {
    /// The label in metrics and records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::SameNode => "same_node",
            Self::None => "none",
        }
    }
}

/// Who ended a connection first, seen from the reporter's pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// Not known.
    Unknown,
    /// The reporter's pod.
    Local,
    /// The other end.
    Remote,
    /// A reset or an error.
    Reset,
    /// Nobody: it was never established.
    Failed,
    /// The agent, because of policy, drain, or because the pod is gone.
    Agent,
}

impl ClosedBy {
    /// The label in records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Reset => "reset",
            Self::Failed => "failed",
            Self::Agent => "agent",
        }
    }

    /// From the number in an event of the kernel.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code {
            closed_by::LOCAL => Self::Local,
            closed_by::REMOTE => Self::Remote,
            closed_by::RESET => Self::Reset,
            closed_by::FAILED => Self::Failed,
            _ => Self::Unknown,
        }
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// Both directions ended in order; who ended first.
    Finished(ClosedBy),
    /// An end reset it, or lost it.
    Reset(ClosedBy),
    /// It was never carried: a decision refused it.
    Refused(Verdict),
    /// It could not be established, or was ended from outside, for this reason.
    Failed(Reason),
    /// It was open, and policy or modes changed: what refuses it now.
    Changed(Verdict),
    /// Its task vanished without a word: a panic.
    Aborted,
}

impl Close {
    /// The label in metrics and records.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Finished(_) => "finished",
            Self::Reset(_) => "reset",
            Self::Refused(verdict) => verdict.reason.label(),
            Self::Failed(reason) => reason.label(),
            Self::Changed(_) => Reason::PolicyChanged.label(),
            Self::Aborted => "aborted",
        }
    }

    /// Who ended it.
    #[must_use]
    pub const fn closed_by(&self) -> ClosedBy {
        match self {
            Self::Finished(by) | Self::Reset(by) => *by,
            Self::Refused(_) => ClosedBy::Failed,
            Self::Failed(Reason::PolicyChanged | Reason::AgentShutdown | Reason::PodDeleted)
            | Self::Changed(_)
            | Self::Aborted => ClosedBy::Agent,
            Self::Failed(_) => ClosedBy::Failed,
        }
    }

    /// Of [`Close::Changed`], by its label: the rule, or where there is none the reason.
    fn ended_by(&self, plan: &Plan) -> Option<String> {
        let Self::Changed(verdict) = self else {
            return None;
        };
        let reason = || Some(verdict.reason).filter(|reason| *reason != Reason::PolicyChanged);
        names::rule(plan, verdict.rule).or_else(|| Some(reason()?.label().to_owned()))
    }
}

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An end of a connection.
    Connection,
    /// A connection or datagram that a socket hook refused.
    Denied,
    /// A packet that the gate dropped.
    Dropped,
    /// What an audit policy would have refused.
    Audit,
}

/// One line of the flow log. Bytes and endpoints are seen from the one that opened the connection,
/// whoever reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowRecord {
    /// When the connection ended or the event was seen (RFC 3339).
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// What the record is about.
    pub kind: Kind,
    /// The reporting node.
    pub node: Arc<str>,
    /// Whose node reports.
    #[serde(serialize_with = "label")]
    pub reporter: Reporter,
    /// `tcp`, `udp`, or the protocol's number.
    pub protocol: String,
    /// From the first decision to the end, in microseconds.
    pub duration_us: u64,
    /// Who opened it.
    pub source: Party,
    /// Who was reached, after translation.
    pub destination: Party,
    /// `namespace/name` of the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The service's address and port that the application used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_address: Option<String>,
    /// Application bytes from source to destination.
    pub bytes_sent: u64,
    /// Application bytes from destination to source.
    pub bytes_received: u64,
    /// `allowed` or `denied`.
    pub verdict: &'static str,
    /// Why.
    #[serde(serialize_with = "label")]
    pub reason: Reason,
    /// The rule that decided, by object and place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// How it was protected.
    #[serde(serialize_with = "label")]
    pub security: Security,
    /// Why it was in clear, if it was.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "label_of")]
    pub clear: Option<Reason>,
    /// How well the peer is known.
    #[serde(serialize_with = "label")]
    pub evidence: Evidence,
    /// The peer's proven identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_identity: Option<Arc<str>>,
    /// Smoothed round-trip time, microseconds; of the tunnel's socket where there is one.
    #[serde(skip_serializing_if = "is_zero")]
    pub rtt_us: u32,
    /// Segments sent again; of the tunnel's socket where there is one.
    #[serde(skip_serializing_if = "is_zero")]
    pub retransmits: u32,
    /// How it ended: `finished`, `reset`, `aborted`, or a reason.
    pub close: &'static str,
    /// With `connect_failed`, what the connect to the application met, where that is known:
    /// `refused`, `timed_out`, `unreachable` or `address_in_use`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// With `policy_changed`, what refuses it now: the rule, by its number where only the other end's
    /// node knows it, or the reason where no rule does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_by: Option<String>,
    /// Who ended it.
    #[serde(serialize_with = "label")]
    pub closed_by: ClosedBy,
    /// Number of the plan in force at the end (`mesh_policy_revision`).
    pub policy_revision: u64,
}

/// Something with a label of its own.
trait Labelled {
    fn text(&self) -> &'static str;
}

macro_rules! labelled {
    ($($kind:ty),*) => { $(impl Labelled for $kind {
        fn text(&self) -> &'static str { (*self).label() }
    })* };
}

labelled!(Reporter, Reason, Security, Evidence, ClosedBy);

fn label<S: serde::Serializer>(of: &impl Labelled, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(of.text())
}

#[expect(clippy::ref_option, reason = "the signature that serde calls")]
fn label_of<S: serde::Serializer>(
    of: &Option<impl Labelled>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match of {
        Some(of) => label(of, serializer),
        None => serializer.serialize_none(),
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde calls"
)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let text = OffsetDateTime::from(*time)
        .format(&time::format_description::well_known::Rfc3339)
        .map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&text)
}

fn protocol_label(protocol: Protocol) -> String {
    match protocol {
        Protocol::TCP => "tcp".to_owned(),
        Protocol::UDP => "udp".to_owned(),
        Protocol::SCTP => "sctp".to_owned(),
        Protocol::ICMP => "icmp".to_owned(),
        Protocol::ICMPV6 => "icmpv6".to_owned(),
        other => other.0.to_string(),
    }
}

/// What is known of a connection when the proxy begins to carry it.
#[derive(Clone, Debug)]
pub struct ConnectionOpen {
    /// Which end this agent is.
    pub reporter: Reporter,
    /// Who opened it: the application's own address and port.
    pub source: Endpoint,
    /// Who is reached, after translation.
    pub destination: Endpoint,
    /// The service's endpoint that the application used.
    pub service: Option<Endpoint>,
    /// The decision that let it pass.
    pub verdict: Verdict,
    /// How well the peer is known.
    pub evidence: Evidence,
    /// The peer's proven identity.
    pub peer_identity: Option<Arc<str>>,
    /// How it is protected.
    pub security: Security,
}

/// Opens records. Clones share everything.
#[derive(Clone)]
pub struct Recorder(Arc<Shared>);

struct Shared {
    node: Arc<str>,
    plan: watch::Receiver<Arc<Index>>,
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
    /// Records of `node`, with names from the latest plan. `clock` tells the time of day.
    #[must_use]
    pub fn new(
        node: &str,
        plan: watch::Receiver<Arc<Index>>,
        metrics: Metrics,
        flows: FlowSink,
        clock: fn() -> SystemTime,
    ) -> Self {
        Self(Arc::new(Shared {
            node: node.into(),
            plan,
            metrics,
            flows,
            clock,
        }))
    }

    /// Where this recorder counts.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn plan(&self) -> Arc<Index> {
        Arc::clone(&self.0.plan.borrow())
    }

    /// Opens the record of a connection that the proxy carries.
    #[must_use = "a record that is dropped counts as aborted"]
    pub fn open(&self, open: ConnectionOpen) -> ConnectionRecord {
        let plan = self.plan();
        let source = Party::of(&plan, open.source);
        let destination = Party::of(&plan, open.destination);
        let service = names::service(&plan, open.service, open.destination, Protocol::TCP);
        let counted = self.0.metrics.open(Labels {
            reporter: open.reporter,
            source: Arc::clone(&source.group),
            destination: Arc::clone(&destination.group),
            service: service.clone().unwrap_or_default(),
            security: open.security,
        });
        ConnectionRecord {
            began: Instant::now(),
            bytes: Bytes::new(counted),
            end: Some(Unfinished {
                recorder: self.clone(),
                open,
                source,
                destination,
                service,
                rtt_us: 0,
                retransmits: 0,
                cause: None,
            }),
        }
    }

    /// The only way out: to metrics (how it ended) and to the flow log.
    fn emit(&self, record: FlowRecord) {
        self.0.flows.send(record, &self.0.metrics);
    }
}

/// The record of an open connection. [`ConnectionRecord::finish`] ends it; dropping it unfinished
/// ends it as [`Close::Aborted`].
#[derive(Debug)]
pub struct ConnectionRecord {
    began: Instant,
    bytes: Bytes,
    end: Option<Unfinished>,
}

#[derive(Debug)]
struct Unfinished {
    recorder: Recorder,
    open: ConnectionOpen,
    source: Party,
    destination: Party,
    service: Option<String>,
    rtt_us: u32,
    retransmits: u32,
    cause: Option<&'static str>,
}

impl ConnectionRecord {
    /// Where bytes are counted.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The connection is made to another endpoint than the one it was opened for. Metrics keep the
    /// labels of the first one: endpoints of a service hardly ever differ in them.
    pub(crate) fn redirect(&mut self, to: Endpoint, verdict: Verdict, identity: Arc<str>) {
        let Some(end) = &mut self.end else {
            return;
        };
        end.destination = Party::of(&end.recorder.plan(), to);
        end.open.destination = to;
        end.open.verdict = verdict;
        end.open.peer_identity = Some(identity);
        end.cause = None;
    }

    /// What a connect to the application met.
    pub(crate) fn set_cause(&mut self, cause: Option<&'static str>) {
        if let Some(end) = &mut self.end {
            end.cause = cause;
        }
    }

    /// What the tunnel's socket says: smoothed round-trip time, and segments sent again over this
    /// connection.
    pub fn set_transport(&mut self, rtt_us: u32, retransmits: u32) {
        if let Some(end) = &mut self.end {
            end.rtt_us = rtt_us;
            end.retransmits = retransmits;
        }
    }

    /// Ends the record.
    pub fn finish(mut self, close: Close) {
        self.end(close);
    }

    fn end(&mut self, close: Close) {
        let Some(end) = self.end.take() else {
            return;
        };
        let shared = &end.recorder.0;
        let (bytes_sent, bytes_received) = self.bytes.finish();
        shared.metrics.closed(end.open.reporter, &close);
        let verdict = match close {
            Close::Refused(verdict) => verdict,
            Close::Finished(_)
            | Close::Reset(_)
            | Close::Failed(_)
            | Close::Changed(_)
            | Close::Aborted => end.open.verdict,
        };
        let plan = end.recorder.plan();
        let clear = (end.open.security == Security::None).then_some(verdict.reason);
        end.recorder.emit(FlowRecord {
            time: (shared.clock)(),
            kind: Kind::Connection,
            node: Arc::clone(&shared.node),
            reporter: end.open.reporter,
            protocol: protocol_label(Protocol::TCP),
            duration_us: micros(self.began.elapsed()),
            source: end.source,
            destination: end.destination,
            service: end.service,
            service_address: end.open.service.map(|at| at.to_string()),
            bytes_sent,
            bytes_received,
            verdict: verdict_label(verdict.allowed),
            reason: verdict.reason,
            rule: names::rule(&plan, verdict.rule),
            security: end.open.security,
            clear,
            evidence: end.open.evidence,
            peer_identity: end.open.peer_identity,
            rtt_us: end.rtt_us,
            retransmits: end.retransmits,
            close: close.label(),
            cause: end.cause,
            ended_by: close.ended_by(&plan),
            closed_by: close.closed_by(),
            policy_revision: shared.metrics.policy_revision(),
        });
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        self.end(Close::Aborted);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

const fn verdict_label(allowed: bool) -> &'static str {
    if allowed { "allowed" } else { "denied" }
}

#[cfg(test)]
mod tests;
