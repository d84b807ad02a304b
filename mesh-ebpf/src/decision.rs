// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! `mesh_common::path` over the maps, as functions of their own: they are verified once and keep
//! their stack to themselves.
//!
//! A pod's state is read in place. If it is replaced while a decision reads it, the decision is
//! made again; a state that is replaced each time is refused.

use mesh_common::path::{self, Origin, Outbound, Path};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::{Endpoint, IdentityId, Protocol, Reason, Verdict};

use crate::context::read;
use crate::tables::{self, Tables};

const ATTEMPTS: u32 = 2;

/// What is asked.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    /// The local pod.
    pub(crate) pod: PodIndex,
    /// The protocol.
    pub(crate) protocol: Protocol,
    /// Of an incoming packet.
    pub(crate) origin: Origin,
    /// The other end: where to, or where from.
    pub(crate) remote: Endpoint,
    /// The pod's port, of what comes in.
    pub(crate) local_port: mesh_common::Port,
}

/// The answer, for the caller to fill in beforehand.
pub(crate) const UNDECIDED: Path = Path {
    action: Outbound::Refuse,
    verdict: Verdict::refuse(Reason::PolicyMissing),
    clear: Reason::PolicyMissing,
    peer: IdentityId::UNKNOWN,
};

/// Decides what a pod sends.
#[inline(never)]
pub(crate) fn outbound(ask: &Ask, answer: &mut Path) {
    for _ in 0..ATTEMPTS {
        let Some(state) = tables::pod(ask.pod) else {
            return;
        };
        let revision = read!(state as *const PodState, revision_end);
        let path = path::outbound(&Tables, &state.view, ask.remote, ask.protocol);
        if read!(state as *const PodState, revision) == revision {
            *answer = path;
            return;
        }
    }
}

/// Decides what comes to a pod in clear.
#[inline(never)]
pub(crate) fn inbound(ask: &Ask, answer: &mut Path) {
    for _ in 0..ATTEMPTS {
        let Some(state) = tables::pod(ask.pod) else {
            return;
        };
        let revision = read!(state as *const PodState, revision_end);
        let path = path::inbound(
            &Tables,
            &state.view,
            &ask.remote.addr,
            ask.origin,
            ask.protocol,
            ask.local_port,
        );
        if read!(state as *const PodState, revision) == revision {
            *answer = path;
            return;
        }
    }
}
