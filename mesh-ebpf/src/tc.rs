// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The gate: tcx programs on the host-side interface of each managed pod, in both directions, before
//! the CNI plugin's programs.
//!
//! The gate enforces what the socket hooks do not see: spoofed addresses, raw and packet sockets, network
//! namespaces nested in a pod, and packets with translated addresses. It passes no packet that opens
//! traffic which [`mesh_common::path`] denies. Its only state are UDP flows, fragments and marked
//! SYNs.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::programs::TcContext;
use mesh_common::counter::Counter;
use mesh_common::maps::{ConnectionKey, FragmentKey, FragmentVerdict, MARK_SEEN, OLD_ENDED};
use mesh_common::path::{Origin, Outbound, Peers as _, tunnels, who};
use mesh_common::pod::{GatePod, PodIndex, PodState};
use mesh_common::policy::PolicySetId;
use mesh_common::settings::{FRAGMENT_NS, TUNNEL_PORT};
use mesh_common::{Addr, Direction, Protocol, Reason, Verdict};

use crate::audit;
use crate::decision::{self, Ask, Decision};
use crate::packet::{self, ACK, Fragment, Kind, Packet, RST, SYN};
use crate::report::{self, DROPPED, Hook, Subject, count, now, refused, trace};
use crate::tables::{self, FRAGMENTS, MARKED, OLD_CONNECTIONS, Tables};
use crate::udp_flows::{self, Seen};
use crate::volatile::read;

/// The return value TCX_NEXT: the packet goes on to the next program.
const NEXT: i32 = -1;
/// The return value TCX_DROP: the packet is dropped.
const DROP: i32 = 2;

// Types of ICMPv6 (RFC 4443, RFC 4861) and ICMP (RFC 792).
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;

/// Handles a frame that a pod sends.
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
    if is_known(mac) && !is_same(&ethernet.from, mac) {
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
        // This includes DHCP requests, which a pod sends before it has an address.
        return refuse(pod, Direction::Egress, ip, Reason::Spoofed);
    }
    if ip.protocol == Protocol::ICMP {
        return icmp(Direction::Egress, ip);
    }
    if !is_checked(state) {
        return NEXT;
    }
    send(pod, state, ip)
}

/// Handles a frame that is sent to a pod.
#[inline(always)]
pub(crate) fn to_pod(ctx: &TcContext) -> i32 {
    // The agent adds the interface to the map before it attaches the program, and removes it after
    // detaching: an interface without a pod is being changed, and passes nothing.
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
    if state.view.owns(&ip.from.addr) || is_foreign(&ip.from.addr, entered) {
        return refuse(pod, Direction::Ingress, ip, Reason::Spoofed);
    }
    match ip.protocol {
        Protocol::ICMP | Protocol::ICMPV6 => return icmp(Direction::Ingress, ip),
        _ => {}
    }
    if !is_checked(state) {
        return NEXT;
    }
    if ip.flags & (SYN | ACK) == SYN && is_tunnel_to(ctx, state, ip) {
        return NEXT;
    }
    receive(pod, state, ip, entered)
}

/// Returns whether a TCP segment of a pod passes without the whole check: its source address is the
/// pod's, it opens no connection, and it is no plaintext to a peer that needs a tunnel. This is the
/// fast path of most packets; all others are checked as a whole.
#[inline(never)]
fn continues_from_pod(ctx: &TcContext, gate: &GatePod) -> bool {
    let Some(segment) = packet::segment(ctx) else {
        return false;
    };
    let own_mac = u64::from_ne_bytes(gate.mac);
    if (own_mac != 0 && own_mac != segment.mac) || !gate.owns(&segment.from.addr) {
        return false;
    }
    let opens = segment.flags & (SYN | ACK) == SYN;
    if !gate.has(PodState::ENROLLED) {
        return !opens;
    }
    if !opens && tables::local(&segment.to.addr).is_some() {
        return true;
    }
    // The agent's own tunnels. sock_ops adds an outgoing one before its SYN, and an incoming one when it
    // is established; until then, one on an application's port is in `MARKED`.
    tables::is_tunnel(&segment.from, &segment.to)
        || (!opens && tables::is_steered(&segment.from, &segment.to))
}

