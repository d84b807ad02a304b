// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Numbers that both sides must agree on.

use crate::Port;

/// Where tunnels are accepted. The number that ambient meshes use for the same purpose.
pub const TUNNEL_PORT: Port = Port::new(15008);

/// The bits of a socket's mark that are the mesh's inside a pod's namespace; the others stay the
/// application's.
pub const MARK_MASK: u32 = 0x00ff_0000;

/// A connection of the application that goes to the agent. Convenience, never a security boundary:
/// a process with CAP_NET_RAW can set it, and the agent then decides again.
pub const MARK_CAPTURE: u32 = 0x004d_0000;

/// The agent's connection to the application on behalf of a remote client.
pub const MARK_INBOUND: u32 = 0x006d_0000;

/// The routing table, in a pod's namespace, of captured connections.
pub const TABLE_CAPTURE: u32 = 19_781;

/// The routing table, in a pod's namespace, of inbound connections.
pub const TABLE_INBOUND: u32 = 19_782;

/// Priority of the mesh's two rules: before the kernel's `main` (32766), after `local` (0).
pub const RULE_PRIORITY: u32 = 9_000;

/// A UDP flow of which only one direction was seen lives this long without a datagram, in
/// nanoseconds (conntrack's `nf_conntrack_udp_timeout`: 30 s).
pub const FLOW_IDLE_NS: u64 = 30_000_000_000;

/// The same once both directions were seen (about conntrack's `udp_timeout_stream`).
pub const FLOW_IDLE_BOTH_NS: u64 = 180_000_000_000;

/// How long the verdict of a first fragment holds for the others: as long as the kernel reassembles
/// (`net.ipv4.ipfrag_time`, 30 s).
pub const FRAGMENT_NS: u64 = 30_000_000_000;
