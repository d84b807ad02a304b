// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The gate: tcx on the host's side of every local pod, both ways, before the CNI's own programs.
//!
//! It holds what sockets' hooks do not see: addresses that are not the sender's, raw and packet
//! sockets, namespaces nested in a pod, what was translated on its way. It never opens a connection
//! to something that [`mesh_common::path`] refuses, and remembers nothing but UDP flows and
//! fragments.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::programs::TcContext;
use mesh_common::counter::Counter;
use mesh_common::maps::{ConnectionKey, FragmentKey, FragmentVerdict, MARK_SEEN, OLD_ENDED};
use mesh_common::path::{Origin, Outbound, Peers as _, tunnels, who};
use mesh_common::pod::{GatePod, PodIndex, PodState};
use mesh_common::policy::PolicySetId;
use mesh_common::settings::{FRAGMENT_NS, TUNNEL_PORT};
use mesh_common::{Addr, Direction, Endpoint, Peer, Port, Protocol, Reason, Verdict};

use crate::audit;
use crate::context::read;
use crate::decision::{self, Ask, UNDECIDED};
use crate::packet::{self, ACK, Fragment, Kind, Packet, RST, SYN};
use crate::report::{self, DROPPED, Hook, Refused, count, now, refused, trace};
use crate::tables::{self, FRAGMENTS, MARKED, OLD_CONNECTIONS, Tables};
use crate::udp::{self, Way};

const NEXT: i32 = -1;
const DROP: i32 = 2;

const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ROUTER_ADVERTISEMENT: u8 = 134;
const REDIRECT: u8 = 137;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;

/// A frame from a pod.
#[inline(always)]
pub(crate) fn from_pod(ctx: &TcContext) -> i32 {
    let Some(gate) = tables::gate(read!(ctx.skb.skb, ifindex)) else {
        return DROP;
    };
    if continues_from_pod(ctx, gate) {
        return NEXT;
    }
    let pod = gate.index;
    let Some(state) = tables::pod(pod) else {
        return DROP;
    };
    let Some(ethernet) = packet::ethernet(ctx) else {
        return DROP;
    };
    let mac = &state.mac;
    if known(mac) && !same(&ethernet.from, mac) {
        return drop_frame(pod, Direction::Egress, Reason::Spoofed);
    }
    let mut packet = Packet::EMPTY;
    packet::parse(ctx, &ethernet, &mut packet);
    let ip = &packet;
    match ip.kind {
        Kind::Ip => {}
        Kind::Arp => return arp_from_pod(pod, state, ip),
        Kind::Other => return drop_frame(pod, Direction::Egress, Reason::UnsupportedProtocol),
        Kind::Malformed => return drop_frame(pod, Direction::Egress, Reason::Malformed),
    }
    if ip.protocol == Protocol::ICMPV6 {
        return icmpv6_from_pod(ctx, pod, state, ip);
    }
    if !state.view.owns(&ip.from.addr) {
        // A multicast listener report or a DHCP request may come before the address; both are
        // link-local affairs of no other protocol than these.
        return refuse(pod, Direction::Egress, ip, Reason::Spoofed);
    }
    if ip.protocol == Protocol::ICMP {
        return icmp(Direction::Egress, ip.icmp_type == ECHO_REQUEST);
    }
    if !concerned(state) {
        return NEXT;
    }
    send(pod, state, ip)
}

