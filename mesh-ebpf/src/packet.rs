// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Frames at the gate, parsed: the only place that knows offsets. Everything is copied out by
//! bounded loads, so no look at a packet can be out of range.

use aya_ebpf::programs::TcContext;
use mesh_common::{Addr, Endpoint, Port, Protocol};

const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Extension headers that are walked before a packet is given up as malformed.
const MAX_EXTENSIONS: usize = 6;

/// TCP's SYN flag.
pub(crate) const SYN: u8 = 0x02;
/// TCP's RST flag.
pub(crate) const RST: u8 = 0x04;
/// TCP's ACK flag.
pub(crate) const ACK: u8 = 0x10;

/// The Ethernet header.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct Ethernet {
    pub(crate) to: [u8; 6],
    pub(crate) from: [u8; 6],
    ethertype: [u8; 2],
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Ipv4 {
    version_length: u8,
    service: u8,
    total: [u8; 2],
    id: [u8; 2],
    fragment: [u8; 2],
    ttl: u8,
    protocol: u8,
    checksum: [u8; 2],
    from: [u8; 4],
    to: [u8; 4],
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Ipv6 {
    version: [u8; 4],
    payload: [u8; 2],
    next: u8,
    hops: u8,
    from: [u8; 16],
    to: [u8; 16],
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Arp {
    kinds: [u8; 8],
    pub(crate) sender_mac: [u8; 6],
    pub(crate) sender: [u8; 4],
    target_mac: [u8; 6],
    target: [u8; 4],
}

/// Where a packet stands in its datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    /// It is the whole datagram.
    Whole,
    /// It is the first part, with the ports.
    First(u32),
    /// It is a later part, without ports.
    Later(u32),
}

/// An IP packet.
#[derive(Clone, Copy)]
pub(crate) struct Packet {
    pub(crate) from: Endpoint,
    pub(crate) to: Endpoint,
    pub(crate) protocol: Protocol,
    pub(crate) fragment: Fragment,
    /// TCP's flags.
    pub(crate) flags: u8,
    /// The first byte of ICMP.
    pub(crate) icmp_type: u8,
    /// Offset of the transport header in the frame.
    pub(crate) transport: u32,
    /// Bytes behind the transport header (TCP), or behind the IP header.
    pub(crate) payload: u32,
}

/// What a frame is.
pub(crate) enum Frame {
    /// An IP packet.
    Ip(Packet),
    /// ARP.
    Arp(Arp),
    /// Something else.
    Other,
    /// It cannot be parsed.
    Malformed,
}

/// The Ethernet header of a frame.
#[inline(always)]
pub(crate) fn ethernet(ctx: &TcContext) -> Option<Ethernet> {
    ctx.load::<Ethernet>(0).ok()
}

/// Parses what is behind the Ethernet header: a function of its own, for its stack.
#[inline(never)]
pub(crate) fn parse(ctx: &TcContext, ethernet: &Ethernet, frame: &mut Frame) {
    *frame = match u16::from_be_bytes(ethernet.ethertype) {
        ETHERTYPE_IPV4 => ipv4(ctx).map_or(Frame::Malformed, Frame::Ip),
        ETHERTYPE_IPV6 => ipv6(ctx).map_or(Frame::Malformed, Frame::Ip),
        ETHERTYPE_ARP => match ctx.load::<Arp>(ETHERNET) {
            Ok(arp) if arp.kinds[..6] == [0, 1, 8, 0, 6, 4] => Frame::Arp(arp),
            _ => Frame::Malformed,
        },
        _ => Frame::Other,
    };
}

#[inline(always)]
fn ipv4(ctx: &TcContext) -> Option<Packet> {
    let ip = ctx.load::<Ipv4>(ETHERNET).ok()?;
    let header = usize::from(ip.version_length & 0x0f) * 4;
    if ip.version_length >> 4 != 4 || header < 20 {
        return None;
    }
    let offset = u16::from_be_bytes(ip.fragment);
    let id = u32::from(u16::from_be_bytes(ip.id));
    let fragment = match (offset & 0x1fff, offset & 0x2000) {
        (0, 0) => Fragment::Whole,
        (0, _) => Fragment::First(id),
        _ => Fragment::Later(id),
    };
    let packet = Packet {
        from: Endpoint::new(Addr::from_v4_word(u32::from_ne_bytes(ip.from)), Port(0)),
        to: Endpoint::new(Addr::from_v4_word(u32::from_ne_bytes(ip.to)), Port(0)),
        protocol: Protocol(ip.protocol),
        fragment,
        flags: 0,
        icmp_type: 0,
        transport: (ETHERNET + header) as u32,
        payload: 0,
    };
    transport(ctx, packet)
}

#[inline(always)]
fn ipv6(ctx: &TcContext) -> Option<Packet> {
    let ip = ctx.load::<Ipv6>(ETHERNET).ok()?;
    if ip.version[0] >> 4 != 6 {
        return None;
    }
    let mut next = ip.next;
    let mut at = ETHERNET + size_of::<Ipv6>();
    let mut fragment = Fragment::Whole;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            // Hop-by-hop, routing, destination options (RFC 8200): length in 8-octet units.
            0 | 43 | 60 => {
                let [kind, length] = ctx.load::<[u8; 2]>(at).ok()?;
                next = kind;
                at += (usize::from(length) + 1) * 8;
            }
            // Authentication header (RFC 4302): length in 4-octet units, minus 2.
            51 => {
                let [kind, length] = ctx.load::<[u8; 2]>(at).ok()?;
                next = kind;
                at += (usize::from(length) + 2) * 4;
            }
            44 => {
                let head = ctx.load::<[u8; 8]>(at).ok()?;
                next = head[0];
                at += 8;
                let offset = u16::from_be_bytes([head[2], head[3]]);
                let id = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
                fragment = match (offset & 0xfff8, offset & 1) {
                    // An atomic fragment (RFC 6946).
                    (0, 0) => Fragment::Whole,
                    (0, _) => Fragment::First(id),
                    _ => Fragment::Later(id),
                };
                if matches!(fragment, Fragment::Later(_)) {
                    break;
                }
            }
            _ => break,
        }
    }
    if matches!(next, 0 | 43 | 60 | 51) {
        return None;
    }
    let packet = Packet {
        from: Endpoint::new(addr6(ip.from), Port(0)),
        to: Endpoint::new(addr6(ip.to), Port(0)),
        protocol: Protocol(next),
        fragment,
        flags: 0,
        icmp_type: 0,
        transport: at as u32,
        payload: 0,
    };
    transport(ctx, packet)
}

