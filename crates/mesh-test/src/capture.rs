// SPDX-License-Identifier: Apache-2.0
//! Packet capture on interfaces: frames from a packet socket, searched for marker bytes and counted
//! per flow.
//!
//! Memory is bounded: frames beyond the limit are counted but not kept, and a search that needs
//! them fails instead of giving a wrong result.

pub mod frame;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memchr::memmem::Finder;

use crate::process::Host;
use mesh_sys::testbed;
use mesh_sys::testbed::packet::{PacketSocket, ifindex};

use frame::{Packet, Transport};

/// Limit of the frame bytes that one capture keeps.
const KEPT: usize = 256 << 20;
/// Receive buffer size of the packet socket in bytes.
const SOCKET_BUFFER: i32 = 64 << 20;
/// Size of the largest frame: a GSO packet of 64 KiB with headers; BIG TCP is off.
const FRAME: usize = 128 << 10;
/// Number of frames received between checks for commands.
const BATCH: usize = 1024;
/// Limit of the frames received after a command: enough to include everything sent before it,
/// while endless traffic cannot delay the answer forever.
const DRAIN: usize = 1 << 19;

/// The frames of a namespace to capture.
#[derive(Clone, Debug)]
pub enum Scope {
    /// Both directions of one interface.
    Interface(String),
    /// Ingress of every port of a bridge, which gives each frame on that segment exactly once.
    PortsOf(&'static str),
}

/// Commands to the capturing thread.
const STOP: u8 = b's';
const SNAPSHOT: u8 = b'c';

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    commands: UnixStream,
    answers: Receiver<Captured>,
    thread: Option<JoinHandle<Result<Captured>>>,
}

impl Capture {
    /// Starts a capture; no frame sent after this returns is missed.
    ///
    /// # Errors
    /// The interface does not exist, or a packet socket cannot be opened.
    pub fn start(host: &Host, scope: &Scope) -> Result<Self> {
        let (socket, skip) = host.in_ns(|| open(scope))?;
        let (commands, orders) = UnixStream::pair()?;
        let (sender, answers) = sync_channel(1);
        let thread = spawn(move || run(&socket, skip, orders, &sender));
        Ok(Self {
            commands,
            answers,
            thread: Some(thread),
        })
    }

    /// Returns the frames captured so far; the capture continues.
    ///
    /// # Errors
    /// The socket failed.
    pub fn so_far(&self) -> Result<Captured> {
        (&self.commands)
            .write_all(&[SNAPSHOT])
            .context("the capture has ended")?;
        self.answers.recv().context("the capture has ended")
    }

    /// Ends the capture and returns all captured frames.
    ///
    /// # Errors
    /// The socket failed.
    pub fn stop(mut self) -> Result<Captured> {
        (&self.commands)
            .write_all(&[STOP])
            .context("the capture has ended")?;
        let thread = self.thread.take().context("a capture is stopped once")?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn open(scope: &Scope) -> Result<(PacketSocket, Option<i32>)> {
    let socket = PacketSocket::new().context("cannot open a packet socket")?;
    testbed::set_option(
        &socket,
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        SOCKET_BUFFER,
    )?;
    match scope {
        Scope::Interface(name) => {
            socket.bind_all(ifindex(name).with_context(|| format!("no interface {name}"))?)?;
            Ok((socket, None))
        }
        Scope::PortsOf(bridge) => {
            socket.ignore_outgoing()?;
            // Skip the bridge itself, on which frames from its ports would appear again.
            let skip = ifindex(bridge)?;
            socket.bind_all(0)?;
            Ok((socket, Some(skip)))
        }
    }
}

fn run(
    socket: &PacketSocket,
    skip: Option<i32>,
    mut orders: UnixStream,
    answers: &SyncSender<Captured>,
) -> Result<Captured> {
    let mut captured = Captured::default();
    let mut buffer = vec![0; FRAME];
    let mut command = [0];
    loop {
        let fds = [socket.as_fd(), orders.as_fd()];
        let ready = testbed::poll_any(&fds, Duration::from_secs(3600))?;
        // Check for commands first, then drain, so that every frame before the command is included.
        let order = if ready[1] {
            Some(orders.read(&mut command)?)
        } else {
            None
        };
        let limit = if order.is_some() { DRAIN } else { BATCH };
        for _ in 0..limit {
            let Some(got) = socket.receive(&mut buffer)? else {
                break;
            };
            if Some(got.ifindex) != skip {
                captured.add(&buffer[..got.len]);
            }
        }
        match order {
            None => {}
            Some(1) if command[0] == SNAPSHOT => {
                captured.lost += socket.take_lost()?;
                answers.send(captured.clone())?;
            }
            Some(_stop_or_dropped) => {
                captured.lost += socket.take_lost()?;
                return Ok(captured);
            }
        }
    }
}

/// One direction of a TCP or UDP flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// IP protocol number.
    pub protocol: u8,
    /// Sender.
    pub src: SocketAddr,
    /// Receiver.
    pub dst: SocketAddr,
    /// Number of frames.
    pub packets: u64,
    /// Number of SYNs without ACK.
    pub syns: u64,
    /// Number of SYNs with ACK.
    pub syn_acks: u64,
    /// Number of RSTs.
    pub resets: u64,
    /// Payload bytes, retransmissions included.
    pub payload_bytes: u64,
}

type FlowKey = (u8, SocketAddr, SocketAddr);

/// A place where a marker was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Protocol, sender and receiver; `None` if the frame is neither TCP nor UDP.
    pub flow: Option<FlowKey>,
    /// Index of the frame in which the marker begins, from 0.
    pub frame: usize,
}