/// A frame to a pod.
#[inline(always)]
pub(crate) fn to_pod(ctx: &TcContext) -> i32 {
    // The interface is in the map before the program is attached, and until it is detached: one
    // without a pod is in between, and closed.
    let Some(gate) = tables::gate(read!(ctx.skb.skb, ifindex)) else {
        return DROP;
    };
    if continues_to_pod(ctx, gate) {
        return NEXT;
    }
    let pod = gate.index;
    let Some(state) = tables::pod(pod) else {
        return DROP;
    };
    let Some(ethernet) = packet::ethernet(ctx) else {
        return DROP;
    };
    let mut packet = Packet::EMPTY;
    packet::parse(ctx, &ethernet, &mut packet);
    let ip = &packet;
    match ip.kind {
        Kind::Ip => {}
        Kind::Other if state.view.has(PodState::ENROLLED) => {
            return drop_frame(pod, Direction::Ingress, Reason::UnsupportedProtocol);
        }
        Kind::Arp | Kind::Other => return NEXT,
        Kind::Malformed => return drop_frame(pod, Direction::Ingress, Reason::Malformed),
    }
    let entered = read!(ctx.skb.skb, ingress_ifindex);
    if state.view.owns(&ip.from.addr) || foreign(&ip.from.addr, entered) {
        return refuse(pod, Direction::Ingress, ip, Reason::Spoofed);
    }
    match ip.protocol {
        Protocol::ICMPV6 => return icmp(Direction::Ingress, ip.icmp_type == ECHO_REQUEST_V6),
        Protocol::ICMP => return icmp(Direction::Ingress, ip.icmp_type == ECHO_REQUEST),
        _ => {}
    }
    if !concerned(state) {
        return NEXT;
    }
    if ip.flags & (SYN | ACK) == SYN && is_tunnel_to(ctx, state, ip) {
        return NEXT;
    }
    receive(pod, state, ip, entered)
}

/// Whether a segment of a pod passes because everything that the whole check would ask of it is
/// known to hold: its source is true, it opens nothing, and it is no plaintext towards a pod that
/// is tunnelled to. Most packets end here; whatever does not is checked as a whole.
#[inline(never)]
fn continues_from_pod(ctx: &TcContext, gate: &GatePod) -> bool {
    let Some(segment) = packet::segment(ctx) else {
        return false;
    };
    let own_mac = u64::from_ne_bytes(gate.mac);
    if (own_mac != 0 && own_mac != segment.mac) || !gate.owns(&segment.from.addr) {
        return false;
    }
    let enrolled = gate.has(PodState::ENROLLED);
    let opens = segment.flags & (SYN | ACK) == SYN;
    let continues = !opens
        && (!enrolled
            || segment.to.port == TUNNEL_PORT
            || segment.from.port == TUNNEL_PORT
            || tables::local(&segment.to.addr).is_some());
    if continues || !enrolled {
        return continues;
    }
    // The agent's own: sock_ops has written it before the first segment was made, or, of a tunnel
    // to this pod, when it was established; until then its mark is remembered.
    tables::is_tunnel(&segment.from, &segment.to)
        || (!opens && tables::is_steered(&segment.from, &segment.to))
}

/// As [`continues_from_pod`], towards a pod: the destination is its own, and the source can be.
#[inline(never)]
fn continues_to_pod(ctx: &TcContext, gate: &GatePod) -> bool {
    let Some(segment) = packet::segment(ctx) else {
        return false;
    };
    let entered = read!(ctx.skb.skb, ingress_ifindex);
    segment.flags & (SYN | ACK) != SYN
        && gate.owns(&segment.to.addr)
        && !gate.owns(&segment.from.addr)
        && !foreign(&segment.from.addr, entered)
}

/// Whether a segment opens a tunnel to a port of an application; sk_lookup, which sees the same
/// segment next, then gives it to the agent. Who forges the mark meets the agent, and proves
/// nothing.
#[inline(always)]
fn is_tunnel_to(ctx: &TcContext, state: &PodState, ip: &Packet) -> bool {
    let tunnel = ip.protocol == Protocol::TCP
        && matches!(ip.fragment, Fragment::Whole)
        && state.view.has(PodState::ENROLLED)
        && state.view.owns(&ip.to.addr)
        && packet::is_marked(ctx, ip);
    if tunnel {
        remember_mark(ip);
    }
    tunnel
}

#[inline(never)]
fn remember_mark(ip: &Packet) {
    let key = ConnectionKey {
        local: ip.to,
        remote: ip.from,
    };
    // A SYN that is sent again must not undo what became of the first.
    let _ = MARKED.insert(key, MARK_SEEN, BPF_NOEXIST.into());
}

/// Whether more than addresses is to be checked: the pod is enrolled, or policy selects it.
#[inline(always)]
fn concerned(state: &PodState) -> bool {
    state.view.has(PodState::ENROLLED) || state.view.set != PolicySetId::NONE
}

/// Whether the pod's MAC address is known.
#[inline(always)]
fn known(mac: &[u8; 8]) -> bool {
    u64::from_ne_bytes(*mac) != 0
}

