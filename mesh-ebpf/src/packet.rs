// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The parser of frames at the gate. Only this module knows offsets. TCP segments in their common form
//! are read in place, within bounds that the verifier checks; everything else is copied by bounded
//! loads.

use core::ptr;

use aya_ebpf::programs::TcContext;
use mesh_common::socket::TUNNEL_OPTION;
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::volatile::read;

const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// The most IPv6 extension headers of a packet; one with more is malformed.
const MAX_EXTENSIONS: usize = 6;

/// The size of a UDP header in bytes (RFC 768).
const UDP_HEADER: u32 = 8;

/// The TCP flag SYN.
pub(crate) const SYN: u8 = 0x02;
/// The TCP flag RST.
pub(crate) const RST: u8 = 0x04;
/// The TCP flag ACK.
pub(crate) const ACK: u8 = 0x10;

/// An Ethernet header.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Ethernet {
    pub(crate) to: [u8; 6],
    pub(crate) from: [u8; 6],
    ethertype: [u8; 2],
}

/// An IPv4 header without options (RFC 791).
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

/// An IPv6 header without extensions (RFC 8200).
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

/// An ARP packet for IPv4 over Ethernet (RFC 826).
#[derive(Clone, Copy)]
#[repr(C)]
struct Arp {
    kinds: [u8; 8],
    sender_mac: [u8; 6],
    sender: [u8; 4],
    target_mac: [u8; 6],
    target: [u8; 4],
}

/// The kind of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A frame that cannot be parsed.
    Malformed = 0,
    /// An IP packet.
    Ip = 1,
    /// An ARP packet: `from.addr` and `mac` are the sender's.
    Arp = 2,
    /// Any other frame.
    Other = 3,
}

/// The position of an IP packet in its datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Fragment {
    /// The packet is the whole datagram.
    Whole = 0,
    /// The packet is the first fragment, with the ports.
    First = 1,
    /// The packet is a later fragment, without ports.
    Later = 2,
}

/// A parsed frame. It has no implicit padding, because the verifier tracks each byte.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Packet {
    /// The source address and port.
    pub(crate) from: Endpoint,
    /// The destination address and port.
    pub(crate) to: Endpoint,
    /// The identification of a fragmented datagram.
    pub(crate) fragment_id: u32,
    /// The offset of the transport header in the frame.
    pub(crate) transport: u32,
    /// The number of bytes after the TCP or UDP header, or after the IP headers.
    pub(crate) payload: u32,
    /// The kind of the frame.
    pub(crate) kind: Kind,
    /// The IP protocol.
    pub(crate) protocol: Protocol,
    /// The position in the datagram.
    pub(crate) fragment: Fragment,
    /// The flags of TCP.
    pub(crate) flags: u8,
    /// The type of ICMP or ICMPv6.
    pub(crate) icmp_type: u8,
    /// The sender's MAC address in ARP.
    pub(crate) mac: [u8; 6],
    /// Always 0.
    pub(crate) pad: u8,
}

