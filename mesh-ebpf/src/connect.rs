// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! connect(): resolve the service, decide, and mark what the agent is to tunnel.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::path::{Origin, Outbound, Path};
use mesh_common::pod::{ListenerSlot, PodIndex, PodState};
use mesh_common::service::Route;
use mesh_common::settings::MARK_CAPTURE;
use mesh_common::socket::SocketState;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Reason, Verdict, route};

use crate::audit;
use crate::context::{
    self, Family, PASS, endpoint, exempt, netns_cookie, protocol, read, refuse, set_endpoint,
    set_mark, socket, storage,
};
use crate::decision::{self, Ask, UNDECIDED};
use crate::report::{self, DENIED, Hook, Refused, refused, trace};
use crate::tables::{self, SOCKETS, Tables};
use crate::udp::{self, Way};

/// The hooks connect4 and connect6.
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
    let mut to = asked;
    if !resolve(pod, &asked, protocol, &mut to) {
        return refuse();
    }
    let ask = Ask {
        pod,
        protocol,
        origin: Origin::Address,
        remote: to,
        local_port: Port(0),
    };
    let mut path = UNDECIDED;
    let facts = decision::outbound(&ask, &mut path);
    trace(Hook::Connect, pod, &to, &path);
    let mark = match path.action {
        Outbound::Refuse => {
            deny(pod, protocol, &asked, &to, &path.verdict);
            if silent(pod, &path) && set_mark(ctx, 0) {
                if to != asked {
                    set_endpoint::<F>(ctx, &to);
                }
                return PASS;
            }
            return refuse();
        }
        Outbound::Tunnel => MARK_CAPTURE,
        Outbound::Direct => 0,
    };
    let failure = if mark != 0 && !tables::agent_listens(pod.listener(outbound_slot(&to))) {
        Some(Reason::ListenerGone)
    } else if !set_mark(ctx, mark) {
        Some(Reason::CaptureFailed)
    } else {
        None
    };
    if let Some(reason) = failure {
        deny(pod, protocol, &asked, &to, &Verdict::refuse(reason));
        return refuse();
    }
    report::count(Direction::Egress, &path.verdict);
    if let Some(audited) = audit::audited(pod) {
        // A UDP socket whose port is not chosen yet opens its flow at the gate.
        let at_the_gate = protocol == Protocol::UDP
            && audited.view.has(PodState::GATED)
            && local_port(ctx) == Port(0);
        if !at_the_gate {
            audit::outbound(audited, &ask, if to == asked { None } else { Some(&asked) });
        }
    }
    let service = if to == asked { Endpoint::NONE } else { asked };
    let flags = match mark {
        0 => SocketState::DECIDED,
        _ => SocketState::DECIDED | SocketState::CAPTURED,
    };
    remember(ctx, (pod, flags), (&to, &service), &path);
    if protocol == Protocol::UDP {
        // The source port is not chosen yet if it is 0; the gate then opens the flow.
        let local_port = local_port(ctx);
        if local_port != Port(0) {
            udp::open(&ask, local_port, Way::FromPod, (&path, facts));
        }
    }
    if to != asked {
        set_endpoint::<F>(ctx, &to);
    }
    PASS
}

/// Keeps with the socket what was decided.
#[inline(always)]
fn remember(
    ctx: &SockAddrContext,
    (pod, flags): (PodIndex, u8),
    (backend, service): (&Endpoint, &Endpoint),
    path: &Path,
) {
    let state = storage::<_, SocketState>(&SOCKETS, socket(ctx), true);
    let Some(pod_state) = tables::pod(pod) else {
        return;
    };
    // SAFETY: null or of this type.
    let Some(state) = (unsafe { state.as_mut() }) else {
        return;
    };
    state.rule = path.verdict.rule.0;
    state.set = pod_state.view.set.0;
    state.start_ns = report::now();
    state.backend = *backend;
    state.service = *service;
    state.direction = Direction::Egress as u8;
    state.clear = path.clear as u8;
    state.reason = path.verdict.reason as u8;
    state.flags = flags;
    state.pod = pod.0;
}

