// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Addresses, ports and protocols in the layout of map keys and values. One address type serves
//! both families, and the types hold network byte order.

use core::cmp::Ordering;
use core::hash::{Hash, Hasher};

/// The third word of an IPv4-mapped IPv6 address `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// An IPv4 or IPv6 address in 16 bytes; IPv4 addresses are IPv4-mapped. The words hold the octets in
/// network order, as kernel contexts do. `::` stands for "no address".
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(
    feature = "user",
    derive(
        zerocopy::FromBytes,
        zerocopy::IntoBytes,
        zerocopy::Immutable,
        zerocopy::KnownLayout
    )
)]
pub struct Addr([u32; 4]);

// SAFETY: a transparent array of integers has no padding and any bit pattern is valid.
#[cfg(feature = "user")]
#[allow(unsafe_code, reason = "aya's marker for map keys and values")]
unsafe impl aya::Pod for Addr {}

impl Addr {
    /// The value that stands for "no address": `::`.
    pub const NONE: Self = Self([0; 4]);

    /// Makes an IPv4 address from a kernel context's word, in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Makes an address from a kernel context's four words, in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// Returns the four words, in network order.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// Returns the word of an IPv4 address in network order, or `None` for an IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn v4_word(&self) -> Option<u32> {
        if self.is_v4() { Some(self.0[3]) } else { None }
    }

    /// Returns whether this is an IPv4 address, in its mapped form.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        (self.0[0] | self.0[1]) == 0 && self.0[2] == MAPPED
    }

    /// Returns whether this is `::`, which stands for "no address".
    #[inline(always)]
    #[must_use]
    pub const fn is_none(&self) -> bool {
        (self.0[0] | self.0[1] | self.0[2] | self.0[3]) == 0
    }

    /// Returns whether this is `0.0.0.0` or `::`. As a destination, the kernel takes it for the host
    /// itself.
    #[inline(always)]
    #[must_use]
    pub const fn is_unspecified(&self) -> bool {
        (self.0[0] | self.0[1] | self.0[3]) == 0 && (self.0[2] == 0 || self.0[2] == MAPPED)
    }

    /// Returns whether this is in `127.0.0.0/8` or is `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.0[3].to_ne_bytes()[0] == 127
        } else {
            (self.0[0] | self.0[1] | self.0[2]) == 0 && self.0[3] == 1u32.to_be()
        }
    }

    /// Returns whether this is in `fe80::/10` (RFC 4291). IPv4's `169.254.0.0/16` is not included:
    /// cloud metadata services use it.
    #[inline(always)]
    #[must_use]
    pub const fn is_v6_link_local(&self) -> bool {
        let first = self.0[0].to_ne_bytes();
        first[0] == 0xfe && first[1] & 0xc0 == 0x80
    }

    /// Returns whether this is in `224.0.0.0/4`, is `255.255.255.255` or is in `ff00::/8`.
    #[inline(always)]
    #[must_use]
    pub const fn is_multicast_or_broadcast(&self) -> bool {
        if self.is_v4() {
            let first = self.0[3].to_ne_bytes()[0];
            first & 0xf0 == 0xe0 || self.0[3] == u32::MAX
        } else {
            self.0[0].to_ne_bytes()[0] == 0xff
        }
    }

    /// Returns the 16 octets, in network order.
    #[inline(always)]
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let (a, b, c, d) = (
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Makes an address from its 16 octets, in network order.
    #[must_use]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }
}

// Written by hand: the derived comparison of an array becomes a call of memcmp, which costs a
// kernel program more than four comparisons.
impl PartialEq for Addr {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        self.0[0] == other.0[0]
            && self.0[1] == other.0[1]
            && self.0[2] == other.0[2]
            && self.0[3] == other.0[3]
    }
}

impl Eq for Addr {}

impl PartialOrd for Addr {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Addr {
    fn cmp(&self, other: &Self) -> Ordering {
        self.octets().cmp(&other.octets())
    }
}

impl Hash for Addr {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

#[cfg(feature = "user")]
impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::from_octets(v4.to_ipv6_mapped().octets()),
            core::net::IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

#[cfg(feature = "user")]
impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> Self {
        core::net::Ipv6Addr::from(addr.octets()).to_canonical()
    }
}

#[cfg(feature = "user")]
impl core::fmt::Display for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::net::IpAddr::from(*self).fmt(f)
    }
}

