// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The connect() hook: resolves services, decides the connection, and marks the connections that the
//! agent tunnels.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::path::{Origin, Outbound, Path, outbound_listener};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::service::Route;
use mesh_common::settings::MARK_CAPTURE;
use mesh_common::socket::SocketState;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Reason, Verdict, route};

use crate::audit;
use crate::decision::{self, Ask, Decision};
use crate::report::{self, DENIED, Hook, Subject, refused, trace};
use crate::sock_addr::{
    Family, PASS, endpoint, exempt, local_port, netns_cookie, protocol, refuse, set_endpoint,
    set_mark, socket,
};
use crate::tables::{self, SOCKETS, Tables, storage};
use crate::udp_flows;

/// Handles the hooks connect4 and connect6.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol == Protocol::OTHER || exempt(ctx) {
        return PASS;
    }
    let Some(pod) = tables::pod_by_netns(netns_cookie(ctx)) else {
        report::count(Direction::Egress, &Verdict::pass(Reason::NotAdopted));
        return PASS;
    };
    let asked = endpoint::<F>(ctx);
    let mut ask = Ask {
        remote: asked,
        pod,
        local_port: local_port(ctx),
        protocol,
        origin: Origin::Address,
    };
    if !resolve(&mut ask) {
        return refuse();
    }
    let mut decision = Decision::UNDECIDED;
    decision::outbound(&ask, &mut decision);
    trace(Hook::Connect, &ask, &decision.path);
    let mark = match decision.path.action {
        Outbound::Refuse => {
            deny(&ask, &asked, &decision.path.verdict);
            if is_silent(pod, &decision.path) && set_mark(ctx, 0) {
                if ask.remote != asked {
                    set_endpoint::<F>(ctx, &ask.remote);
                }
                return PASS;
            }
            return refuse();
        }
        Outbound::Tunnel => MARK_CAPTURE,
        Outbound::Direct => 0,
    };
    let listener = pod.listener(outbound_listener(&ask.remote.addr));
    let failure = if mark != 0 && !tables::agent_listens(listener) {
        Some(Reason::ListenerGone)
    } else if !set_mark(ctx, mark) {
        Some(Reason::CaptureFailed)
    } else {
        None
    };
    if let Some(reason) = failure {
        deny(&ask, &asked, &Verdict::refuse(reason));
        return refuse();
    }
    report::count(Direction::Egress, &decision.path.verdict);
    // The gate opens the flow of a UDP socket that has no port yet, and asks about it.
    let unbound = protocol == Protocol::UDP && ask.local_port == Port(0);
    if let Some(audited) = audit::audited(pod)
        && !(unbound && audited.view.has(PodState::GATED))
    {
        audit::outbound(audited, &ask, service(&ask, &asked));
    }
    let flags = match mark {
        0 => SocketState::DECIDED,
        _ => SocketState::DECIDED | SocketState::CAPTURED,
    };
    remember(ctx, &ask, &asked, &decision.path, flags);
    if protocol == Protocol::UDP && !unbound {
        udp_flows::open(&ask, &decision, Direction::Egress);
    }
    if ask.remote != asked {
        set_endpoint::<F>(ctx, &ask.remote);
    }
    PASS
}

/// Returns the service that the application used, if it was translated.
#[inline(always)]
pub(crate) fn service<'a>(ask: &Ask, asked: &'a Endpoint) -> Option<&'a Endpoint> {
    if ask.remote == *asked {
        None
    } else {
        Some(asked)
    }
}

/// Stores the decision with the socket.
#[inline(always)]
fn remember(ctx: &SockAddrContext, ask: &Ask, asked: &Endpoint, path: &Path, flags: u8) {
    let state = storage::<_, SocketState>(&SOCKETS, socket(ctx), true);
    let Some(pod_state) = tables::pod(ask.pod) else {
        return;
    };
    // SAFETY: null or of this type.
    let Some(state) = (unsafe { state.as_mut() }) else {
        return;
    };
    state.rule = path.verdict.rule.0;
    state.set = pod_state.view.set.0;
    state.start_ns = report::now();
    state.backend = ask.remote;
    state.service = service(ask, asked).copied().unwrap_or(Endpoint::NONE);
    state.direction = Direction::Egress as u8;
    state.plaintext = path.clear as u8;
    state.reason = path.verdict.reason as u8;
    state.flags = flags;
    state.pod = ask.pod.0;
}

/// Returns whether a denial is silent: the policy of a pod with this setting denies, and the pod has a
/// gate. The system call then succeeds, and the gate decides the packets again and drops them.
#[inline(always)]
pub(crate) fn is_silent(pod: PodIndex, path: &Path) -> bool {
    path.verdict.reason.is_policy()
        && tables::pod(pod).is_some_and(|state| {
            state.view.has(PodState::SILENT) && state.view.has(PodState::GATED)
        })
}

/// Replaces a service by one of its backends in `ask.remote`. Returns `false` if the traffic is denied,
/// after reporting it.
#[inline(always)]
pub(crate) fn resolve(ask: &mut Ask) -> bool {
    let reason = match mesh_resolve(ask) {
        RESOLVED => return true,
        NO_PORT => Reason::NoServicePort,
        _ => Reason::NoEndpoints,
    };
    deny(ask, &ask.remote, &Verdict::refuse(reason));
    false
}

/// The return value for a destination that is no service or was replaced by a backend.
const RESOLVED: u64 = 0;
/// The return value for a virtual address without this port.
const NO_PORT: u64 = 1;
/// The return value for a service without endpoints.
const NO_ENDPOINTS: u64 = 2;

/// Calls `mesh_common::route` as a global function (see `decision`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_resolve(ask: *mut Ask) -> u64 {
    // SAFETY: null, or of this type: the verifier checks it at each call.
    let Some(ask) = (unsafe { ask.as_mut() }) else {
        return NO_ENDPOINTS;
    };
    // SAFETY: the helper has no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    match route(&Tables, ask.remote, ask.protocol, random) {
        Route::Unchanged => {}
        Route::Backend(backend) => ask.remote = backend,
        Route::NoEndpoints => return NO_ENDPOINTS,
        Route::NoPort => return NO_PORT,
    }
    RESOLVED
}

/// Reports the denial of traffic that a pod sends. `asked` is the destination that the application
/// used.
#[inline(always)]
pub(crate) fn deny(ask: &Ask, asked: &Endpoint, verdict: &Verdict) {
    let _ = mesh_deny(ask, asked, verdict);
}

/// Reports a denial. A global function, see `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_deny(ask: *const Ask, asked: *const Endpoint, verdict: *const Verdict) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(ask), Some(asked), Some(verdict)) =
        (unsafe { (ask.as_ref(), asked.as_ref(), verdict.as_ref()) })
    else {
        return 1;
    };
    let own = match tables::pod(ask.pod) {
        Some(state) if ask.remote.addr.is_v4() => state.view.v4,
        Some(state) => state.view.v6,
        None => Addr::NONE,
    };
    let subject = Subject::new(ask.pod, Direction::Egress, ask.protocol, DENIED);
    let local = Endpoint::new(own, ask.local_port);
    refused(
        &subject,
        Some(&local),
        Some(&ask.remote),
        service(ask, asked),
        verdict,
    );
    0
}
