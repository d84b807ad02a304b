// SPDX-License-Identifier: Apache-2.0
//! The outcome of a connection.

use mesh_common::event::closed_by;
use mesh_common::{Reason, Verdict};
use mesh_plan::Plan;

use super::names;

/// The side that closed a connection first, as seen from the reporter's pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// Unknown.
    Unknown,
    /// The reporter's pod.
    Local,
    /// The peer.
    Remote,
    /// A reset or an error.
    Reset,
    /// Neither side: the connection was never established.
    Failed,
    /// The agent: policy changed, the agent drains, or the pod is gone.
    Agent,
}

impl ClosedBy {
    /// Returns the label in records.
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

    /// Parses the code of a kernel event.
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

/// The outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// Both directions closed in order, the given side first.
    Finished(ClosedBy),
    /// One side reset or lost the connection.
    Reset(ClosedBy),
    /// A decision refused the connection before it was carried.
    Refused(Verdict),
    /// The connection could not be established, or the agent closed it, for the given reason.
    Failed(Reason),
    /// Policy or modes changed while the connection was open; the given verdict refuses it now.
    Changed(Verdict),
    /// The task that carried the connection panicked.
    Aborted,
}

impl Close {
    /// Returns the label in metrics and records.
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

    /// Returns the side that closed the connection.
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

    /// Names what refuses a connection of [`Close::Changed`]: the rule, or the reason if no rule does.
    pub(super) fn ended_by(&self, plan: &Plan) -> Option<String> {
        let Self::Changed(verdict) = self else {
            return None;
        };
        let reason = || Some(verdict.reason).filter(|reason| *reason != Reason::PolicyChanged);
        names::rule(plan, verdict.rule).or_else(|| Some(reason()?.label().to_owned()))
    }
}
