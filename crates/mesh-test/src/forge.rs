// SPDX-License-Identifier: Apache-2.0
//! Forged packets with valid checksums: what an attacker with CAP_NET_RAW can send.
//!
//! This module only builds bytes; the `probe` program sends them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::capture::frame::{ACK, FIN, PSH, RST, SYN, TCP, UDP};

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// IP protocol number of SCTP.
pub const SCTP: u8 = 132;
/// IP protocol number of UDP-Lite.
pub const UDP_LITE: u8 = 136;

const HOPS: u8 = 64;
/// Hop limit that neighbor discovery requires (RFC 4861, section 7.1).
const ND_HOPS: u8 = 255;

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; 6]);
}

impl FromStr for Mac {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let bytes: Result<Vec<u8>, _> = text
            .split(':')
            .map(|part| u8::from_str_radix(part, 16))
            .collect();
        let bytes = bytes.with_context(|| format!("invalid MAC address {text}"))?;
        let six = <[u8; 6]>::try_from(bytes).ok();
        six.map(Self)
            .with_context(|| format!("invalid MAC address {text}"))
    }
}

/// Parses TCP flags, any letters of `FSRPA`.
///
/// # Errors
/// Another letter occurs.
pub fn tcp_flags(letters: &str) -> Result<u8> {
    letters.chars().try_fold(0, |flags, letter| {
        Ok(flags
            | match letter {
                'F' => FIN,
                'S' => SYN,
                'R' => RST,
                'P' => PSH,
                'A' => ACK,
                other => bail!("invalid TCP flag {other}: must be one of FSRPA"),
            })
    })
}

/// Parses an IP protocol, given by name or number.
///
/// # Errors
/// The text is neither a known name nor a number.
pub fn protocol(text: &str) -> Result<u8> {
    Ok(match text {
        "tcp" => TCP,
        "udp" => UDP,
        "icmp" => ICMP,
        "icmpv6" => ICMPV6,
        "sctp" => SCTP,
        "udplite" => UDP_LITE,
        number => number
            .parse()
            .with_context(|| format!("invalid protocol {number}"))?,
    })
}

/// A transport header and its payload.
#[derive(Clone, Debug)]
pub struct Segment {
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flag bits.
    pub flags: u8,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number.
    pub ack: u32,
    /// Payload after the header.
    pub payload: Vec<u8>,
}

/// Computes the Internet checksum (RFC 1071) over parts of even length; the last may be odd.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]));
        }
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(sum & 0xffff).unwrap_or(0)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Computes the checksum of a transport header and payload, with the family's pseudo header.
fn transport_checksum(src: IpAddr, dst: IpAddr, protocol: u8, body: &[u8]) -> Result<u16> {
    let length = u32::try_from(body.len())?.to_be_bytes();
    // IPv4's shorter pseudo header has the same sum.
    let pseudo = [
        octets(src),
        octets(dst),
        length.to_vec(),
        vec![0, 0, 0, protocol],
    ]
    .concat();
    Ok(checksum(&[&pseudo, body]))
}