abi_id! {
    /// A TCP, UDP or SCTP port. The inner number is in network order, so that a longest-prefix match
    /// selects a range of ports; [`Port::new`] and [`Port::get`] use host order.
    pub struct Port(pub u16);

    /// An IP protocol number (IANA "Protocol Numbers"). In a policy key, 0 stands for all protocols
    /// without ports.
    pub struct Protocol(pub u8);
}

impl Port {
    /// Makes a port from its number, in host order.
    #[inline(always)]
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number.to_be())
    }

    /// Returns the port's number, in host order.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl Protocol {
    /// Any protocol without ports that the mesh understands.
    pub const OTHER: Self = Self(0);
    /// The Internet Control Message Protocol, 1.
    pub const ICMP: Self = Self(1);
    /// The Transmission Control Protocol, 6.
    pub const TCP: Self = Self(6);
    /// The User Datagram Protocol, 17.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6, 58.
    pub const ICMPV6: Self = Self(58);
    /// The Stream Control Transmission Protocol, 132.
    pub const SCTP: Self = Self(132);

    /// Returns the protocol of this protocol's policy keys: itself if it has ports, else `OTHER`.
    #[inline(always)]
    #[must_use]
    pub const fn policy_key(self) -> Self {
        match self.0 {
            6 | 17 | 132 => self,
            _ => Self::OTHER,
        }
    }
}

abi! {
    /// An address and a port.
    pub struct Endpoint {
        /// The IPv4 or IPv6 address.
        pub addr: Addr,
        /// The port; 0 where the protocol has none or it is not known.
        pub port: Port,
        /// Always 0. Explicit, because implicit padding makes map look-ups miss.
        pub pad: u16,
    }
}

impl Endpoint {
    /// Makes an endpoint from an address and a port.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: Addr, port: Port) -> Self {
        Self { addr, port, pad: 0 }
    }

    /// The value that stands for "no endpoint": [`Addr::NONE`] with port 0.
    pub const NONE: Self = Self::new(Addr::NONE, Port(0));
}

#[cfg(feature = "user")]
impl From<core::net::SocketAddr> for Endpoint {
    fn from(at: core::net::SocketAddr) -> Self {
        Self::new(at.ip().into(), Port::new(at.port()))
    }
}

#[cfg(feature = "user")]
impl From<Endpoint> for core::net::SocketAddr {
    fn from(at: Endpoint) -> Self {
        Self::new(at.addr.into(), at.port.get())
    }
}

#[cfg(feature = "user")]
impl core::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::net::SocketAddr::from(*self).fmt(f)
    }
}

#[cfg(feature = "user")]
#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn addresses_of_both_families_round_trip() {
        for text in ["10.1.2.3", "::1", "fd00:7::10", "0.0.0.0"] {
            assert_eq!(IpAddr::from(addr(text)).to_string(), text);
        }
        assert_eq!(addr("::ffff:10.1.2.3"), addr("10.1.2.3"));
    }

    #[test]
    fn addresses_are_classified() {
        assert!(addr("127.9.9.9").is_loopback() && addr("::1").is_loopback());
        assert!(!addr("126.0.0.1").is_loopback() && !addr("::2").is_loopback());
        assert!(addr("fe80::1").is_v6_link_local() && addr("febf::1").is_v6_link_local());
        assert!(!addr("fec0::1").is_v6_link_local() && !addr("169.254.0.1").is_v6_link_local());
        assert!(addr("224.0.0.251").is_multicast_or_broadcast());
        assert!(addr("255.255.255.255").is_multicast_or_broadcast());
        assert!(addr("ff02::1").is_multicast_or_broadcast());
        assert!(!addr("223.0.0.1").is_multicast_or_broadcast());
        assert!(addr("0.0.0.0").is_unspecified() && addr("::").is_unspecified());
        assert!(!addr("0.0.0.1").is_unspecified());
    }

    #[test]
    fn addresses_sort_by_octets() {
        assert!(addr("10.0.0.2") < addr("10.0.1.0"));
        assert!(addr("fd00::1") < addr("fd00::100"));
    }

    #[test]
    fn ports_are_stored_in_network_order() {
        assert_eq!(Port::new(0x1234).0.to_ne_bytes(), [0x12, 0x34]);
        assert_eq!(Port::new(15008).get(), 15008);
    }
}