/// Returns whether a TCP segment to a pod passes without the whole check: its destination is the pod's
/// address, its source address can be valid, and it opens no connection.
#[inline(never)]
fn continues_to_pod(ctx: &TcContext, gate: &GatePod) -> bool {
    let Some(segment) = packet::segment(ctx) else {
        return false;
    };
    let entered = read!(ctx.skb.skb, ingress_ifindex);
    segment.flags & (SYN | ACK) != SYN
        && gate.owns(&segment.to.addr)
        && !gate.owns(&segment.from.addr)
        && !is_foreign(&segment.from.addr, entered)
}

/// Returns whether a SYN opens a tunnel to an application's own port, and remembers it. The sk_lookup
/// hook, which sees the SYN next, then gives it to the agent. A sender who forges the TCP option only
/// reaches the agent, which demands a certificate.
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

/// Adds the connection of a marked SYN to `MARKED`.
#[inline(never)]
fn remember_mark(ip: &Packet) {
    let key = ConnectionKey {
        local: ip.to,
        remote: ip.from,
    };
    // A retransmitted SYN must not reset the entry.
    let _ = MARKED.insert(key, MARK_SEEN, BPF_NOEXIST.into());
}

/// Returns whether the gate checks more than addresses: the pod is enrolled or has a policy.
#[inline(always)]
fn is_checked(state: &PodState) -> bool {
    state.view.has(PodState::ENROLLED) || state.view.set != PolicySetId::NONE
}

/// Returns whether a pod's MAC address is known.
#[inline(always)]
fn is_known(mac: &[u8; 8]) -> bool {
    u64::from_ne_bytes(*mac) != 0
}

/// Returns whether a frame's MAC address is the pod's.
#[inline(always)]
fn is_same(claimed: &[u8; 6], own: &[u8; 8]) -> bool {
    let [a, b, c, d, e, f] = *claimed;
    u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]) == u64::from_ne_bytes(*own)
}

/// Returns whether an address is this node's own.
#[inline(always)]
fn is_host(addr: &Addr) -> bool {
    Tables.peer(addr).is_some_and(|peer| peer.id.is_host())
}

/// Returns whether a source address is a local pod's, but the packet entered by another interface.
#[inline(always)]
fn is_foreign(from: &Addr, entered: u32) -> bool {
    tables::local(from).is_some_and(|sender| sender.link != 0 && sender.link != entered)
}

/// Handles ARP of a pod: it passes with the pod's own sender addresses.
#[inline(always)]
fn arp_from_pod(pod: PodIndex, state: &PodState, arp: &Packet) -> i32 {
    // A probe for a duplicate address has the sender 0.0.0.0 (RFC 5227).
    let own_address = arp.from.addr == state.view.v4 || arp.from.addr.is_unspecified();
    let own_mac = !is_known(&state.mac) || is_same(&arp.mac, &state.mac);
    if !own_address || !own_mac {
        return drop_frame(pod, Direction::Egress, Reason::Spoofed);
    }
    NEXT
}

/// Handles ICMPv6 of a pod: it passes with the pod's own addresses. A pod is no router.
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
        NEIGHBOR_SOLICITATION | NEIGHBOR_ADVERTISEMENT => {}
        _ => return icmp(Direction::Egress, ip),
    }
    let Some(message) = packet::neighbor(ctx, ip) else {
        return drop_frame(pod, Direction::Egress, Reason::Malformed);
    };
    let target = message.target();
    let advertises = ip.icmp_type == NEIGHBOR_ADVERTISEMENT;
    let foreign = advertises && !state.view.owns(&target) && !target.is_v6_link_local();
    if foreign || (is_known(&state.mac) && message.claims_other_than(&state.mac)) {
        return drop_frame(pod, Direction::Egress, Reason::Spoofed);
    }
    NEXT
}

/// Passes an ICMP or ICMPv6 packet, and counts it if it is an echo request.
#[inline(always)]
fn icmp(direction: Direction, ip: &Packet) -> i32 {
    let echo_request = match ip.protocol {
        Protocol::ICMPV6 => ECHO_REQUEST_V6,
        _ => ECHO_REQUEST,
    };
    if ip.icmp_type == echo_request {
        count(direction, &Verdict::pass(Reason::Echo));
    }
    NEXT
}

