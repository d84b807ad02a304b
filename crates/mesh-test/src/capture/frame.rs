// SPDX-License-Identifier: Apache-2.0
//! A parser for Ethernet frames, as far as captures need it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// TCP FIN flag.
pub const FIN: u8 = 1;
/// TCP SYN flag.
pub const SYN: u8 = 2;
/// TCP RST flag.
pub const RST: u8 = 4;
/// TCP PSH flag.
pub const PSH: u8 = 8;
/// TCP ACK flag.
pub const ACK: u8 = 16;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// The transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
        /// Sequence number of the first payload byte (or of the SYN).
        seq: u32,
        /// The flag bits.
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// Another protocol, a fragment other than the first, or a truncated header.
    Other,
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol number of the innermost header that was parsed.
    pub protocol: u8,
    /// Ports and flags.
    pub transport: Transport,
    /// Bytes after the headers.
    pub payload: &'a [u8],
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl<'a> Packet<'a> {
    /// Parses an Ethernet frame; returns `None` if it is not IP or the IP header is truncated.
    #[must_use]
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        match be16(frame, 12)? {
            IPV4 => Self::v4(ip),
            IPV6 => Self::v6(ip),
            _ => None,
        }
    }

    fn v4(ip: &'a [u8]) -> Option<Self> {
        let header = usize::from(ip.first()? & 15) * 4;
        let src = Ipv4Addr::from(be32(ip, 12)?).into();
        let dst = Ipv4Addr::from(be32(ip, 16)?).into();
        let later_fragment = be16(ip, 6)? & 0x1fff != 0;
        // The IP length is shorter than a padded frame.
        let end = usize::from(be16(ip, 2)?).max(header).min(ip.len());
        let rest = ip.get(header..end)?;
        Some(Self::transport(
            (src, dst),
            *ip.get(9)?,
            rest,
            later_fragment,
        ))
    }

    fn v6(ip: &'a [u8]) -> Option<Self> {
        let src: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
        let dst: [u8; 16] = ip.get(24..40)?.try_into().ok()?;
        let mut next = *ip.get(6)?;
        let end = (40 + usize::from(be16(ip, 4)?)).min(ip.len());
        let mut rest = ip.get(40..end)?;
        let mut later_fragment = false;
        // Hop-by-hop, routing, fragment and destination options headers.
        while matches!(next, 0 | 43 | 44 | 60) {
            let length = if next == 44 {
                8
            } else {
                usize::from(*rest.get(1)?) * 8 + 8
            };
            later_fragment |= next == 44 && be16(rest, 2)? & 0xfff8 != 0;
            next = *rest.first()?;
            rest = rest.get(length..)?;
        }
        let ends = (Ipv6Addr::from(src).into(), Ipv6Addr::from(dst).into());
        Some(Self::transport(ends, next, rest, later_fragment))
    }

    fn transport(
        (src, dst): (IpAddr, IpAddr),
        protocol: u8,
        rest: &'a [u8],
        later_fragment: bool,
    ) -> Self {
        let parsed = match protocol {
            _ if later_fragment => None,
            TCP => Self::tcp(rest),
            UDP => Self::udp(rest),
            _ => None,
        };
        let (transport, payload) = parsed.unwrap_or((Transport::Other, rest));
        Self {
            src,
            dst,
            protocol,
            transport,
            payload,
        }
    }

    fn tcp(rest: &'a [u8]) -> Option<(Transport, &'a [u8])> {
        let (src, dst, seq) = (be16(rest, 0)?, be16(rest, 2)?, be32(rest, 4)?);
        let payload = rest.get(usize::from(*rest.get(12)? >> 4) * 4..)?;
        Some((
            Transport::Tcp {
                src,
                dst,
                seq,
                flags: *rest.get(13)?,
            },
            payload,
        ))
    }

    fn udp(rest: &'a [u8]) -> Option<(Transport, &'a [u8])> {
        let (src, dst) = (be16(rest, 0)?, be16(rest, 2)?);
        Some((Transport::Udp { src, dst }, rest.get(8..)?))
    }

    /// Returns source and destination with ports; `None` if the transport has no ports.
    #[must_use]
    pub fn endpoints(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self.transport {
            Transport::Tcp { src, dst, .. } | Transport::Udp { src, dst } => Some((
                SocketAddr::new(self.src, src),
                SocketAddr::new(self.dst, dst),
            )),
            Transport::Other => None,
        }
    }
}
