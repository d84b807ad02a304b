// SPDX-License-Identifier: Apache-2.0
//! Command-line value types, and sockets with the client options.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// `IPPROTO_MPTCP` of `linux/in.h`.
const MPTCP: i32 = 262;

/// A range of ports, `A-B` or `A`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) first: u16,
    pub(crate) last: u16,
}

impl FromStr for Ports {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (first.parse()?, last.parse()?);
        if first > last {
            bail!("invalid port range {text}: must be A-B or A");
        }
        Ok(Self { first, last })
    }
}

impl Ports {
    pub(crate) fn pick(self, random: &mut Random) -> u16 {
        let count = u32::from(self.last - self.first) + 1;
        let offset = random.below(count);
        self.first + u16::try_from(offset).unwrap_or(0)
    }
}

/// A network, `ADDRESS/LENGTH`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Net {
    address: IpAddr,
    length: u32,
}

impl FromStr for Net {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let (address, length) = text.split_once('/').context("must be ADDRESS/LENGTH")?;
        let (address, length): (IpAddr, u32) = (address.parse()?, length.parse()?);
        let most = if address.is_ipv4() { 32 } else { 128 };
        if length > most {
            bail!("invalid network {text}: must be ADDRESS/LENGTH");
        }
        Ok(Self { address, length })
    }
}

impl Net {
    pub(crate) fn pick(self, random: &mut Random) -> IpAddr {
        match self.address {
            IpAddr::V4(address) => {
                let host = u32::MAX.checked_shr(self.length).unwrap_or(0);
                let bits = u32::try_from(random.next() >> 32).unwrap_or(0);
                Ipv4Addr::from((u32::from(address) & !host) | (bits & host)).into()
            }
            IpAddr::V6(address) => {
                let host = u128::MAX.checked_shr(self.length).unwrap_or(0);
                let bits = (u128::from(random.next()) << 64) | u128::from(random.next());
                Ipv6Addr::from((u128::from(address) & !host) | (bits & host)).into()
            }
        }
    }
}

/// The SplitMix64 generator of reproducible pseudo-random numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        let high = (u128::from(self.next()) * u128::from(bound)) >> 64;
        u32::try_from(high).unwrap_or(0)
    }
}

/// Options of one client socket.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SocketArgs {
    /// Bind to this address first
    #[arg(long)]
    pub(crate) from: Option<SocketAddr>,
    /// SO_BINDTODEVICE
    #[arg(long)]
    pub(crate) device: Option<String>,
    /// SO_MARK
    #[arg(long, value_parser = parse_number)]
    pub(crate) mark: Option<u32>,
    /// Reach an IPv4 destination through an IPv6 socket (::ffff:a.b.c.d)
    #[arg(long)]
    pub(crate) mapped: bool,
    /// Milliseconds without progress after which the attempt fails
    #[arg(long, default_value_t = 5000)]
    pub(crate) timeout_ms: u64,
}

/// Parses a decimal number, or a hexadecimal one with the prefix 0x.
pub(crate) fn parse_number(text: &str) -> Result<u32> {
    Ok(match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16)?,
        None => text.parse()?,
    })
}

impl SocketArgs {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Returns the address to pass to the socket: IPv4-mapped if the options ask for it.
    pub(crate) fn destination(&self, to: SocketAddr) -> SocketAddr {
        match to {
            SocketAddr::V4(v4) if self.mapped => {
                SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
            }
            SocketAddr::V4(_) | SocketAddr::V6(_) => to,
        }
    }

    /// Creates an unconnected TCP socket for the address family of `to`.
    pub(crate) fn tcp(&self, to: SocketAddr, mptcp: bool) -> Result<Socket> {
        let protocol = if mptcp {
            Protocol::from(MPTCP)
        } else {
            Protocol::TCP
        };
        self.socket(to, Type::STREAM, protocol)
    }

    /// Creates an unconnected UDP socket for the address family of `to`.
    pub(crate) fn udp(&self, to: SocketAddr) -> Result<Socket> {
        self.socket(to, Type::DGRAM, Protocol::UDP)
    }

    fn socket(&self, to: SocketAddr, kind: Type, protocol: Protocol) -> Result<Socket> {
        let domain = Domain::for_address(self.destination(to));
        let socket = Socket::new(domain, kind, Some(protocol)).context("socket")?;
        socket.set_read_timeout(Some(self.timeout()))?;
        // The send timeout also bounds a blocking connect().
        socket.set_write_timeout(Some(self.timeout()))?;
        if let Some(device) = &self.device {
            socket
                .bind_device(Some(device.as_bytes()))
                .context("SO_BINDTODEVICE")?;
        }
        if let Some(mark) = self.mark {
            socket.set_mark(mark).context("SO_MARK")?;
        }
        if let Some(from) = self.from {
            socket.set_reuse_address(true)?;
            let from = SockAddr::from(self.destination(from));
            socket.bind(&from).context("bind")?;
        }
        Ok(socket)
    }
}

/// Returns the quantile `part` (0 to 1) of the sorted values, or 0 if there are none.
pub(crate) fn percentile(sorted: &[u64], part: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index between 0 and the length"
    )]
    let index = (sorted.len() as f64 * part) as usize;
    sorted
        .get(index.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0)
}