#[inline(always)]
fn same(claimed: &[u8; 6], own: &[u8; 8]) -> bool {
    let [a, b, c, d, e, f] = *claimed;
    u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]) == u64::from_ne_bytes(*own)
}

#[inline(always)]
fn is_host(addr: &Addr) -> bool {
    Tables.peer(addr).is_some_and(|peer| peer.id.is_host())
}

/// Whether an address is another local pod's on a packet that did not enter by that pod's
/// interface.
#[inline(always)]
fn foreign(from: &Addr, entered: u32) -> bool {
    tables::local(from).is_some_and(|sender| sender.link != 0 && sender.link != entered)
}

/// ARP passes with the pod's own sender address.
#[inline(always)]
fn arp_from_pod(pod: PodIndex, state: &PodState, arp: &Packet) -> i32 {
    // 0.0.0.0 is a probe for a duplicate address (RFC 5227).
    let true_address = arp.from.addr == state.view.v4 || arp.from.addr.is_unspecified();
    let true_mac = !known(&state.mac) || same(&arp.mac, &state.mac);
    if !true_address || !true_mac {
        return drop_frame(pod, Direction::Egress, Reason::Spoofed);
    }
    NEXT
}

/// Neighbour discovery and other ICMPv6 pass with a true source; a pod is no router.
#[inline(never)]
fn icmpv6_from_pod(ctx: &TcContext, pod: PodIndex, state: &PodState, ip: &Packet) -> i32 {
    let from = &ip.from.addr;
    let link_local = from.is_v6_link_local() || from.is_none();
    if !link_local && !state.view.owns(from) {
        return drop_frame(pod, Direction::Egress, Reason::Spoofed);
    }
    match ip.icmp_type {
        ROUTER_ADVERTISEMENT | REDIRECT => {
            return drop_frame(pod, Direction::Egress, Reason::Spoofed);
        }
        NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {}
        kind => return icmp(Direction::Egress, kind == ECHO_REQUEST_V6),
    }
    let Some(said) = packet::neighbour(ctx, ip) else {
        return drop_frame(pod, Direction::Egress, Reason::Malformed);
    };
    let target = said.target();
    let advertises = ip.icmp_type == NEIGHBOUR_ADVERTISEMENT;
    let foreign = advertises && !state.view.owns(&target) && !target.is_v6_link_local();
    if foreign || (known(&state.mac) && said.claims_other_than(&state.mac)) {
        return drop_frame(pod, Direction::Egress, Reason::Spoofed);
    }
    NEXT
}

/// ICMP passes; echo is counted.
#[inline(always)]
fn icmp(direction: Direction, echo: bool) -> i32 {
    if echo {
        count(direction, &Verdict::pass(Reason::Echo));
    }
    NEXT
}

/// Drops a frame without addresses that could be reported.
#[inline(always)]
fn drop_frame(pod: PodIndex, direction: Direction, reason: Reason) -> i32 {
    let who = Refused::new(pod, direction, Protocol::OTHER, DROPPED);
    refused(who, None, None, None, &Verdict::refuse(reason));
    DROP
}

/// Drops a packet for a reason that no rule of a policy gave. On a stack of its own: the caller's
/// is full.
#[inline(never)]
fn refuse(pod: PodIndex, direction: Direction, ip: &Packet, reason: Reason) -> i32 {
    drop_packet(pod, direction, ip, &Verdict::refuse(reason))
}

/// Drops a packet.
#[inline(always)]
fn drop_packet(pod: PodIndex, direction: Direction, ip: &Packet, verdict: &Verdict) -> i32 {
    let (local, remote) = match direction {
        Direction::Egress => (&ip.from, &ip.to),
        Direction::Ingress => (&ip.to, &ip.from),
    };
    let who = Refused::new(pod, direction, ip.protocol, DROPPED);
    refused(who, Some(local), Some(remote), None, verdict);
    DROP
}

