// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! sendmsg() and recvmsg() of unconnected UDP sockets: services, policy, and flows for replies.

use aya_ebpf::programs::SockAddrContext;
use mesh_common::path::{Origin, Outbound};
use mesh_common::pod::PodState;
use mesh_common::socket::{SocketState, Translation, Translations, VIPS_PER_SOCKET};
use mesh_common::{Direction, Endpoint, Port, Protocol};

use crate::audit;
use crate::connect::{deny, local_port, resolve, silent};
use crate::context::{
    Family, PASS, endpoint, exempt, netns_cookie, protocol, refuse, set_endpoint, socket, storage,
};
use crate::decision::{self, Ask, UNDECIDED};
use crate::report::{self, Hook, trace};
use crate::tables::{self, SOCKETS, VIPS};
use crate::udp::{self, Way};

/// The hooks sendmsg4 and sendmsg6.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != Protocol::UDP || exempt(ctx) {
        return PASS;
    }
    let Some(pod) = tables::pod_by_netns(netns_cookie(ctx)) else {
        return PASS;
    };
    let asked = endpoint::<F>(ctx);
    let mut to = asked;
    if !resolve(pod, &asked, Protocol::UDP, &mut to) {
        return refuse();
    }
    let local = local_port(ctx);
    // The gate sees the datagram too and counts its bytes.
    let mut path = UNDECIDED;
    let mut ask = Ask {
        pod,
        protocol: Protocol::UDP,
        origin: Origin::Address,
        remote: to,
        local_port: Port(0),
    };
    let room = (&mut ask, &mut path);
    if local == Port(0) || !udp::refresh(local, Way::FromPod, 0, room) {
        let facts = decision::outbound(&ask, &mut path);
        trace(Hook::Sendmsg, pod, &to, &path);
        if matches!(path.action, Outbound::Refuse) {
            deny(pod, Protocol::UDP, &asked, &to, &path.verdict);
            if silent(pod, &path) {
                if to != asked {
                    set_endpoint::<F>(ctx, &to);
                }
                return PASS;
            }
            return refuse();
        }
        report::count(Direction::Egress, &path.verdict);
        if let Some(audited) = audit::audited(pod)
            && (local != Port(0) || !audited.view.has(PodState::GATED))
        {
            audit::outbound(audited, &ask, if to == asked { None } else { Some(&asked) });
        }
        if local != Port(0) {
            udp::open(&ask, local, Way::FromPod, (&path, facts));
        }
    }
    if to != asked {
        remember(ctx, &to, &asked);
        set_endpoint::<F>(ctx, &to);
    }
    PASS
}

/// Keeps a translation with the socket, so that replies can be shown as the service's.
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

/// The hooks recvmsg4 and recvmsg6: the sender of a reply is the service that was asked.
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
    connected::<F>(ctx, &from);
    PASS
}

/// Shows the service of a connected socket in place of its backend.
#[inline(always)]
pub(crate) fn connected<F: Family>(ctx: &SockAddrContext, from: &Endpoint) {
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
