// SPDX-License-Identifier: Apache-2.0
//! `probe raw`, `frame`, `arp` and `advertise`: forged packets that no ordinary socket sends.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_sys::testbed::packet::{PacketSocket, ifindex};
use mesh_test::forge::{self, ArpClaim, Mac, Segment};
use serde_json::json;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::say;

/// A packet, and how often to send it.
#[derive(clap::Args)]
pub(crate) struct PacketArgs {
    /// Source address and port
    #[arg(long)]
    src: SocketAddr,
    /// Destination address and port
    #[arg(long)]
    dst: SocketAddr,
    /// tcp, udp, icmp, icmpv6, sctp, udplite or a number
    #[arg(long, default_value = "tcp", value_parser = forge::protocol)]
    proto: u8,
    /// TCP flags, any of FSRPA
    #[arg(long, default_value = "S", value_parser = forge::tcp_flags)]
    flags: u8,
    /// TCP sequence number
    #[arg(long, default_value_t = 1)]
    seq: u32,
    /// TCP acknowledgement number
    #[arg(long, default_value_t = 0)]
    ack: u32,
    /// Payload
    #[arg(long, default_value = "")]
    payload: String,
    /// IPv4: mark as a fragment at this offset (in units of 8 bytes)
    #[arg(long)]
    fragment: Option<u16>,
    /// IPv4: more fragments follow
    #[arg(long)]
    more_fragments: bool,
    #[command(flatten)]
    repeat: Repeat,
}

#[derive(clap::Args)]
struct Repeat {
    /// Number of packets
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Pause between packets in milliseconds
    #[arg(long, default_value_t = 0)]
    interval_ms: u64,
}

impl Repeat {
    /// Sends the packets and reports the number sent and the first error.
    fn send(&self, send: impl Fn() -> std::io::Result<()>) -> Result<bool> {
        let (mut sent, mut error) = (0, None);
        for number in 0..self.count {
            if number > 0 {
                std::thread::sleep(Duration::from_millis(self.interval_ms));
            }
            match send() {
                Ok(()) => sent += 1,
                Err(e) => error = error.or(Some(e.to_string())),
            }
        }
        say(&json!({"sent": sent, "error": error}))?;
        Ok(sent == self.count)
    }
}

impl PacketArgs {
    fn build(&self) -> Result<Vec<u8>> {
        let segment = Segment {
            protocol: self.proto,
            flags: self.flags,
            seq: self.seq,
            ack: self.ack,
            payload: self.payload.clone().into_bytes(),
        };
        let mut packet = forge::packet(self.src, self.dst, &segment)?;
        if self.fragment.is_some() || self.more_fragments {
            forge::fragment_v4(&mut packet, self.fragment.unwrap_or(0), self.more_fragments)?;
        }
        Ok(packet)
    }
}

#[derive(clap::Args)]
pub(crate) struct RawArgs {
    #[command(flatten)]
    packet: PacketArgs,
    /// SO_BINDTODEVICE
    #[arg(long)]
    device: Option<String>,
    /// SO_MARK
    #[arg(long, value_parser = crate::args::parse_number)]
    mark: Option<u32>,
}

pub(crate) fn raw(args: &RawArgs) -> Result<bool> {
    let packet = args.packet.build()?;
    let domain = Domain::for_address(args.packet.dst);
    // IPPROTO_RAW: the packet brings its own IP header, in both families.
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
    let socket = socket.context("raw socket")?;
    if let Some(device) = &args.device {
        socket
            .bind_device(Some(device.as_bytes()))
            .context("SO_BINDTODEVICE")?;
    }
    if let Some(mark) = args.mark {
        socket.set_mark(mark).context("SO_MARK")?;
    }
    // IPv6 raw sockets reject a destination port.
    let to = SockAddr::from(SocketAddr::new(args.packet.dst.ip(), 0));
    args.packet
        .repeat
        .send(|| socket.send_to(&packet, &to).map(drop))
}

/// The interface and the Ethernet addresses of frames.
#[derive(clap::Args)]
struct LinkArgs {
    /// Interface to send through
    #[arg(long, default_value = "eth0")]
    device: String,
    /// Ethernet source
    #[arg(long)]
    src_mac: Mac,
    /// Ethernet destination
    #[arg(long, default_value = "ff:ff:ff:ff:ff:ff")]
    dst_mac: Mac,
    /// Set PACKET_QDISC_BYPASS, which skips every egress classifier of the interface
    #[arg(long)]
    bypass: bool,
}

impl LinkArgs {
    fn send(&self, frame: &[u8], repeat: &Repeat) -> Result<bool> {
        let socket = PacketSocket::new().context("packet socket")?;
        let index = ifindex(&self.device).with_context(|| self.device.clone())?;
        if self.bypass {
            socket.bypass_qdisc().context("PACKET_QDISC_BYPASS")?;
        }
        repeat.send(|| socket.send(index, frame))
    }
}

#[derive(clap::Args)]
pub(crate) struct FrameArgs {
    #[command(flatten)]
    packet: PacketArgs,
    #[command(flatten)]
    link: LinkArgs,
}

pub(crate) fn frame(args: &FrameArgs) -> Result<bool> {
    let packet = args.packet.build()?;
    let frame = forge::ethernet(args.link.src_mac, args.link.dst_mac, &packet);
    args.link.send(&frame, &args.packet.repeat)
}

#[derive(clap::Args)]
pub(crate) struct ArpArgs {
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    repeat: Repeat,
    /// Send a reply instead of a request
    #[arg(long)]
    reply: bool,
    /// Sender's hardware address in the packet (default: the Ethernet source)
    #[arg(long)]
    sender_mac: Option<Mac>,
    /// Sender's address
    #[arg(long)]
    sender_ip: Ipv4Addr,
    /// Target's hardware address in the packet (default: the Ethernet destination)
    #[arg(long)]
    target_mac: Option<Mac>,
    /// Target's address
    #[arg(long)]
    target_ip: Ipv4Addr,
}

pub(crate) fn arp(args: &ArpArgs) -> Result<bool> {
    let (src, dst) = (args.link.src_mac, args.link.dst_mac);
    let claim = ArpClaim {
        operation: if args.reply { 2 } else { 1 },
        sender: (args.sender_mac.unwrap_or(src), args.sender_ip),
        target: (args.target_mac.unwrap_or(dst), args.target_ip),
    };
    args.link.send(&forge::arp(src, dst, &claim), &args.repeat)
}

#[derive(clap::Args)]
pub(crate) struct AdvertiseArgs {
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    repeat: Repeat,
    /// IPv6 source
    #[arg(long)]
    src: Ipv6Addr,
    /// IPv6 destination
    #[arg(long, default_value = "ff02::1")]
    dst: Ipv6Addr,
    /// Address whose hardware address is advertised
    #[arg(long)]
    target: Ipv6Addr,
    /// Advertised hardware address (default: the Ethernet source)
    #[arg(long)]
    lladdr: Option<Mac>,
}

pub(crate) fn advertise(args: &AdvertiseArgs) -> Result<bool> {
    let lladdr = args.lladdr.unwrap_or(args.link.src_mac);
    let packet = forge::advertisement(args.src, args.dst, args.target, lladdr)?;
    let frame = forge::ethernet(args.link.src_mac, args.link.dst_mac, &packet);
    args.link.send(&frame, &args.repeat)
}
