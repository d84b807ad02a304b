// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Frames at the gate, parsed: the only place that knows offsets. What is common is read in place,
//! inside bounds that the verifier checks; everything else is copied out by bounded loads.

use core::ptr;

use aya_ebpf::programs::TcContext;
use mesh_common::socket::TUNNEL_OPTION;
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::context::read;

const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Extension headers that are walked before a packet is given up as malformed.
const MAX_EXTENSIONS: usize = 6;

/// Bytes of a UDP header (RFC 768).
const UDP_HEADER: u32 = 8;

/// TCP's SYN flag.
pub(crate) const SYN: u8 = 0x02;
/// TCP's RST flag.
pub(crate) const RST: u8 = 0x04;
/// TCP's ACK flag.
pub(crate) const ACK: u8 = 0x10;

/// The Ethernet header.
#[derive(Clone, Copy)]
#[repr(C)]
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
    from: [u32; 4],
    to: [u32; 4],
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[derive(Clone, Copy)]
#[repr(C)]
struct Arp {
    kinds: [u8; 8],
    sender_mac: [u8; 6],
    sender: [u8; 4],
    target_mac: [u8; 6],
    target: [u8; 4],
}

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// It cannot be parsed.
    Malformed = 0,
    /// An IP packet.
    Ip = 1,
    /// ARP: `from.addr` and `mac` are the sender's.
    Arp = 2,
    /// Something else.
    Other = 3,
}

/// Where a packet stands in its datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Fragment {
    /// It is the whole datagram.
    Whole = 0,
    /// It is the first part, with the ports.
    First = 1,
    /// It is a later part, without ports.
    Later = 2,
}

/// A frame, parsed. Plain fields without holes: the verifier tracks each byte.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Packet {
    pub(crate) from: Endpoint,
    pub(crate) to: Endpoint,
    /// Identification of a datagram in fragments.
    pub(crate) fragment_id: u32,
    /// Offset of the transport header in the frame.
    pub(crate) transport: u32,
    /// Bytes behind the transport header (TCP, UDP), or behind the IP header.
    pub(crate) payload: u32,
    pub(crate) kind: Kind,
    pub(crate) protocol: Protocol,
    pub(crate) fragment: Fragment,
    /// TCP's flags.
    pub(crate) flags: u8,
    /// The first byte of ICMP.
    pub(crate) icmp_type: u8,
    /// Of the sender, in ARP.
    pub(crate) mac: [u8; 6],
    pub(crate) pad: u8,
}

impl Packet {
    pub(crate) const EMPTY: Self = Self {
        from: Endpoint::NONE,
        to: Endpoint::NONE,
        fragment_id: 0,
        transport: 0,
        payload: 0,
        kind: Kind::Malformed,
        protocol: Protocol::OTHER,
        fragment: Fragment::Whole,
        flags: 0,
        icmp_type: 0,
        mac: [0; 6],
        pad: 0,
    };
}

/// A whole TCP segment, read in place.
pub(crate) struct Segment {
    pub(crate) from: Endpoint,
    pub(crate) to: Endpoint,
    /// The sender's MAC address, then 2 bytes 0, as a word in memory.
    pub(crate) mac: u64,
    /// TCP's flags.
    pub(crate) flags: u8,
}

/// TCP directly behind an IPv4 header without options, not fragmented, or directly behind an IPv6
/// header, with all of that in the frame's linear part. `None` = something else, to be parsed as a
/// whole.
#[inline(always)]
pub(crate) fn segment(ctx: &TcContext) -> Option<Segment> {
    /// Of IPv4 up to TCP's flags, and as much more in IPv6.
    const FLAGS: usize = ETHERNET + size_of::<Ipv4>() + 13;
    const MORE: usize = size_of::<Ipv6>() - size_of::<Ipv4>();

    let start = read!(ctx.skb.skb, data) as usize;
    let end = read!(ctx.skb.skb, data_end) as usize;
    if start + FLAGS + 1 > end {
        return None;
    }
    // SAFETY: below, every offset is even and inside what was just checked.
    let half = |at: usize| unsafe { ptr::read_volatile((start + at) as *const u16) };
    let [a, b, c] = [6, 8, 10].map(|at| half(at).to_ne_bytes());
    let mac = u64::from_ne_bytes([a[0], a[1], b[0], b[1], c[0], c[1], 0, 0]);
    let head = half(ETHERNET).to_ne_bytes()[0];
    let word = |at: usize| {
        let [first, second] = [half(at), half(at + 2)].map(u16::to_ne_bytes);
        u32::from_ne_bytes([first[0], first[1], second[0], second[1]])
    };
    match u16::from_be(half(12)) {
        ETHERTYPE_IPV4 => {
            let whole = u16::from_be(half(ETHERNET + 6)) & 0x3fff == 0;
            let protocol = half(ETHERNET + 8).to_ne_bytes()[1];
            if head != 0x45 || !whole || protocol != Protocol::TCP.0 {
                return None;
            }
            Some(Segment {
                from: Endpoint::new(Addr::from_v4_word(word(26)), Port(half(34))),
                to: Endpoint::new(Addr::from_v4_word(word(30)), Port(half(36))),
                mac,
                flags: half(FLAGS - 1).to_ne_bytes()[1],
            })
        }
        ETHERTYPE_IPV6 => {
            let next = half(ETHERNET + 6).to_ne_bytes()[0];
            if start + FLAGS + MORE + 1 > end || head >> 4 != 6 || next != Protocol::TCP.0 {
                return None;
            }
            let address =
                |at: usize| Addr::from_words([word(at), word(at + 4), word(at + 8), word(at + 12)]);
            Some(Segment {
                from: Endpoint::new(address(ETHERNET + 8), Port(half(34 + MORE))),
                to: Endpoint::new(address(ETHERNET + 24), Port(half(36 + MORE))),
                mac,
                flags: half(FLAGS + MORE - 1).to_ne_bytes()[1],
            })
        }
        _ => None,
    }
}