impl Packet {
    /// The value before parsing.
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

/// A TCP segment that was read in place.
pub(crate) struct Segment {
    /// The source address and port.
    pub(crate) from: Endpoint,
    /// The destination address and port.
    pub(crate) to: Endpoint,
    /// The sender's MAC address and two bytes 0, in memory order.
    pub(crate) mac: u64,
    /// The flags of TCP.
    pub(crate) flags: u8,
}

/// Reads a TCP segment in its common form: unfragmented after an IPv4 header without options, or right
/// after an IPv6 header, with all headers in the frame's linear part. Returns `None` for other frames,
/// which [`parse`] handles.
#[inline(always)]
pub(crate) fn segment(ctx: &TcContext) -> Option<Segment> {
    /// The offset of TCP's flags after an IPv4 header.
    const FLAGS: usize = ETHERNET + size_of::<Ipv4>() + 13;
    /// The number of bytes by which an IPv6 header is longer.
    const MORE: usize = size_of::<Ipv6>() - size_of::<Ipv4>();

    let start = read!(ctx.skb.skb, data) as usize;
    let end = read!(ctx.skb.skb, data_end) as usize;
    if start + FLAGS + 1 > end {
        return None;
    }
    // SAFETY: every offset below is even and within the bounds that were just checked.
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

/// Returns the Ethernet header of a frame.
#[inline(always)]
pub(crate) fn ethernet(ctx: &TcContext) -> Option<Ethernet> {
    ctx.load::<Ethernet>(0).ok()
}

/// Parses the frame after its Ethernet header into a packet that is [`Packet::EMPTY`] before.
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

/// Parses ARP. Returns whether it is for IPv4 over Ethernet.
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

/// Parses an IPv4 header. Returns whether it is valid.
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

/// Parses an IPv6 header and its extension headers. Returns whether they are valid.
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

// Protocol numbers of IPv6 extension headers (IANA "Protocol Numbers").
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Returns whether a protocol number is that of an extension header that the parser skips.
#[inline(always)]
fn is_extension(protocol: Protocol) -> bool {
    matches!(
        protocol.0,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
    )
}

/// Skips one extension header (RFC 8200; RFC 4302 for authentication). Returns whether it is valid.
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
            // An atomic fragment, with offset 0 and no more fragments, is whole (RFC 6946).
            if offset & 0xfff8 != 0 {
                packet.fragment = Fragment::Later;
            } else if offset & 1 != 0 {
                packet.fragment = Fragment::First;
            }
        }
        // The length is in units of 4 octets, minus 2.
        AUTHENTICATION => packet.transport += (length + 2) * 4,
        // The length is in units of 8 octets, without the first 8.
        _ => packet.transport += (length + 1) * 8,
    }
    packet.protocol = Protocol(head[0]);
    true
}

/// Parses the transport header: ports, flags and sizes. Returns whether it is valid.
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

/// The protocol UDP-Lite (RFC 3828), which no socket hook sees.
pub(crate) const UDP_LITE: Protocol = Protocol(136);

/// Reads the ports from the first four bytes of a transport header.
#[inline(always)]
fn ports(packet: &mut Packet, head: [u8; 4]) {
    packet.from.port = Port(u16::from_ne_bytes([head[0], head[1]]));
    packet.to.port = Port(u16::from_ne_bytes([head[2], head[3]]));
}

/// A neighbor solicitation or advertisement with its first option (RFC 4861).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Neighbor {
    reserved: [u32; 2],
    target: [u32; 4],
    option: [u8; 8],
}

impl Neighbor {
    /// Returns the target address.
    #[inline(always)]
    pub(crate) fn target(&self) -> Addr {
        Addr::from_words(self.target)
    }

    /// Returns whether the first option is a link-layer address (1 = source, 2 = target) other than `mac`.
    #[inline(always)]
    pub(crate) fn claims_other_than(&self, mac: &[u8; 8]) -> bool {
        let [kind, length, a, b, c, d, e, f] = self.option;
        matches!(kind, 1 | 2)
            && length == 1
            && u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]) != u64::from_ne_bytes(*mac)
    }
}

/// Reads a neighbor solicitation or advertisement; without an option, the option is 0.
#[inline(always)]
pub(crate) fn neighbor(ctx: &TcContext, packet: &Packet) -> Option<Neighbor> {
    let at = packet.transport as usize;
    if let Ok(full) = ctx.load::<Neighbor>(at) {
        return Some(full);
    }
    let bare = ctx.load::<[u32; 6]>(at).ok()?;
    let [a, b, target @ ..] = bare;
    Some(Neighbor {
        reserved: [a, b],
        target,
        option: [0; 8],
    })
}

/// The most TCP options of a SYN that are searched. More fit only if most are padding.
const MAX_OPTIONS: usize = 20;

/// Returns whether a TCP segment carries [`TUNNEL_OPTION`].
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
            // The end of the options, and padding (RFC 9293, 3.1).
            0 => return false,
            1 => at += 1,
            _ if u32::from_ne_bytes(option) == u32::from_ne_bytes(TUNNEL_OPTION) => return true,
            _ if option[1] < 2 => return false,
            _ => at += usize::from(option[1]),
        }
    }
    false
}