/// A packet of a pod, its source true.
#[inline(always)]
fn send(pod: PodIndex, state: &PodState, ip: &Packet) -> i32 {
    if ip.protocol == Protocol::TCP {
        return send_tcp(pod, state, ip);
    }
    if let Fragment::Later = ip.fragment {
        return later_fragment(pod, Direction::Egress, ip);
    }
    let udp = ip.protocol == Protocol::UDP;
    let mut question = ask(pod, ip.protocol, Origin::Address, &ip.to, ip.from.port);
    let mut path = UNDECIDED;
    let room = (&mut question, &mut path);
    let passes = udp && udp::refresh(ip.from.port, Way::FromPod, ip.payload.into(), room);
    if !passes {
        if state.view.has(PodState::ENROLLED) && tables::is_virtual(&ip.to, ip.protocol) {
            return refuse(pod, Direction::Egress, ip, Reason::Untranslated);
        }
        let facts = decision::outbound(&question, &mut path);
        trace(Hook::GateFromPod, pod, &ip.to, &path);
        if matches!(path.action, Outbound::Refuse) {
            return drop_packet(pod, Direction::Egress, ip, &path.verdict);
        }
        count(Direction::Egress, &path.verdict);
        if let Some(audited) = audit::audited(pod) {
            audit::outbound(audited, &question, None);
        }
        if udp {
            udp::open(&question, ip.from.port, Way::FromPod, (&path, facts));
            report::add(Counter::UnencryptedBytes(path.clear), ip.payload.into());
        }
    }
    first_fragment(ip);
    NEXT
}

/// A TCP segment of a pod.
#[inline(always)]
fn send_tcp(pod: PodIndex, state: &PodState, ip: &Packet) -> i32 {
    if !matches!(ip.fragment, Fragment::Whole) {
        return refuse(pod, Direction::Egress, ip, Reason::Fragment);
    }
    let enrolled = state.view.has(PodState::ENROLLED);
    let peer = who(&Tables, &ip.to.addr);
    let tunnelled = tunnels(&state.view, &peer);
    if ip.flags & (SYN | ACK) != SYN {
        let tunnel = ip.to.port == TUNNEL_PORT || ip.from.port == TUNNEL_PORT;
        // A bare reset carries no byte of the application; without it the other end would wait.
        let reset = ip.flags & RST != 0 && ip.payload == 0;
        if !tunnelled || tunnel || reset {
            return NEXT;
        }
        return match old_connection(ip) {
            true => NEXT,
            false => refuse(pod, Direction::Egress, ip, Reason::Bypass),
        };
    }
    // Sent before the pod or its peer joined the mesh, and unanswered: no hook will see it again.
    if enrolled && ip.payload == 0 && old_connection(ip) {
        return NEXT;
    }
    if enrolled && !peer.local && peer.has(Peer::ENROLLED) && ip.to.port == TUNNEL_PORT {
        return if ip.payload == 0 {
            NEXT
        } else {
            refuse(pod, Direction::Egress, ip, Reason::Bypass)
        };
    }
    if enrolled && tables::is_virtual(&ip.to, Protocol::TCP) {
        return refuse(pod, Direction::Egress, ip, Reason::Untranslated);
    }
    let mut path = UNDECIDED;
    let _ = decision::outbound(
        &ask(pod, ip.protocol, Origin::Address, &ip.to, Port(0)),
        &mut path,
    );
    trace(Hook::GateFromPod, pod, &ip.to, &path);
    match path.action {
        Outbound::Direct => NEXT,
        Outbound::Refuse => drop_packet(pod, Direction::Egress, ip, &path.verdict),
        Outbound::Tunnel => refuse(pod, Direction::Egress, ip, Reason::Bypass),
    }
}

/// Whether a segment is of a connection that is older than the enrolment, and left alone: of one that
/// has ended, what carries nothing.
#[inline(never)]
fn old_connection(ip: &Packet) -> bool {
    let key = ConnectionKey {
        local: ip.from,
        remote: ip.to,
    };
    // SAFETY: read at once.
    match unsafe { OLD_CONNECTIONS.get(key) } {
        Some(old) => ip.payload == 0 || *old & OLD_ENDED == 0,
        None => false,
    }
}