/// The frames and flows of a capture.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    frames: Vec<Arc<[u8]>>,
    kept: usize,
    not_kept: u64,
    lost: u32,
    flows: BTreeMap<FlowKey, Flow>,
}

impl Captured {
    fn add(&mut self, bytes: &[u8]) {
        if let Some(packet) = Packet::parse(bytes) {
            self.count(&packet);
        }
        if self.kept + bytes.len() <= KEPT {
            self.kept += bytes.len();
            self.frames.push(Arc::from(bytes));
        } else {
            self.not_kept += 1;
        }
    }

    fn count(&mut self, packet: &Packet<'_>) {
        let Some((src, dst)) = packet.endpoints() else {
            return;
        };
        let protocol = packet.protocol;
        let flow = self.flows.entry((protocol, src, dst)).or_insert(Flow {
            protocol,
            src,
            dst,
            packets: 0,
            syns: 0,
            syn_acks: 0,
            resets: 0,
            payload_bytes: 0,
        });
        flow.packets += 1;
        flow.payload_bytes += packet.payload.len() as u64;
        if let Transport::Tcp { flags, .. } = packet.transport {
            let syn = flags & frame::SYN != 0;
            let ack = flags & frame::ACK != 0;
            flow.syns += u64::from(syn && !ack);
            flow.syn_acks += u64::from(syn && ack);
            flow.resets += u64::from(flags & frame::RST != 0);
        }
    }

