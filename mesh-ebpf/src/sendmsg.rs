// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The sendmsg() and recvmsg() hooks of UDP sockets: service translation, policy, and flows for the
//! replies.

use aya_ebpf::programs::SockAddrContext;
use mesh_common::path::Origin;
use mesh_common::pod::PodState;
use mesh_common::socket::{SocketState, Translation, Translations, VIPS_PER_SOCKET};
use mesh_common::{Direction, Endpoint, Port, Protocol};

use crate::audit;
use crate::connect::{deny, is_silent, resolve, service};
use crate::decision::{self, Ask, Decision};
use crate::report::{self, Hook, trace};
use crate::sock_addr::{
    Family, PASS, endpoint, exempt, local_port, netns_cookie, protocol, refuse, set_endpoint,
    socket,
};
use crate::tables::{self, SOCKETS, VIPS, storage};
use crate::udp_flows::{self, Seen};

/// Handles the hooks sendmsg4 and sendmsg6.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != Protocol::UDP || exempt(ctx) {
        return PASS;
    }
    let Some(pod) = tables::pod_by_netns(netns_cookie(ctx)) else {
        return PASS;
    };
    let asked = endpoint::<F>(ctx);
    let mut ask = Ask {
        remote: asked,
        pod,
        local_port: local_port(ctx),
        protocol: Protocol::UDP,
        origin: Origin::Address,
    };
    if !resolve(&mut ask) {
        return refuse();
    }
    let bound = ask.local_port != Port(0);
    let mut decision = Decision::UNDECIDED;
    // The gate sees the datagram as well and counts its bytes.
    if !bound || !udp_flows::refresh(&mut ask, &mut decision, Seen::FromPod, 0) {
        decision::outbound(&ask, &mut decision);
        trace(Hook::Sendmsg, &ask, &decision.path);
        if decision.refuses() {
            deny(&ask, &asked, &decision.path.verdict);
            if is_silent(pod, &decision.path) {
                if ask.remote != asked {
                    set_endpoint::<F>(ctx, &ask.remote);
                }
                return PASS;
            }
            return refuse();
        }
        report::count(Direction::Egress, &decision.path.verdict);
        if let Some(audited) = audit::audited(pod)
            && (bound || !audited.view.has(PodState::GATED))
        {
            audit::outbound(audited, &ask, service(&ask, &asked));
        }
        if bound {
            udp_flows::open(&ask, &decision, Direction::Egress);
        }
    }
    if ask.remote != asked {
        remember(ctx, &ask.remote, &asked);
        set_endpoint::<F>(ctx, &ask.remote);
    }
    PASS
}

/// Stores a translation with the socket, so that replies are shown as the service's.
#[inline(always)]
fn remember(ctx: &SockAddrContext, backend: &Endpoint, service: &Endpoint) {
    let known = storage::<_, Translations>(&VIPS, socket(ctx), true);
    if known.is_null() {
        return;
    }
    // SAFETY: not null, and of this type.
    let known = unsafe { &mut *known };
    for translation in &mut known.recent {
        if translation.backend == *backend {
            translation.service = *service;
            return;
        }
    }
    let next = known.next as usize & (VIPS_PER_SOCKET - 1);
    known.recent[next] = Translation {
        backend: *backend,
        service: *service,
    };
    known.next = known.next.wrapping_add(1);
}

/// Handles the hooks recvmsg4 and recvmsg6: the application sees the service as the sender of a reply.
#[inline(always)]
pub(crate) fn recvmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != Protocol::UDP {
        return PASS;
    }
    let from = endpoint::<F>(ctx);
    let known = storage::<_, Translations>(&VIPS, socket(ctx), false);
    if !known.is_null() {
        // SAFETY: not null, and of this type.
        let known = unsafe { &*known };
        for translation in &known.recent {
            if translation.backend == from {
                set_endpoint::<F>(ctx, &translation.service);
                return PASS;
            }
        }
    }
    show_service::<F>(ctx, &from);
    PASS
}

/// Replaces the backend of a connected socket by its service in the result of the system call.
#[inline(always)]
pub(crate) fn show_service<F: Family>(ctx: &SockAddrContext, from: &Endpoint) {
    let state = storage::<_, SocketState>(&SOCKETS, socket(ctx), false);
    if state.is_null() {
        return;
    }
    // SAFETY: not null, and of this type.
    let state = unsafe { &*state };
    if state.service != Endpoint::NONE && state.backend == *from {
        set_endpoint::<F>(ctx, &state.service);
    }
}