/// Drops a frame that has no addresses to report.
#[inline(always)]
fn drop_frame(pod: PodIndex, direction: Direction, reason: Reason) -> i32 {
    let subject = Subject::new(pod, direction, Protocol::OTHER, DROPPED);
    refused(&subject, None, None, None, &Verdict::refuse(reason));
    DROP
}

/// Drops a packet without a policy rule. The function has a stack frame of its own, because the callers'
/// stacks are full.
#[inline(never)]
fn refuse(pod: PodIndex, direction: Direction, ip: &Packet, reason: Reason) -> i32 {
    drop_packet(pod, direction, ip, &Verdict::refuse(reason))
}

/// Drops and reports a packet.
#[inline(always)]
fn drop_packet(pod: PodIndex, direction: Direction, ip: &Packet, verdict: &Verdict) -> i32 {
    let (local, remote) = match direction {
        Direction::Egress => (&ip.from, &ip.to),
        Direction::Ingress => (&ip.to, &ip.from),
    };
    let subject = Subject::new(pod, direction, ip.protocol, DROPPED);
    refused(&subject, Some(local), Some(remote), None, verdict);
    DROP
}

/// Handles a packet of a pod with the pod's own source address.
#[inline(always)]
fn send(pod: PodIndex, state: &PodState, ip: &Packet) -> i32 {
    if ip.protocol == Protocol::TCP {
        return send_tcp(pod, state, ip);
    }
    if let Fragment::Later = ip.fragment {
        return later_fragment(pod, Direction::Egress, ip);
    }
    let udp = ip.protocol == Protocol::UDP;
    let bytes = ip.payload.into();
    let mut ask = sent(pod, ip);
    let mut decision = Decision::UNDECIDED;
    if !udp || !udp_flows::refresh(&mut ask, &mut decision, Seen::FromPod, bytes) {
        if state.view.has(PodState::ENROLLED) && tables::is_virtual(&ip.to, ip.protocol) {
            return refuse(pod, Direction::Egress, ip, Reason::Untranslated);
        }
        decision::outbound(&ask, &mut decision);
        trace(Hook::GateFromPod, &ask, &decision.path);
        if decision.refuses() {
            return drop_packet(pod, Direction::Egress, ip, &decision.path.verdict);
        }
        count(Direction::Egress, &decision.path.verdict);
        if let Some(audited) = audit::audited(pod) {
            audit::outbound(audited, &ask, None);
        }
        if udp {
            udp_flows::open(&ask, &decision, Direction::Egress);
            report::add(Counter::UnencryptedBytes(decision.path.clear), bytes);
        }
    }
    first_fragment(ip);
    NEXT
}

/// Handles a TCP segment of a pod with the pod's own source address.
#[inline(always)]
fn send_tcp(pod: PodIndex, state: &PodState, ip: &Packet) -> i32 {
    if !matches!(ip.fragment, Fragment::Whole) {
        return refuse(pod, Direction::Egress, ip, Reason::Fragment);
    }
    let enrolled = state.view.has(PodState::ENROLLED);
    let peer = who(&Tables, &ip.to.addr);
    if ip.flags & (SYN | ACK) != SYN {
        // Segments of a tunnel that `TUNNELS` does not have: the agent's answer to a SYN, and
        // acknowledgments after the close. They carry no application bytes.
        let tunnel = ip.to.port == TUNNEL_PORT || ip.from.port == TUNNEL_PORT;
        // Without a reset the peer would wait.
        let reset = ip.flags & RST != 0;
        if !tunnels(&state.view, &peer) || (ip.payload == 0 && (tunnel || reset)) {
            return NEXT;
        }
        return match is_old_connection(ip) {
            true => NEXT,
            false => refuse(pod, Direction::Egress, ip, Reason::Bypass),
        };
    }
    // A retransmitted SYN of a connection that is older than the enrollment: no hook will see it again.
    if enrolled && ip.payload == 0 && is_old_connection(ip) {
        return NEXT;
    }
    if enrolled && tables::is_virtual(&ip.to, Protocol::TCP) {
        return refuse(pod, Direction::Egress, ip, Reason::Untranslated);
    }
    let ask = sent(pod, ip);
    let mut decision = Decision::UNDECIDED;
    decision::outbound(&ask, &mut decision);
    let path = &decision.path;
    trace(Hook::GateFromPod, &ask, path);
    match path.action {
        Outbound::Direct => NEXT,
        Outbound::Refuse => drop_packet(pod, Direction::Egress, ip, &path.verdict),
        Outbound::Tunnel => refuse(pod, Direction::Egress, ip, Reason::Bypass),
    }
}

