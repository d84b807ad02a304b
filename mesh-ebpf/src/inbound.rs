// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! sk_lookup in a pod's namespace: captured connections and tunnels to the agent, the agent's
//! hand-over and what policy allows to the application, everything else refused.
//!
//! Runs for every new TCP connection and for every datagram to an unconnected UDP socket. Attached
//! to adopted pods only. Where the agent is to take a connection and is not there, it is dropped:
//! the sender gets a reset, never a plaintext connection.

use aya_ebpf::programs::SkLookupContext;
use mesh_common::path::{Origin, Outbound};
use mesh_common::pod::{ListenerSlot, PodIndex, PodState};
use mesh_common::settings::TUNNEL_PORT;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Reason, Verdict};

use crate::audit;
use crate::context::read;
use crate::decision::{self, Ask, UNDECIDED};
use crate::report::{self, DENIED, Hook, Refused, refused, trace};
use crate::tables::{self, LISTENERS};
use crate::udp::{self, Way};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const AF_INET: u32 = 2;
/// The loopback interface has this index in every namespace.
const LOOPBACK: u32 = 1;

/// The hook.
#[inline(always)]
pub(crate) fn inbound(ctx: &SkLookupContext) -> u32 {
    let c = ctx.lookup;
    let v4 = read!(c, family) == AF_INET;
    // Both families are read before one is chosen: reads behind a branch would become one read
    // through a computed pointer, which the verifier refuses for contexts.
    let (local4, remote4) = (read!(c, local_ip4), read!(c, remote_ip4));
    let local6 = [
        read!(c, local_ip6[0]),
        read!(c, local_ip6[1]),
        read!(c, local_ip6[2]),
        read!(c, local_ip6[3]),
    ];
    let remote6 = [
        read!(c, remote_ip6[0]),
        read!(c, remote_ip6[1]),
        read!(c, remote_ip6[2]),
        read!(c, remote_ip6[3]),
    ];
    let (local, remote) = if v4 {
        (Addr::from_v4_word(local4), Addr::from_v4_word(remote4))
    } else {
        (Addr::from_words(local6), Addr::from_words(remote6))
    };
    let protocol = Protocol(read!(c, protocol) as u8);
    if local.is_loopback() {
        return SK_PASS;
    }
    let here = Endpoint::new(local, Port::new(read!(c, local_port) as u16));
    let there = Endpoint::new(remote, Port(read!(c, remote_port)));
    match tables::pod_by_addr(&local) {
        Some(pod) => arriving(ctx, pod, &here, &there, protocol),
        None => captured(ctx, &remote, v4, protocol),
    }
}

/// The destination is none of the pod's addresses: only the capture mark's route leads here.
#[inline(always)]
fn captured(ctx: &SkLookupContext, remote: &Addr, v4: bool, protocol: Protocol) -> u32 {
    let Some(pod) = tables::pod_by_addr(remote) else {
        return SK_PASS;
    };
    let enrolled = tables::pod(pod).is_some_and(|state| state.view.has(PodState::ENROLLED));
    if protocol != Protocol::TCP {
        return SK_PASS;
    }
    let slot = if v4 {
        ListenerSlot::Outbound4
    } else {
        ListenerSlot::Outbound6
    };
    if enrolled {
        return steer(ctx, pod, slot, Direction::Egress);
    }
    // Captured right before the pod left the mesh: its listener stays a while.
    let _ = LISTENERS.redirect_sk_lookup(ctx, pod.listener(slot), 0);
    SK_PASS
}

/// Gives the connection to the agent.
#[inline(always)]
fn steer(ctx: &SkLookupContext, pod: PodIndex, slot: ListenerSlot, direction: Direction) -> u32 {
    match LISTENERS.redirect_sk_lookup(ctx, pod.listener(slot), 0) {
        Ok(()) => SK_PASS,
        Err(_) => {
            report::count(direction, &Verdict::refuse(Reason::ListenerGone));
            SK_DROP
        }
    }
}

/// Whether a tunnel to a pod that has just left the mesh was given to its listener, which stays a
/// while: others learn of it later.
#[inline(always)]
fn left(ctx: &SkLookupContext, pod: PodIndex, here: &Endpoint) -> bool {
    let slot = if here.addr.is_v4() {
        ListenerSlot::Tunnel4
    } else {
        ListenerSlot::Tunnel6
    };
    LISTENERS
        .redirect_sk_lookup(ctx, pod.listener(slot), 0)
        .is_ok()
}

/// The destination is the pod's own address.
#[inline(always)]
fn arriving(
    ctx: &SkLookupContext,
    pod: PodIndex,
    here: &Endpoint,
    there: &Endpoint,
    protocol: Protocol,
) -> u32 {
    // Nothing from outside, and nothing that the pod sends to its own address, comes in by lo but
    // the agent's hand-over: its sockets are bound to it.
    if here.addr == there.addr || read!(ctx.lookup, ingress_ifindex) == LOOPBACK {
        return SK_PASS;
    }
    let Some(state) = tables::pod(pod) else {
        return SK_DROP;
    };
    let tcp = protocol == Protocol::TCP;
    let enrolled = state.view.has(PodState::ENROLLED);
    if tcp && enrolled && (here.port == TUNNEL_PORT || tables::steer_marked(here, there)) {
        let slot = if here.addr.is_v4() {
            ListenerSlot::Tunnel4
        } else {
            ListenerSlot::Tunnel6
        };
        return steer(ctx, pod, slot, Direction::Ingress);
    }
    if tcp && here.port == TUNNEL_PORT && left(ctx, pod, here) {
        return SK_PASS;
    }
    // Where there is a gate it has counted the datagram already.
    let way = if state.view.has(PodState::GATED) {
        Way::LookUp
    } else {
        Way::ToPod
    };
    let origin = if state.view.has(PodState::GATED) {
        Origin::Address
    } else {
        Origin::Ungated
    };
    let mut ask = Ask {
        pod,
        protocol,
        origin,
        remote: *there,
        local_port: here.port,
    };
    let mut path = UNDECIDED;
    if !tcp && udp::refresh(here.port, way, 0, (&mut ask, &mut path)) {
        return SK_PASS;
    }
    let facts = decision::inbound(&ask, &mut path);
    trace(Hook::Inbound, pod, there, &path);
    if matches!(path.action, Outbound::Refuse) {
        let who = Refused::new(pod, Direction::Ingress, protocol, DENIED);
        refused(who, Some(here), Some(there), None, &path.verdict);
        return SK_DROP;
    }
    report::count(Direction::Ingress, &path.verdict);
    if audit::audited(pod).is_some() {
        audit::inbound(&ask, here);
    }
    if !tcp {
        udp::open(&ask, here.port, Way::ToPod, (&path, facts));
    }
    SK_PASS
}
