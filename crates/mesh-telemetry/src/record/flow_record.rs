// SPDX-License-Identifier: Apache-2.0
//! The flow record, and the one place that fills it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_common::{Endpoint, Evidence, Protocol, Reason, Verdict};
use serde::Serialize;
use time::OffsetDateTime;

use super::{Close, ClosedBy, Party, Policy, Reporter, Security, names};

/// The subject of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One endpoint's view of a closed connection.
    Connection,
    /// A connection or datagram that a socket hook refused.
    Denied,
    /// A packet that the tc gate dropped.
    Dropped,
    /// Traffic that a policy with `mode: Audit` would have refused.
    Audit,
}

/// One line of the flow log. Source is the endpoint that opened the connection, whichever node reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowRecord {
    /// Time of the close or of the event (RFC 3339).
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Subject of the record.
    pub kind: Kind,
    /// Name of the reporting node.
    pub node: Arc<str>,
    /// Endpoint whose node reports.
    #[serde(serialize_with = "label")]
    pub reporter: Reporter,
    /// `tcp`, `udp`, another known protocol, or the protocol number.
    pub protocol: String,
    /// Time from the first decision to the close, in microseconds.
    pub duration_us: u64,
    /// Endpoint that opened the connection.
    pub source: Party,
    /// Endpoint that was reached, after service translation.
    pub destination: Party,
    /// Service, as `namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Service address and port that the application used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_address: Option<String>,
    /// Application bytes from source to destination.
    pub bytes_sent: u64,
    /// Application bytes from destination to source.
    pub bytes_received: u64,
    /// `allowed` or `denied`.
    pub verdict: &'static str,
    /// Reason of the verdict.
    #[serde(serialize_with = "label")]
    pub reason: Reason,
    /// Rule that decided: its object, and its place in the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Protection of the connection.
    #[serde(serialize_with = "label")]
    pub security: Security,
    /// Reason for plaintext, if the connection was plaintext.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "label_of")]
    pub clear: Option<Reason>,
    /// Strength of the evidence of the peer's identity.
    #[serde(serialize_with = "label")]
    pub evidence: Evidence,
    /// Authenticated identity of the peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_identity: Option<Arc<str>>,
    /// Smoothed round-trip time in microseconds, of the tunnel's socket if the connection has one.
    #[serde(skip_serializing_if = "is_zero")]
    pub rtt_us: u32,
    /// Retransmitted segments, of the tunnel's socket if the connection has one.
    #[serde(skip_serializing_if = "is_zero")]
    pub retransmits: u32,
    /// Outcome: `finished`, `reset`, `aborted`, or a reason.
    pub close: &'static str,
    /// Cause of `connect_failed`, if known: `refused`, `timed_out`, `unreachable` or `address_in_use`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// Cause of `policy_changed`: the rule that refuses the connection now, by number if only the peer's
    /// node knows it, or the reason if no rule does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_by: Option<String>,
    /// Side that closed the connection.
    #[serde(serialize_with = "label")]
    pub closed_by: ClosedBy,
    /// Revision of the policy in force at the close (`mesh_policy_revision`); the names of this record and
    /// its rule are from this revision.
    pub policy_revision: u64,
}

/// A value with a label.
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

/// The reporting node, the time of the report, and the policy that it names things by.
#[derive(Debug)]
pub(super) struct Observed<'a> {
    pub(super) time: SystemTime,
    pub(super) node: &'a Arc<str>,
    pub(super) policy: &'a Policy,
}

/// The part of a record that is known when a connection opens.
#[derive(Clone, Debug)]
pub(super) struct Opened {
    pub(super) reporter: Reporter,
    pub(super) protocol: Protocol,
    pub(super) source: Party,
    pub(super) destination: Party,
    /// `namespace/name` of the service.
    pub(super) service: Option<String>,
    pub(super) service_address: Option<Endpoint>,
    pub(super) security: Security,
    pub(super) evidence: Evidence,
    pub(super) peer_identity: Option<Arc<str>>,
}

/// The part of a record that is known when a connection closes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Closed {
    pub(super) kind: Kind,
    pub(super) duration: Duration,
    pub(super) bytes_sent: u64,
    pub(super) bytes_received: u64,
    pub(super) verdict: Verdict,
    /// Reason for plaintext.
    pub(super) clear: Option<Reason>,
    pub(super) rtt_us: u32,
    pub(super) retransmits: u32,
    pub(super) close: Close,
    /// Cause of a failed connect.
    pub(super) cause: Option<&'static str>,
}

impl FlowRecord {
    /// Combines both parts into a record.
    pub(super) fn of(observed: &Observed<'_>, open: Opened, end: Closed) -> Self {
        let plan = &observed.policy.plan;
        Self {
            time: observed.time,
            kind: end.kind,
            node: Arc::clone(observed.node),
            reporter: open.reporter,
            protocol: protocol_label(open.protocol),
            duration_us: u64::try_from(end.duration.as_micros()).unwrap_or(u64::MAX),
            source: open.source,
            destination: open.destination,
            service: open.service,
            service_address: open.service_address.map(|at| at.to_string()),
            bytes_sent: end.bytes_sent,
            bytes_received: end.bytes_received,
            verdict: if end.verdict.allowed {
                "allowed"
            } else {
                "denied"
            },
            reason: end.verdict.reason,
            rule: names::rule(plan, end.verdict.rule),
            security: open.security,
            clear: end.clear,
            evidence: open.evidence,
            peer_identity: open.peer_identity,
            rtt_us: end.rtt_us,
            retransmits: end.retransmits,
            close: end.close.label(),
            cause: end.cause,
            ended_by: end.close.ended_by(plan),
            closed_by: match end.kind {
                // An audited connection goes on.
                Kind::Audit => ClosedBy::Unknown,
                Kind::Connection | Kind::Denied | Kind::Dropped => end.close.closed_by(),
            },
            policy_revision: observed.policy.revision,
        }
    }
}