#[inline(always)]
fn addr6(octets: [u8; 16]) -> Addr {
    Addr::from_octets(octets)
}

/// Ports, flags and sizes.
#[inline(always)]
fn transport(ctx: &TcContext, mut packet: Packet) -> Option<Packet> {
    let at = packet.transport as usize;
    packet.payload = ctx.len().saturating_sub(packet.transport);
    if matches!(packet.fragment, Fragment::Later(_)) {
        return Some(packet);
    }
    match packet.protocol {
        Protocol::TCP => {
            let head = ctx.load::<[u8; 14]>(at).ok()?;
            ports(&mut packet, [head[0], head[1], head[2], head[3]]);
            packet.flags = head[13];
            packet.payload = packet.payload.saturating_sub(u32::from(head[12] >> 4) * 4);
        }
        Protocol::UDP | Protocol::SCTP | UDP_LITE => {
            ports(&mut packet, ctx.load::<[u8; 4]>(at).ok()?);
        }
        Protocol::ICMP | Protocol::ICMPV6 => packet.icmp_type = ctx.load::<u8>(at).ok()?,
        _ => {}
    }
    Some(packet)
}

/// UDP-Lite (RFC 3828), which no socket hook sees.
pub(crate) const UDP_LITE: Protocol = Protocol(136);

#[inline(always)]
fn ports(packet: &mut Packet, head: [u8; 4]) {
    packet.from.port = Port(u16::from_ne_bytes([head[0], head[1]]));
    packet.to.port = Port(u16::from_ne_bytes([head[2], head[3]]));
}

/// What a neighbour discovery message says about its sender (RFC 4861).
pub(crate) struct Neighbour {
    /// The target address of a solicitation or advertisement.
    pub(crate) target: Addr,
    /// The link-layer address of its first option, if there is one of the kind `option`.
    pub(crate) mac: Option<[u8; 6]>,
}

/// Parses a neighbour solicitation or advertisement; `option` is 1 for source, 2 for target
/// link-layer addresses.
#[inline(always)]
pub(crate) fn neighbour(ctx: &TcContext, packet: &Packet, option: u8) -> Option<Neighbour> {
    let at = packet.transport as usize;
    let target = addr6(ctx.load::<[u8; 16]>(at + 8).ok()?);
    let mut mac = None;
    if let Ok(found) = ctx.load::<[u8; 8]>(at + 24)
        && found[0] == option
        && found[1] == 1
    {
        mac = Some([found[2], found[3], found[4], found[5], found[6], found[7]]);
    }
    Some(Neighbour { target, mac })
}
