// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! connect(): resolve the service, decide, and mark what the agent is to tunnel.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::path::{Origin, Outbound};
use mesh_common::pod::PodIndex;
use mesh_common::service::Route;
use mesh_common::settings::MARK_CAPTURE;
use mesh_common::socket::SocketState;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Reason, Verdict, route};

use crate::context::{
    self, Family, PASS, endpoint, exempt, netns_cookie, protocol, read, refuse, set_endpoint,
    set_mark, socket, storage,
};
use crate::decision::{self, Ask, UNDECIDED};
use crate::report::{self, DENIED, Refused, refused};
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
    let Some(to) = resolve(pod, &asked, protocol) else {
        return refuse();
    };
    let ask = Ask {
        pod,
        protocol,
        origin: Origin::Address,
        remote: to,
        local_port: Port(0),
    };
    let mut path = UNDECIDED;
    decision::outbound(&ask, &mut path);
    let mark = match path.action {
        Outbound::Refuse => {
            deny(pod, protocol, &asked, &to, &path.verdict);
            return refuse();
        }
        Outbound::Tunnel => MARK_CAPTURE,
        Outbound::Direct => 0,
    };
    if !set_mark(ctx, mark) {
        deny(
            pod,
            protocol,
            &asked,
            &to,
            &Verdict::refuse(Reason::CaptureFailed),
        );
        return refuse();
    }
    report::count(Direction::Egress, &path.verdict);
    let state = storage::<_, SocketState>(&SOCKETS, socket(ctx), true);
    if let Some(pod_state) = tables::pod(pod)
        && !state.is_null()
    {
        // SAFETY: not null, and of this type.
        let state = unsafe { &mut *state };
        state.rule = path.verdict.rule.0;
        state.set = pod_state.view.set.0;
        state.start_ns = report::now();
        state.backend = to;
        state.service = if to == asked { Endpoint::NONE } else { asked };
        state.direction = Direction::Egress as u8;
        state.clear = path.clear as u8;
        state.reason = path.verdict.reason as u8;
        state.flags = SocketState::DECIDED;
        if mark != 0 {
            state.flags |= SocketState::CAPTURED;
        }
        state.pod = pod.0;
    }
    if protocol == Protocol::UDP {
        // The source port is not chosen yet if it is 0; the gate then opens the flow.
        let local_port = local_port(ctx);
        if local_port != Port(0) {
            udp::open(pod, &udp::tuple(&to, local_port), Way::FromPod, &path);
        }
    }
    if to != asked {
        set_endpoint::<F>(ctx, &to);
    }
    PASS
}

/// The real destination; `None` = refused, and reported.
#[inline(always)]
pub(crate) fn resolve(pod: PodIndex, asked: &Endpoint, protocol: Protocol) -> Option<Endpoint> {
    // SAFETY: takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    let reason = match route(&Tables, *asked, protocol, random) {
        Route::Unchanged => return Some(*asked),
        Route::Backend(backend) => return Some(backend),
        Route::NoEndpoints => Reason::NoEndpoints,
        Route::NoPort => Reason::NoServicePort,
    };
    deny(pod, protocol, asked, asked, &Verdict::refuse(reason));
    None
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
    let own = match tables::pod(pod) {
        Some(state) if to.addr.is_v4() => state.view.v4,
        Some(state) => state.view.v6,
        None => Addr::NONE,
    };
    let who = Refused {
        pod,
        direction: Direction::Egress,
        protocol,
        local: Endpoint::new(own, Port(0)),
        remote: *to,
        service: if to == asked { Endpoint::NONE } else { *asked },
        kind: DENIED,
    };
    refused(&who, verdict);
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
