// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Audit mode: allowed traffic is evaluated once more by the policies in audit mode, and reported if
//! they would deny it.
//!
//! Each connection or flow is evaluated once, where it is decided first: connections at the socket
//! hooks, datagrams where their flow is opened. A pod without policies in audit mode costs one flag.

use mesh_common::path::{self, Outbound, Path};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::policy::{Policies as _, PolicySetId};
use mesh_common::{Direction, Endpoint};

use crate::decision::{ANSWERED, Ask, UNANSWERED};
use crate::report::{AUDIT, Subject, refused};
use crate::tables::{self, Tables};

/// Returns the state of a pod if policies in audit mode select it.
#[inline(always)]
pub(crate) fn audited(pod: PodIndex) -> Option<&'static PodState> {
    tables::pod(pod).filter(|state| state.view.has(PodState::AUDITED))
}

/// Evaluates allowed traffic that a pod sends.
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

/// Evaluates allowed plaintext traffic to a pod's endpoint `local`.
#[inline(always)]
pub(crate) fn inbound(ask: &Ask, local: &Endpoint) {
    let _ = mesh_audit_inbound(ask, local);
}

/// Evaluates outgoing traffic. A global function, see `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_audit_outbound(
    ask: *const Ask,
    local: *const Endpoint,
    service: *const Endpoint,
) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(ask), Some(local)) = (unsafe { (ask.as_ref(), local.as_ref()) }) else {
        return UNANSWERED;
    };
    let Some((state, shadow)) = shadow(ask.pod) else {
        return UNANSWERED;
    };
    let path = path::outbound(&Tables, &state.view, shadow, ask.remote, ask.protocol);
    if refuses(&path) {
        let subject = Subject::new(ask.pod, Direction::Egress, ask.protocol, AUDIT);
        // SAFETY: null, or of this type.
        let service = unsafe { service.as_ref() };
        refused(
            &subject,
            Some(local),
            Some(&ask.remote),
            service,
            &path.verdict,
        );
    }
    ANSWERED
}

/// Evaluates incoming traffic. A global function, see `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_audit_inbound(ask: *const Ask, local: *const Endpoint) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(ask), Some(local)) = (unsafe { (ask.as_ref(), local.as_ref()) }) else {
        return UNANSWERED;
    };
    let Some((state, shadow)) = shadow(ask.pod) else {
        return UNANSWERED;
    };
    let path = path::inbound(&Tables, &state.view, shadow, ask.arrival());
    if refuses(&path) {
        let subject = Subject::new(ask.pod, Direction::Ingress, ask.protocol, AUDIT);
        refused(
            &subject,
            Some(local),
            Some(&ask.remote),
            None,
            &path.verdict,
        );
    }
    ANSWERED
}

/// Returns a pod's state and its policy set with audit policies enforced.
#[inline(always)]
fn shadow(pod: PodIndex) -> Option<(&'static PodState, PolicySetId)> {
    let state = tables::pod(pod)?;
    let shadow = Tables.head(state.view.set)?.shadow;
    if shadow == PolicySetId::NONE {
        return None;
    }
    Some((state, shadow))
}

/// Returns whether policy would deny the traffic. A missing shadow set denies nothing.
#[inline(always)]
fn refuses(path: &Path) -> bool {
    matches!(path.action, Outbound::Refuse) && path.verdict.reason.is_policy()
}
