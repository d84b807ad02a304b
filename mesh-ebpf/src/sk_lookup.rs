// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The sk_lookup hook in a pod's network namespace. It gives captured connections and tunnels to the
//! agent, passes the agent's own connections and allowed traffic to the application, and denies
//! everything else.
//!
//! It is attached to managed pods and runs for each new TCP connection and for each datagram to an
//! unconnected UDP socket. A connection for an agent that does not listen is dropped: the sender gets a
//! reset, never a plaintext connection.

use aya_ebpf::programs::SkLookupContext;
use mesh_common::path::{Origin, outbound_listener, tunnel_listener};
use mesh_common::pod::{ListenerSlot, PodIndex, PodState};
use mesh_common::settings::TUNNEL_PORT;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Reason, Verdict};

use crate::audit;
use crate::decision::{self, Ask, Decision};
use crate::report::{self, DENIED, Hook, Subject, refused, trace};
use crate::tables::{self, LISTENERS};
use crate::udp_flows::{self, Seen};
use crate::volatile::read;

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const AF_INET: u32 = 2;
/// The index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

/// Handles the hook.
#[inline(always)]
pub(crate) fn sk_lookup(ctx: &SkLookupContext) -> u32 {
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
        None => captured(ctx, &remote, protocol),
    }
}

/// Handles a destination that is not the pod's own address: only the route of the capture mark leads
/// here. `remote` is the pod's address.
#[inline(always)]
fn captured(ctx: &SkLookupContext, remote: &Addr, protocol: Protocol) -> u32 {
    let Some(pod) = tables::pod_by_addr(remote) else {
        return SK_PASS;
    };
    let enrolled = tables::pod(pod).is_some_and(|state| state.view.has(PodState::ENROLLED));
    if protocol != Protocol::TCP {
        return SK_PASS;
    }
    let slot = outbound_listener(remote);
    if enrolled {
        return steer(ctx, pod, slot, Direction::Egress);
    }
    // Captured right before the pod left the mesh. Its listener stays for a while.
    let _ = LISTENERS.redirect_sk_lookup(ctx, pod.listener(slot), 0);
    SK_PASS
}

/// Gives a connection to the agent, or denies it if the agent does not listen.
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

/// Gives a tunnel to the listener of a pod that just left the mesh. The listener stays for a while,
/// because other nodes learn later that the pod left. Returns whether there is one.
#[inline(always)]
fn steer_after_leaving(ctx: &SkLookupContext, pod: PodIndex, here: &Endpoint) -> bool {
    let slot = tunnel_listener(&here.addr);
    LISTENERS
        .redirect_sk_lookup(ctx, pod.listener(slot), 0)
        .is_ok()
}

/// Handles a destination that is the pod's own address.
#[inline(always)]
fn arriving(
    ctx: &SkLookupContext,
    pod: PodIndex,
    here: &Endpoint,
    there: &Endpoint,
    protocol: Protocol,
) -> u32 {
    // Two kinds of traffic arrive on the loopback interface: the pod's own, and connections of the
    // agent to the application, whose sockets are bound to it.
    if here.addr == there.addr || read!(ctx.lookup, ingress_ifindex) == LOOPBACK {
        return SK_PASS;
    }
    let Some(state) = tables::pod(pod) else {
        return SK_DROP;
    };
    let tcp = protocol == Protocol::TCP;
    let enrolled = state.view.has(PodState::ENROLLED);
    if tcp && enrolled && (here.port == TUNNEL_PORT || tables::steer_marked(here, there)) {
        return steer(ctx, pod, tunnel_listener(&here.addr), Direction::Ingress);
    }
    if tcp && here.port == TUNNEL_PORT && steer_after_leaving(ctx, pod, here) {
        return SK_PASS;
    }
    // The kernel also looks up the socket of the datagram that an ICMP error quotes. Anybody can forge
    // such an error, so a lookup opens no flow and proves no datagram. The gate has decided real ones.
    if !tcp && state.view.has(PodState::GATED) {
        return SK_PASS;
    }
    let mut ask = Ask {
        remote: *there,
        pod,
        local_port: here.port,
        protocol,
        origin: Origin::of(&state.view),
    };
    let mut decision = Decision::UNDECIDED;
    if !tcp && udp_flows::refresh(&mut ask, &mut decision, Seen::LookUp, 0) {
        return SK_PASS;
    }
    decision::inbound(&ask, &mut decision);
    trace(Hook::Inbound, &ask, &decision.path);
    let verdict = &decision.path.verdict;
    if decision.refuses() {
        let subject = Subject::new(pod, Direction::Ingress, protocol, DENIED);
        refused(&subject, Some(here), Some(there), None, verdict);
        return SK_DROP;
    }
    report::count(Direction::Ingress, verdict);
    if audit::audited(pod).is_some() {
        audit::inbound(&ask, here);
    }
    SK_PASS
}
