// SPDX-License-Identifier: Apache-2.0
//! Records of what passed and policies in audit mode would have refused: those of connections that
//! the proxy carries are made here, those of the kernel's events beside the others.

use std::sync::Arc;

use mesh_common::{Direction, Protocol, Verdict};

use super::names::{self, Party};
use super::{
    ClosedBy, ConnectionOpen, FlowRecord, Kind, Recorder, Reporter, protocol_label, verdict_label,
};

impl Recorder {
    /// Records that policies in audit mode would have refused a connection that the proxy carries.
    pub fn audited(&self, open: &ConnectionOpen, verdict: &Verdict) {
        let plan = self.plan();
        let shared = &self.0;
        let record = FlowRecord {
            time: (shared.clock)(),
            kind: Kind::Audit,
            node: Arc::clone(&shared.node),
            reporter: open.reporter,
            protocol: protocol_label(Protocol::TCP),
            duration_us: 0,
            source: Party::of(&plan, open.source),
            destination: Party::of(&plan, open.destination),
            service: names::service(&plan, open.service, open.destination, Protocol::TCP),
            service_address: open.service.map(|at| at.to_string()),
            bytes_sent: 0,
            bytes_received: 0,
            verdict: verdict_label(true),
            reason: verdict.reason,
            rule: names::rule(&plan, verdict.rule),
            security: open.security,
            clear: None,
            evidence: open.evidence,
            peer_identity: open.peer_identity.clone(),
            rtt_us: 0,
            retransmits: 0,
            close: verdict.reason.label(),
            cause: None,
            ended_by: None,
            closed_by: ClosedBy::Unknown,
            policy_revision: shared.metrics.policy_revision(),
        };
        self.count_audited(&record);
        self.emit(record);
    }

    pub(super) fn count_audited(&self, record: &FlowRecord) {
        let direction = match record.reporter {
            Reporter::Source => Direction::Egress,
            Reporter::Destination => Direction::Ingress,
        };
        let rule = record.rule.as_deref().unwrap_or_default();
        self.0.metrics.audited(direction, rule, record.reason);
    }
}