    /// Returns all kept frames in order.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(AsRef::as_ref)
    }

    /// Returns the IP packets of all kept frames in order.
    pub fn packets(&self) -> impl Iterator<Item = Packet<'_>> {
        self.frames().filter_map(Packet::parse)
    }

    /// Returns the flows, ordered by protocol and addresses.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.values()
    }

    /// Returns the ports to which TCP connections were opened (a SYN without ACK), ascending.
    #[must_use]
    pub fn tcp_ports(&self) -> Vec<u16> {
        let opened = self.flows.values().filter(|flow| flow.syns > 0);
        let mut ports: Vec<u16> = opened.map(|flow| flow.dst.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Returns the lower port of each TCP flow, ascending. Unlike `tcp_ports` this includes flows
    /// without a SYN.
    #[must_use]
    pub fn tcp_service_ports(&self) -> Vec<u16> {
        let tcp = self
            .flows
            .values()
            .filter(|flow| flow.protocol == frame::TCP);
        let mut ports: Vec<u16> = tcp
            .map(|flow| flow.src.port().min(flow.dst.port()))
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Finds the bytes in any single frame or across consecutive segments of a TCP flow.
    ///
    /// # Errors
    /// The bytes were not found, but frames are missing, so their absence is not proven.
    pub fn find(&self, marker: &[u8]) -> Result<Vec<Hit>> {
        let finder = Finder::new(marker);
        let mut hits = Vec::new();
        let mut streams: BTreeMap<FlowKey, Vec<Segment<'_>>> = BTreeMap::new();
        for (number, bytes) in self.frames().enumerate() {
            let packet = Packet::parse(bytes);
            let flow = packet.as_ref().and_then(|packet| {
                packet
                    .endpoints()
                    .map(|(src, dst)| (packet.protocol, src, dst))
            });
            if finder.find(bytes).is_some() {
                hits.push(Hit {
                    flow,
                    frame: number,
                });
            }
            if let (Some(packet), Some(flow)) = (packet, flow)
                && let Transport::Tcp { seq, .. } = packet.transport
                && !packet.payload.is_empty()
            {
                let segment = Segment {
                    seq,
                    payload: packet.payload,
                    frame: number,
                };
                streams.entry(flow).or_default().push(segment);
            }
        }
        for (flow, segments) in &streams {
            let split = split_hits(segments, &finder, marker.len());
            hits.extend(split.into_iter().map(|frame| Hit {
                flow: Some(*flow),
                frame,
            }));
        }
        if hits.is_empty() {
            self.complete()
                .context("the marker was not found, but the capture is incomplete")?;
        }
        Ok(hits)
    }

    /// Checks that no frame is missing.
    ///
    /// # Errors
    /// The kernel dropped frames, or there were too many to keep.
    pub fn complete(&self) -> Result<()> {
        ensure!(self.lost == 0, "{} frames were lost", self.lost);
        ensure!(self.not_kept == 0, "{} frames were not kept", self.not_kept);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
struct Segment<'a> {
    seq: u32,
    payload: &'a [u8],
    frame: usize,
}

/// Returns the frames in which a marker begins that continues in the next segment.
fn split_hits(segments: &[Segment<'_>], finder: &Finder<'_>, marker: usize) -> Vec<usize> {
    let mut hits = Vec::new();
    let mut by_seq: BTreeMap<u32, Vec<&Segment<'_>>> = BTreeMap::new();
    for segment in segments {
        by_seq.entry(segment.seq).or_default().push(segment);
    }
    let Some(tail) = marker.checked_sub(1).filter(|tail| *tail > 0) else {
        return hits;
    };
    for first in segments {
        // The end of this segment and the beginning of the following ones, as many as a marker can
        // span.
        let start = first.payload.len().saturating_sub(tail);
        let mut window = first.payload[start..].to_vec();
        let own = window.len();
        let mut next = after(first);
        while window.len() < own + tail {
            let Some(follower) = by_seq.get(&next).and_then(|same| same.last()) else {
                break;
            };
            let missing = own + tail - window.len();
            window.extend(follower.payload.iter().take(missing));
            next = after(follower);
        }
        // Neither part alone is long enough for the marker, so any match spans both.
        if finder.find(&window).is_some() {
            hits.push(first.frame);
        }
    }
    hits
}

fn after(segment: &Segment<'_>) -> u32 {
    // A segment is at most 64 KiB (GSO).
    segment
        .seq
        .wrapping_add(u32::try_from(segment.payload.len()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(parts: &[(u32, &[u8])], marker: &[u8]) -> Vec<usize> {
        let segments: Vec<Segment<'_>> = parts
            .iter()
            .enumerate()
            .map(|(frame, (seq, payload))| Segment {
                seq: *seq,
                payload,
                frame,
            })
            .collect();
        split_hits(&segments, &Finder::new(marker), marker.len())
    }

    #[test]
    fn marker_is_found_across_segments() {
        type Parts<'a> = &'a [(u32, &'a [u8])];
        let rows: &[(&str, Parts<'_>, &[usize])] = &[
            ("in two", &[(10, b"xxMAR"), (15, b"KERyy")], &[0]),
            (
                "in three, out of order",
                &[(13, b"RKE"), (16, b"Ryy"), (10, b"xMA")],
                &[2],
            ),
            (
                "byte by byte over the wrap",
                &[
                    (u32::MAX, b"M"),
                    (0, b"A"),
                    (1, b"R"),
                    (2, b"K"),
                    (3, b"E"),
                    (4, b"R"),
                ],
                &[0],
            ),
            (
                "whole: the frame's own search finds it",
                &[(10, b"MARKER"), (16, b"y")],
                &[],
            ),
            ("a gap", &[(10, b"xxMAR"), (16, b"KERyy")], &[]),
            ("not there", &[(10, b"xxMAR"), (15, b"KELyy")], &[]),
        ];
        for (name, parts, expected) in rows {
            assert_eq!(split(parts, b"MARKER"), *expected, "{name}");
        }
    }
}