/// The Ethernet header of a frame.
#[inline(always)]
pub(crate) fn ethernet(ctx: &TcContext) -> Option<Ethernet> {
    ctx.load::<Ethernet>(0).ok()
}

/// Parses what is behind the Ethernet header into a packet that is empty before.
#[inline(always)]
pub(crate) fn parse(ctx: &TcContext, ethernet: &Ethernet, packet: &mut Packet) {
    let parsed = match u16::from_be_bytes(ethernet.ethertype) {
        ETHERTYPE_IPV4 => ipv4(ctx, packet) && transport(ctx, packet),
        ETHERTYPE_IPV6 => ipv6(ctx, packet) && transport(ctx, packet),
        ETHERTYPE_ARP => arp(ctx, packet),
        _ => {
            packet.kind = Kind::Other;
            true
        }
    };
    if !parsed {
        packet.kind = Kind::Malformed;
    }
}

/// IPv4 over Ethernet only.
#[inline(never)]
fn arp(ctx: &TcContext, packet: &mut Packet) -> bool {
    let Ok(arp) = ctx.load::<Arp>(ETHERNET) else {
        return false;
    };
    let [a, b, c, d, e, f, _, _] = arp.kinds;
    packet.kind = Kind::Arp;
    packet.from.addr = Addr::from_v4_word(u32::from_ne_bytes(arp.sender));
    packet.mac = arp.sender_mac;
    u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]) == u64::from_ne_bytes([0, 1, 8, 0, 6, 4, 0, 0])
}

#[inline(never)]
fn ipv4(ctx: &TcContext, packet: &mut Packet) -> bool {
    let Ok(ip) = ctx.load::<Ipv4>(ETHERNET) else {
        return false;
    };
    let header = u32::from(ip.version_length & 0x0f) * 4;
    if ip.version_length >> 4 != 4 || header < 20 {
        return false;
    }
    let offset = u16::from_be_bytes(ip.fragment);
    packet.fragment_id = u32::from(u16::from_be_bytes(ip.id));
    if offset & 0x1fff != 0 {
        packet.fragment = Fragment::Later;
    } else if offset & 0x2000 != 0 {
        packet.fragment = Fragment::First;
    }
    packet.kind = Kind::Ip;
    packet.from.addr = Addr::from_v4_word(u32::from_ne_bytes(ip.from));
    packet.to.addr = Addr::from_v4_word(u32::from_ne_bytes(ip.to));
    packet.protocol = Protocol(ip.protocol);
    packet.transport = ETHERNET as u32 + header;
    true
}

#[inline(never)]
fn ipv6(ctx: &TcContext, packet: &mut Packet) -> bool {
    let Ok(ip) = ctx.load::<Ipv6>(ETHERNET) else {
        return false;
    };
    if ip.version[0] >> 4 != 6 {
        return false;
    }
    packet.kind = Kind::Ip;
    packet.from.addr = Addr::from_words(ip.from);
    packet.to.addr = Addr::from_words(ip.to);
    packet.protocol = Protocol(ip.next);
    packet.transport = (ETHERNET + size_of::<Ipv6>()) as u32;
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(packet.protocol) {
            return true;
        }
        if !extension(ctx, packet) {
            return false;
        }
        if matches!(packet.fragment, Fragment::Later) {
            return true;
        }
    }
    !is_extension(packet.protocol)
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

#[inline(always)]
fn is_extension(protocol: Protocol) -> bool {
    matches!(
        protocol.0,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
    )
}