/// Builds an IP packet from `src` to `dst`, whose ports are used if the protocol has ports.
///
/// # Errors
/// The addresses are of different families, or the packet exceeds the maximum size.
pub fn packet(src: SocketAddr, dst: SocketAddr, segment: &Segment) -> Result<Vec<u8>> {
    let ports = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
    let payload = &segment.payload;
    let (mut body, sum_at) = match segment.protocol {
        TCP => {
            let numbers = [segment.seq.to_be_bytes(), segment.ack.to_be_bytes()].concat();
            // Header length of 5 words; flags; maximum window; checksum; no urgent data.
            let rest = [5 << 4, segment.flags, 0xff, 0xff, 0, 0, 0, 0];
            ([&ports[..], &numbers, &rest, payload].concat(), Some(16))
        }
        // UDP-Lite has the same header; its length field is the checksum coverage.
        UDP | UDP_LITE => {
            let length = u16::try_from(payload.len() + 8)?.to_be_bytes();
            ([&ports[..], &length, &[0, 0], payload].concat(), Some(6))
        }
        // An echo request with the ports as identifier and sequence number.
        ICMP => ([&[8, 0, 0, 0][..], &ports, payload].concat(), None),
        ICMPV6 => ([&[128, 0, 0, 0][..], &ports, payload].concat(), Some(2)),
        SCTP => ([&ports[..], &[0; 8], payload].concat(), None),
        _ => (payload.clone(), None),
    };
    if let Some(at) = sum_at {
        let sum = transport_checksum(src.ip(), dst.ip(), segment.protocol, &body)?;
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    } else if segment.protocol == ICMP {
        let sum = checksum(&[&body]);
        body[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    ip_packet(src.ip(), dst.ip(), (segment.protocol, HOPS), &body)
}

/// Builds an IP packet with any payload.
fn ip_packet(src: IpAddr, dst: IpAddr, (protocol, hops): (u8, u8), body: &[u8]) -> Result<Vec<u8>> {
    let mut header = match (src, dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            let total = u16::try_from(body.len() + 20)?.to_be_bytes();
            vec![
                0x45, 0, total[0], total[1], 0, 0, 0x40, 0, hops, protocol, 0, 0,
            ]
        }
        (IpAddr::V6(_), IpAddr::V6(_)) => {
            let length = u16::try_from(body.len())?.to_be_bytes();
            vec![0x60, 0, 0, 0, length[0], length[1], protocol, hops]
        }
        _ => bail!("{src} and {dst} are of different families"),
    };
    header.extend(octets(src));
    header.extend(octets(dst));
    if src.is_ipv4() {
        let sum = checksum(&[&header]).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
    }
    header.extend_from_slice(body);
    Ok(header)
}

/// Marks an IPv4 packet as a fragment; `offset` is in units of 8 bytes, `more` sets the MF flag.
///
/// # Errors
/// The packet is not IPv4.
pub fn fragment_v4(packet: &mut [u8], offset: u16, more: bool) -> Result<()> {
    if packet.first().is_none_or(|first| first >> 4 != 4) || packet.len() < 20 {
        bail!("not an IPv4 packet: only IPv4 packets can be marked as fragments");
    }
    let field = (offset & 0x1fff) | if more { 0x2000 } else { 0 };
    packet[6..8].copy_from_slice(&field.to_be_bytes());
    packet[10..12].fill(0);
    let sum = checksum(&[&packet[..20]]).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    Ok(())
}

/// Builds an Ethernet frame with an IP packet.
#[must_use]
pub fn ethernet(src: Mac, dst: Mac, packet: &[u8]) -> Vec<u8> {
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let kind: [u8; 2] = if v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
    [&dst.0[..], &src.0, &kind, packet].concat()
}

/// Contents of an ARP packet.
#[derive(Clone, Copy, Debug)]
pub struct ArpClaim {
    /// Operation: 1 is a request, 2 a reply.
    pub operation: u8,
    /// Sender's MAC and IPv4 address.
    pub sender: (Mac, Ipv4Addr),
    /// Target's MAC and IPv4 address.
    pub target: (Mac, Ipv4Addr),
}

/// Builds an Ethernet frame with an ARP packet.
#[must_use]
pub fn arp(src: Mac, dst: Mac, claim: &ArpClaim) -> Vec<u8> {
    // Ethernet and IPv4, and their address lengths.
    let head = [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, claim.operation];
    let ((sender_mac, sender), (target_mac, target)) = (claim.sender, claim.target);
    let (sender, target) = (sender.octets(), target.octets());
    [
        &dst.0[..],
        &src.0,
        &head,
        &sender_mac.0,
        &sender,
        &target_mac.0,
        &target,
    ]
    .concat()
}

/// Builds a neighbor advertisement (RFC 4861, section 4.4), solicited and overriding, as an IPv6
/// packet.
///
/// # Errors
/// Packets of this length never fail.
pub fn advertisement(
    src: Ipv6Addr,
    dst: Ipv6Addr,
    target: Ipv6Addr,
    lladdr: Mac,
) -> Result<Vec<u8>> {
    let option = [&[2, 1][..], &lladdr.0].concat();
    let mut body = [
        &[136, 0, 0, 0, 0x60, 0, 0, 0][..],
        &target.octets(),
        &option,
    ]
    .concat();
    let (src, dst) = (IpAddr::from(src), IpAddr::from(dst));
    let sum = transport_checksum(src, dst, ICMPV6, &body)?;
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    ip_packet(src, dst, (ICMPV6, ND_HOPS), &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::frame::{Packet, Transport};

    #[test]
    fn forged_packet_parses_as_intended() {
        let rows = [
            ("10.0.0.1:1234", "10.0.0.2:80"),
            ("[fd00::1]:1234", "[fd00::2]:80"),
        ];
        for (src, dst) in rows {
            let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
            let payload = b"marker".to_vec();
            let flags = tcp_flags("PA").unwrap();
            let segment = Segment {
                protocol: TCP,
                flags,
                seq: 7,
                ack: 9,
                payload,
            };
            let bytes = packet(src, dst, &segment).unwrap();
            let body = if src.is_ipv4() {
                &bytes[20..]
            } else {
                &bytes[40..]
            };
            assert_eq!(
                transport_checksum(src.ip(), dst.ip(), TCP, body).unwrap(),
                0
            );
            let frame = ethernet(Mac([1; 6]), Mac::BROADCAST, &bytes);
            let parsed = Packet::parse(&frame).unwrap();
            assert_eq!(parsed.endpoints(), Some((src, dst)));
            assert_eq!(parsed.payload, b"marker");
            assert_eq!(
                parsed.transport,
                Transport::Tcp {
                    src: 1234,
                    dst: 80,
                    seq: 7,
                    flags: PSH | ACK
                }
            );
        }
    }
}
