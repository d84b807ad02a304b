// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The decisions of `mesh_common` over the maps, as global functions: the verifier checks each once,
//! by the types of its arguments alone, and not at each call. A global function has at most five
//! arguments and returns a number, so structs are passed by pointer.
//!
//! A pod's state is read in place. If the agent replaces it during a decision, the decision is made
//! once more; if that happens again, the traffic is denied.

use mesh_common::path::{self, Arrival, Origin, Outbound, Path};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::policy::{self, Question};
use mesh_common::{Endpoint, IdentityId, Port, Protocol, Reason, Verdict};

use crate::tables::{self, Tables};
use crate::volatile::read;

/// The return value of a global function that wrote its answer.
pub(crate) const ANSWERED: u64 = 0;
/// The return value of a global function that got a null pointer, which callers never pass, or an
/// unknown pod.
pub(crate) const UNANSWERED: u64 = 1;
/// The return value of a decision during which the pod's state was replaced.
const TORN: u64 = 2;

/// Calls `mesh_common::decide` as a global function.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn mesh_decide(question: *const Question, verdict: *mut Verdict) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(question), Some(verdict)) = (unsafe { (question.as_ref(), verdict.as_mut()) }) else {
        return UNANSWERED;
    };
    *verdict = policy::decide(&Tables, question);
    ANSWERED
}

/// A connection or datagram of a pod that is to be decided.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    /// The peer's endpoint: the destination of outgoing and the source of incoming traffic.
    pub(crate) remote: Endpoint,
    /// The local pod.
    pub(crate) pod: PodIndex,
    /// The pod's port; 0 = the socket has none yet.
    pub(crate) local_port: Port,
    /// The IP protocol.
    pub(crate) protocol: Protocol,
    /// The provenance of the source address of incoming traffic.
    pub(crate) origin: Origin,
}

impl Ask {
    /// Returns the part that decides plaintext traffic to the pod.
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

/// The decision about an [`Ask`].
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Decision {
    /// The action and its reasons.
    pub(crate) path: Path,
    /// The config generation by which it was decided, or an older one.
    pub(crate) generation: u64,
}

impl Decision {
    /// The value before a decision, and of one that could not be made: it denies.
    pub(crate) const UNDECIDED: Self = Self {
        path: UNDECIDED,
        generation: 0,
    };

    /// Returns whether the traffic is denied.
    #[inline(always)]
    pub(crate) fn refuses(&self) -> bool {
        matches!(self.path.action, Outbound::Refuse)
    }
}

const UNDECIDED: Path = Path {
    action: Outbound::Refuse,
    verdict: Verdict::refuse(Reason::PolicyMissing),
    clear: Reason::PolicyMissing,
    peer: IdentityId::UNKNOWN,
};

/// Decides traffic that a pod sends. `decision` must be [`Decision::UNDECIDED`] before.
#[inline(always)]
pub(crate) fn outbound(ask: &Ask, decision: &mut Decision) {
    decision.generation = tables::config_generation();
    let path = &mut decision.path;
    if mesh_outbound(ask, path) == TORN && mesh_outbound(ask, path) == TORN {
        *path = UNDECIDED;
    }
}

/// Decides plaintext traffic to a pod. `decision` must be [`Decision::UNDECIDED`] before.
#[inline(always)]
pub(crate) fn inbound(ask: &Ask, decision: &mut Decision) {
    decision.generation = tables::config_generation();
    let path = &mut decision.path;
    if mesh_inbound(ask, path) == TORN && mesh_inbound(ask, path) == TORN {
        *path = UNDECIDED;
    }
}

/// Calls `mesh_common::path::outbound` as a global function.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_outbound(ask: *const Ask, answer: *mut Path) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
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

/// Calls `mesh_common::path::inbound` as a global function.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_inbound(ask: *const Ask, answer: *mut Path) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
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