/// A packet to a pod, its source as true as can be told.
#[inline(always)]
fn receive(pod: PodIndex, state: &PodState, ip: &Packet, entered: u32) -> i32 {
    let has_ports = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
    let own = state.view.owns(&ip.to.addr) || ip.to.addr.is_multicast_or_broadcast();
    if state.view.has(PodState::ENROLLED) && has_ports && !own {
        return refuse(pod, Direction::Ingress, ip, Reason::ForeignDestination);
    }
    let tcp = ip.protocol == Protocol::TCP;
    if tcp && (ip.flags & (SYN | ACK) != SYN || ip.to.port == TUNNEL_PORT) {
        return NEXT;
    }
    // The node's own address on a packet that this node did not make: translated on its way.
    let translated = entered != 0 && is_host(&ip.from.addr);
    let origin = if translated {
        Origin::Translated
    } else {
        Origin::Address
    };
    if tcp {
        // sk_lookup decides connections, but cannot see a translation, and cannot be silent.
        if !translated && !state.view.has(PodState::SILENT) {
            return NEXT;
        }
        return decide_arrival(pod, ip, origin);
    }
    if let Fragment::Later = ip.fragment {
        return later_fragment(pod, Direction::Ingress, ip);
    }
    decide_arrival(pod, ip, origin)
}

/// Bytes of a datagram that count at the pod which it is for: what a pod of this node sent counts at
/// its own gate.
#[inline(always)]
fn arriving_bytes(ip: &Packet) -> u64 {
    match tables::pod_by_addr(&ip.from.addr) {
        Some(_) => 0,
        None => ip.payload.into(),
    }
}

/// Decides a packet that opens something towards a pod, or goes on with a flow.
#[inline(always)]
fn decide_arrival(pod: PodIndex, ip: &Packet, origin: Origin) -> i32 {
    let mut question = ask(pod, ip.protocol, origin, &ip.from, ip.to.port);
    let mut path = UNDECIDED;
    let udp = ip.protocol == Protocol::UDP;
    let bytes = if udp { arriving_bytes(ip) } else { 0 };
    let room = (&mut question, &mut path);
    if udp && udp::refresh(ip.to.port, Way::ToPod, bytes, room) {
        first_fragment(ip);
        return NEXT;
    }
    let facts = decision::inbound(&question, &mut path);
    trace(Hook::GateToPod, pod, &ip.from, &path);
    if matches!(path.action, Outbound::Refuse) {
        return drop_packet(pod, Direction::Ingress, ip, &path.verdict);
    }
    // What sk_lookup sees as it is, it asks about.
    let asked_again = ip.protocol == Protocol::TCP && !matches!(origin, Origin::Translated);
    if !asked_again && audit::audited(pod).is_some() {
        audit::inbound(&question, &ip.to);
    }
    if udp {
        udp::open(&question, ip.to.port, Way::ToPod, (&path, facts));
        report::add(Counter::UnencryptedBytes(path.clear), bytes);
    }
    first_fragment(ip);
    NEXT
}

#[inline(always)]
fn ask(pod: PodIndex, protocol: Protocol, origin: Origin, remote: &Endpoint, port: Port) -> Ask {
    Ask {
        pod,
        protocol,
        origin,
        remote: *remote,
        local_port: port,
    }
}

#[inline(always)]
fn fragment_key(ip: &Packet) -> FragmentKey {
    FragmentKey {
        from: ip.from.addr,
        to: ip.to.addr,
        id: ip.fragment_id,
        protocol: ip.protocol.0.into(),
    }
}

/// Remembers that the first part of a datagram passed. On a stack of its own: the caller's is full.
#[inline(never)]
fn first_fragment(ip: &Packet) {
    if let Fragment::First = ip.fragment {
        let passed = FragmentVerdict {
            time_ns: now(),
            allowed: 1,
        };
        let _ = FRAGMENTS.insert(fragment_key(ip), passed, 0);
    }
}

/// A later part passes only if the first one did, and not long ago.
#[inline(always)]
fn later_fragment(pod: PodIndex, direction: Direction, ip: &Packet) -> i32 {
    // SAFETY: read at once.
    let first = unsafe { FRAGMENTS.get(fragment_key(ip)) }.copied();
    match first {
        Some(first) if now().saturating_sub(first.time_ns) < FRAGMENT_NS => NEXT,
        _ => refuse(pod, direction, ip, Reason::Fragment),
    }
}