/// Whether a refusal is to be silence: policy's, where the gate sees the packets. They go on to where
/// they were decided for, and the gate decides again.
#[inline(always)]
pub(crate) fn silent(pod: PodIndex, path: &Path) -> bool {
    path.verdict.reason.is_policy()
        && tables::pod(pod).is_some_and(|state| {
            state.view.has(PodState::SILENT) && state.view.has(PodState::GATED)
        })
}

/// The listener of captured connections: by the family on the wire, not the socket's.
#[inline(always)]
fn outbound_slot(to: &Endpoint) -> ListenerSlot {
    if to.addr.is_v4() {
        ListenerSlot::Outbound4
    } else {
        ListenerSlot::Outbound6
    }
}

/// Finds the real destination; `false` = refused, and reported.
#[inline(always)]
pub(crate) fn resolve(
    pod: PodIndex,
    asked: &Endpoint,
    protocol: Protocol,
    to: &mut Endpoint,
) -> bool {
    let reason = match mesh_resolve(asked, protocol.0.into(), to) {
        RESOLVED => return true,
        NO_PORT => Reason::NoServicePort,
        _ => Reason::NoEndpoints,
    };
    deny(pod, protocol, asked, asked, &Verdict::refuse(reason));
    false
}

const RESOLVED: u64 = 0;
const NO_PORT: u64 = 1;
const NO_ENDPOINTS: u64 = 2;

/// `mesh_common::route` as a global function (see `decision`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_resolve(asked: *const Endpoint, protocol: u32, to: *mut Endpoint) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(asked), Some(to)) = (unsafe { (asked.as_ref(), to.as_mut()) }) else {
        return NO_ENDPOINTS;
    };
    // SAFETY: takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    match route(&Tables, *asked, Protocol(protocol as u8), random) {
        Route::Unchanged => *to = *asked,
        Route::Backend(backend) => *to = backend,
        Route::NoEndpoints => return NO_ENDPOINTS,
        Route::NoPort => return NO_PORT,
    }
    RESOLVED
}

/// Reports a refusal of what a pod sends.
#[inline(always)]
pub(crate) fn deny(
    pod: PodIndex,
    protocol: Protocol,
    asked: &Endpoint,
    to: &Endpoint,
    verdict: &Verdict,
) {
    let packed = u64::from(protocol.0) << 32 | u64::from(pod.0);
    let _ = mesh_deny(packed, asked, to, verdict);
}

/// [`deny`] as a global function (see `decision`): the protocol above, the pod below.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_deny(
    packed: u64,
    asked: *const Endpoint,
    to: *const Endpoint,
    verdict: *const Verdict,
) -> u64 {
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(asked), Some(to), Some(verdict)) =
        (unsafe { (asked.as_ref(), to.as_ref(), verdict.as_ref()) })
    else {
        return 1;
    };
    let pod = PodIndex(packed as u32);
    let own = match tables::pod(pod) {
        Some(state) if to.addr.is_v4() => state.view.v4,
        Some(state) => state.view.v6,
        None => Addr::NONE,
    };
    let who = Refused::new(
        pod,
        Direction::Egress,
        Protocol((packed >> 32) as u8),
        DENIED,
    );
    let local = Endpoint::new(own, Port(0));
    let service = if to == asked { None } else { Some(asked) };
    refused(who, Some(&local), Some(to), service, verdict);
    0
}

/// The socket's own port; 0 = not chosen yet.
#[inline(always)]
pub(crate) fn local_port(ctx: &SockAddrContext) -> Port {
    let sk = context::socket(ctx);
    if sk.is_null() {
        return Port(0);
    }
    // Host order, 4 bytes wide.
    Port::new(read!(sk, src_port) as u16)
}
