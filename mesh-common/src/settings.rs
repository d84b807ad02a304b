// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Constants that the kernel programs and user space must agree on.

use crate::Port;

/// The TCP port on which the agent accepts tunnels: the port of HBONE in Istio's ambient mode.
pub const TUNNEL_PORT: Port = Port::new(15008);

/// The bits of a socket mark that the mesh uses in a pod's network namespace. The application keeps
/// the others.
pub const MARK_MASK: u32 = 0x00ff_0000;

/// The mark of an application's connection that is routed to the agent. It is no security boundary: a
/// process with CAP_NET_RAW can set it, and the agent decides the connection again.
pub const MARK_CAPTURE: u32 = 0x004d_0000;

/// The mark of the agent's connection to an application on behalf of a remote client.
pub const MARK_INBOUND: u32 = 0x006d_0000;

/// The routing table of captured connections in a pod's network namespace.
pub const TABLE_CAPTURE: u32 = 19_781;

/// The routing table of inbound connections in a pod's network namespace.
pub const TABLE_INBOUND: u32 = 19_782;

/// The priority of the mesh's two routing rules: after the kernel's `local` (0), before `main`
/// (32766).
pub const RULE_PRIORITY: u32 = 9_000;

/// The idle timeout, in nanoseconds, of a UDP flow with datagrams in one direction only: 30 s, as
/// conntrack's `nf_conntrack_udp_timeout`.
pub const FLOW_IDLE_NS: u64 = 30_000_000_000;

/// The idle timeout, in nanoseconds, of a UDP flow with datagrams in both directions: 180 s, near
/// conntrack's `nf_conntrack_udp_timeout_stream` (120 s).
pub const FLOW_IDLE_BOTH_NS: u64 = 180_000_000_000;

/// The time, in nanoseconds, for which the verdict of a first fragment is valid for the later ones: as
/// long as the kernel reassembles a datagram (`net.ipv4.ipfrag_time`, 30 s).
pub const FRAGMENT_NS: u64 = 30_000_000_000;
