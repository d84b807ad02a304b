// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! What policies in audit mode would refuse: asked after a connection or flow was allowed, reported,
//! and let pass.
//!
//! Each is asked about once, where it is decided first: connections at the socket hooks, datagrams
//! where their flow is opened. Pods without such policies pay for a flag.

use mesh_common::path::{self, Outbound, Path};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::policy::{Policies as _, PolicySetId};
use mesh_common::{Direction, Endpoint};

use crate::decision::{ANSWERED, Ask, UNANSWERED};
use crate::report::{AUDIT, Refused, refused};
use crate::tables::{self, Tables};

/// The state of a pod that policies in audit mode select.
#[inline(always)]
pub(crate) fn audited(pod: PodIndex) -> Option<&'static PodState> {
    tables::pod(pod).filter(|state| state.view.has(PodState::AUDITED))
}

/// Asks about what a pod sends and may send.
#[inline(always)]
pub(crate) fn outbound(state: &PodState, ask: &Ask, service: Option<&Endpoint>) {
    let own = if ask.remote.addr.is_v4() {
        state.view.v4
    } else {
        state.view.v6
    };
    let local = Endpoint::new(own, ask.local_port);
    let service = service.map_or(core::ptr::null(), core::ptr::from_ref);
    let _ = mesh_audit_outbound(ask, &local, service);
}

/// Asks about what comes to a pod in clear, at `local`, and may come.
#[inline(always)]
pub(crate) fn inbound(ask: &Ask, local: &Endpoint) {
    let _ = mesh_audit_inbound(ask, local);
}

/// [`outbound`] as a global function (see `decision`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_audit_outbound(
    ask: *const Ask,
    local: *const Endpoint,
    service: *const Endpoint,
) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(ask), Some(local)) = (unsafe { (ask.as_ref(), local.as_ref()) }) else {
        return UNANSWERED;
    };
    let Some((state, shadow)) = shadow(ask.pod) else {
        return UNANSWERED;
    };
    let path = path::outbound(&Tables, &state.view, shadow, ask.remote, ask.protocol);
    if refuses(&path) {
        let who = Refused::new(ask.pod, Direction::Egress, ask.protocol, AUDIT);
        // SAFETY: null, or of this type.
        let service = unsafe { service.as_ref() };
        refused(who, Some(local), Some(&ask.remote), service, &path.verdict);
    }
    ANSWERED
}

/// [`inbound`] as a global function (see `decision`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_audit_inbound(ask: *const Ask, local: *const Endpoint) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(ask), Some(local)) = (unsafe { (ask.as_ref(), local.as_ref()) }) else {
        return UNANSWERED;
    };
    let Some((state, shadow)) = shadow(ask.pod) else {
        return UNANSWERED;
    };
    let path = path::inbound(&Tables, &state.view, shadow, ask.arrival());
    if refuses(&path) {
        let who = Refused::new(ask.pod, Direction::Ingress, ask.protocol, AUDIT);
        refused(who, Some(local), Some(&ask.remote), None, &path.verdict);
    }
    ANSWERED
}

/// A pod, and its policy set with the policies in audit mode enforced.
#[inline(always)]
fn shadow(pod: PodIndex) -> Option<(&'static PodState, PolicySetId)> {
    let state = tables::pod(pod)?;
    let shadow = Tables.head(state.view.set)?.shadow;
    if shadow == PolicySetId::NONE {
        return None;
    }
    Some((state, shadow))
}

/// Whether a policy would refuse it. A missing set refuses nothing in audit mode.
#[inline(always)]
fn refuses(path: &Path) -> bool {
    matches!(path.action, Outbound::Refuse) && path.verdict.reason.is_policy()
}
