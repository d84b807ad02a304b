// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The decisions of `mesh_common` over the maps, as global functions: the verifier looks at each
//! once, by the types of its arguments alone, and not at each call; and each keeps its stack to
//! itself.
//!
//! A pod's state is read in place. If it is replaced while a decision reads it, the decision is
//! made again; a state that is replaced each time is refused.

use mesh_common::path::{self, Arrival, Origin, Outbound, Path};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::policy::{self, Question};
use mesh_common::{Endpoint, IdentityId, Port, Protocol, Reason, Verdict};

use crate::context::read;
use crate::tables::{self, Tables};

/// The value of a global function that has answered.
pub(crate) const ANSWERED: u64 = 0;
/// The value of a global function that has not: a null argument, which callers never pass.
pub(crate) const UNANSWERED: u64 = 1;
/// The state was replaced meanwhile.
const TORN: u64 = 2;

/// `mesh_common::decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn mesh_decide(question: *const Question, verdict: *mut Verdict) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(question), Some(verdict)) = (unsafe { (question.as_ref(), verdict.as_mut()) }) else {
        return UNANSWERED;
    };
    *verdict = policy::decide(&Tables, question);
    ANSWERED
}

/// What is asked.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    /// The other end: where to, or where from.
    pub(crate) remote: Endpoint,
    /// The local pod.
    pub(crate) pod: PodIndex,
    /// The pod's port, of what comes in.
    pub(crate) local_port: Port,
    /// The protocol.
    pub(crate) protocol: Protocol,
    /// Of an incoming packet.
    pub(crate) origin: Origin,
}

impl Ask {
    /// The question about a connection or datagram that arrives at the pod as plaintext.
    #[inline(always)]
    pub(crate) const fn arrival(&self) -> Arrival<'_> {
        Arrival {
            from: &self.remote.addr,
            origin: self.origin,
            protocol: self.protocol,
            port: self.local_port,
        }
    }
}

/// What holds before anything is decided, and when nothing could be.
pub(crate) const UNDECIDED: Path = Path {
    action: Outbound::Refuse,
    verdict: Verdict::refuse(Reason::PolicyMissing),
    clear: Reason::PolicyMissing,
    peer: IdentityId::UNKNOWN,
};

/// Decides what a pod sends; `path` is undecided before. The value is the revision of facts, at
/// least, by which it was decided.
#[inline(always)]
pub(crate) fn outbound(ask: &Ask, path: &mut Path) -> u64 {
    let facts = tables::facts();
    if mesh_outbound(ask, path) == TORN && mesh_outbound(ask, path) == TORN {
        *path = UNDECIDED;
    }
    facts
}

/// Decides what comes to a pod in clear; as [`outbound`].
#[inline(always)]
pub(crate) fn inbound(ask: &Ask, path: &mut Path) -> u64 {
    let facts = tables::facts();
    if mesh_inbound(ask, path) == TORN && mesh_inbound(ask, path) == TORN {
        *path = UNDECIDED;
    }
    facts
}

/// `mesh_common::path::outbound`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_outbound(ask: *const Ask, answer: *mut Path) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(ask), Some(answer)) = (unsafe { (ask.as_ref(), answer.as_mut()) }) else {
        return UNANSWERED;
    };
    let Some(state) = tables::pod(ask.pod) else {
        return UNANSWERED;
    };
    let revision = read!(state as *const PodState, revision_end);
    let set = state.view.set;
    *answer = path::outbound(&Tables, &state.view, set, ask.remote, ask.protocol);
    if read!(state as *const PodState, revision) == revision {
        ANSWERED
    } else {
        TORN
    }
}

/// `mesh_common::path::inbound`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_inbound(ask: *const Ask, answer: *mut Path) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(ask), Some(answer)) = (unsafe { (ask.as_ref(), answer.as_mut()) }) else {
        return UNANSWERED;
    };
    let Some(state) = tables::pod(ask.pod) else {
        return UNANSWERED;
    };
    let revision = read!(state as *const PodState, revision_end);
    *answer = path::inbound(&Tables, &state.view, state.view.set, ask.arrival());
    if read!(state as *const PodState, revision) == revision {
        ANSWERED
    } else {
        TORN
    }
}