/// Returns whether a segment belongs to a connection that is older than the enrollment and stays
/// plaintext. After the connection closed, only segments without payload do.
#[inline(never)]
fn is_old_connection(ip: &Packet) -> bool {
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

/// Handles a packet to a pod, after the check of its source address.
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
    // A packet with this node's address that entered by an interface has a translated address.
    let translated = entered != 0 && is_host(&ip.from.addr);
    let origin = if translated {
        Origin::Translated
    } else {
        Origin::Address
    };
    if tcp {
        // The sk_lookup hook decides connections, but it cannot see a translation or drop silently.
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

/// Returns the payload bytes to count for a datagram to a pod. The gate of the sender counts those of a
/// local pod.
#[inline(always)]
fn arriving_bytes(ip: &Packet) -> u64 {
    match tables::pod_by_addr(&ip.from.addr) {
        Some(_) => 0,
        None => ip.payload.into(),
    }
}

/// Decides a SYN or datagram to a pod.
#[inline(always)]
fn decide_arrival(pod: PodIndex, ip: &Packet, origin: Origin) -> i32 {
    let mut ask = Ask {
        remote: ip.from,
        pod,
        local_port: ip.to.port,
        protocol: ip.protocol,
        origin,
    };
    let mut decision = Decision::UNDECIDED;
    let udp = ip.protocol == Protocol::UDP;
    let bytes = if udp { arriving_bytes(ip) } else { 0 };
    if udp && udp_flows::refresh(&mut ask, &mut decision, Seen::ToPod, bytes) {
        first_fragment(ip);
        return NEXT;
    }
    decision::inbound(&ask, &mut decision);
    trace(Hook::GateToPod, &ask, &decision.path);
    if decision.refuses() {
        return drop_packet(pod, Direction::Ingress, ip, &decision.path.verdict);
    }
    // The sk_lookup hook audits TCP whose address is not translated.
    let audited_later = ip.protocol == Protocol::TCP && !matches!(origin, Origin::Translated);
    if !audited_later && audit::audited(pod).is_some() {
        audit::inbound(&ask, &ip.to);
    }
    if udp {
        udp_flows::open(&ask, &decision, Direction::Ingress);
        report::add(Counter::UnencryptedBytes(decision.path.clear), bytes);
    }
    first_fragment(ip);
    NEXT
}

/// Returns the ask about a packet that a pod sends.
#[inline(always)]
fn sent(pod: PodIndex, ip: &Packet) -> Ask {
    Ask {
        remote: ip.to,
        pod,
        local_port: ip.from.port,
        protocol: ip.protocol,
        origin: Origin::Address,
    }
}

/// Returns the key of a fragment's datagram.
#[inline(always)]
fn fragment_key(ip: &Packet) -> FragmentKey {
    FragmentKey {
        from: ip.from.addr,
        to: ip.to.addr,
        id: ip.fragment_id,
        protocol: ip.protocol.0.into(),
    }
}

/// Remembers that a first fragment passed; does nothing for other packets. The function has a stack frame
/// of its own, because the callers' stacks are full.
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

/// Handles a later fragment: it passes if the first one passed within [`FRAGMENT_NS`].
#[inline(always)]
fn later_fragment(pod: PodIndex, direction: Direction, ip: &Packet) -> i32 {
    // SAFETY: read at once.
    let first = unsafe { FRAGMENTS.get(fragment_key(ip)) }.copied();
    match first {
        Some(first) if now().saturating_sub(first.time_ns) < FRAGMENT_NS => NEXT,
        _ => refuse(pod, direction, ip, Reason::Fragment),
    }
}