/// Steps over one extension header (RFC 8200; RFC 4302 for authentication).
#[inline(never)]
fn extension(ctx: &TcContext, packet: &mut Packet) -> bool {
    let Ok(head) = ctx.load::<[u8; 8]>(packet.transport as usize) else {
        return false;
    };
    let length = u32::from(head[1]);
    match packet.protocol.0 {
        FRAGMENT => {
            let offset = u16::from_be_bytes([head[2], head[3]]);
            packet.fragment_id = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            packet.transport += 8;
            // Offset 0 without more to come is an atomic fragment (RFC 6946): whole.
            if offset & 0xfff8 != 0 {
                packet.fragment = Fragment::Later;
            } else if offset & 1 != 0 {
                packet.fragment = Fragment::First;
            }
        }
        // In units of 4 octets, minus 2.
        AUTHENTICATION => packet.transport += (length + 2) * 4,
        // In units of 8 octets, the first not counted.
        _ => packet.transport += (length + 1) * 8,
    }
    packet.protocol = Protocol(head[0]);
    true
}

/// Ports, flags and sizes.
#[inline(never)]
fn transport(ctx: &TcContext, packet: &mut Packet) -> bool {
    let at = packet.transport as usize;
    packet.payload = ctx.len().saturating_sub(packet.transport);
    if matches!(packet.fragment, Fragment::Later) {
        return true;
    }
    match packet.protocol {
        Protocol::TCP => {
            let Ok(head) = ctx.load::<[u8; 14]>(at) else {
                return false;
            };
            ports(packet, [head[0], head[1], head[2], head[3]]);
            packet.flags = head[13];
            packet.payload = packet.payload.saturating_sub(u32::from(head[12] >> 4) * 4);
        }
        Protocol::UDP | Protocol::SCTP | UDP_LITE => {
            let Ok(head) = ctx.load::<[u8; 4]>(at) else {
                return false;
            };
            ports(packet, head);
            if packet.protocol == Protocol::UDP {
                packet.payload = packet.payload.saturating_sub(UDP_HEADER);
            }
        }
        Protocol::ICMP | Protocol::ICMPV6 => {
            let Ok(kind) = ctx.load::<u8>(at) else {
                return false;
            };
            packet.icmp_type = kind;
        }
        _ => {}
    }
    true
}

/// UDP-Lite (RFC 3828), which no socket hook sees.
pub(crate) const UDP_LITE: Protocol = Protocol(136);

#[inline(always)]
fn ports(packet: &mut Packet, head: [u8; 4]) {
    packet.from.port = Port(u16::from_ne_bytes([head[0], head[1]]));
    packet.to.port = Port(u16::from_ne_bytes([head[2], head[3]]));
}

/// What a neighbour discovery message says about its sender (RFC 4861).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Neighbour {
    reserved: [u32; 2],
    target: [u32; 4],
    option: [u8; 8],
}

impl Neighbour {
    /// The target address of a solicitation or advertisement.
    #[inline(always)]
    pub(crate) fn target(&self) -> Addr {
        Addr::from_words(self.target)
    }

    /// Whether its first option is a link-layer address (1 = source, 2 = target) other than `mac`.
    #[inline(always)]
    pub(crate) fn claims_other_than(&self, mac: &[u8; 8]) -> bool {
        let [kind, length, a, b, c, d, e, f] = self.option;
        matches!(kind, 1 | 2)
            && length == 1
            && u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]) != u64::from_ne_bytes(*mac)
    }
}

/// Reads a neighbour solicitation or advertisement; one without an option claims nothing.
#[inline(always)]
pub(crate) fn neighbour(ctx: &TcContext, packet: &Packet) -> Option<Neighbour> {
    let at = packet.transport as usize;
    if let Ok(full) = ctx.load::<Neighbour>(at) {
        return Some(full);
    }
    let bare = ctx.load::<[u32; 6]>(at).ok()?;
    let [a, b, target @ ..] = bare;
    Some(Neighbour {
        reserved: [a, b],
        target,
        option: [0; 8],
    })
}

/// Options that are walked in a SYN: more fit only where most are padding.
const MAX_OPTIONS: usize = 20;

/// Whether a TCP segment carries [`TUNNEL_OPTION`].
#[inline(never)]
pub(crate) fn is_marked(ctx: &TcContext, packet: &Packet) -> bool {
    let start = packet.transport as usize;
    let Ok(offset) = ctx.load::<u8>(start + 12) else {
        return false;
    };
    let end = start + usize::from(offset >> 4) * 4;
    let mut at = start + 20;
    for _ in 0..MAX_OPTIONS {
        if at + TUNNEL_OPTION.len() > end {
            return false;
        }
        let Ok(option) = ctx.load::<[u8; 4]>(at) else {
            return false;
        };
        match option[0] {
            // No more of them, and padding (RFC 9293, 3.1).
            0 => return false,
            1 => at += 1,
            _ if u32::from_ne_bytes(option) == u32::from_ne_bytes(TUNNEL_OPTION) => return true,
            _ if option[1] < 2 => return false,
            _ => at += usize::from(option[1]),
        }
    }
    false
}
