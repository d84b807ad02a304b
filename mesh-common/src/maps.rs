// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Names and capacities of the maps. Names are those of the pins below `/sys/fs/bpf/mesh/v1`.

use crate::addr::{Addr, Endpoint, Port};

/// The layout's version: a directory of pins. Changes when any type of this crate changes its
/// layout.
pub const VERSION: &str = "v1";

/// Pods of one node, enrolled or not (Kubernetes recommends at most 110; large nodes run 500).
pub const MAX_PODS: u32 = 1024;
/// Addresses of pods of this node.
pub const MAX_LOCAL_ADDRS: u32 = 2 * MAX_PODS;
/// Addresses of pods and nodes of the cluster.
pub const MAX_PEERS: u32 = 262_144;
/// Pod CIDRs of the cluster.
pub const MAX_POD_CIDRS: u32 = 16_384;
/// Policy sets in use on this node, old and new ones during a switch.
pub const MAX_POLICY_SETS: u32 = 4 * MAX_PODS;
/// (set, peer identity, direction) triples.
pub const MAX_POLICY_SELECTS: u32 = 1_048_576;
/// (set, direction, CIDR) triples.
pub const MAX_POLICY_CIDRS: u32 = 65_536;
/// (list, protocol, port prefix) triples.
pub const MAX_POLICY_PORTS: u32 = 262_144;
/// Per-port modes.
pub const MAX_PORT_MODES: u32 = 16_384;
/// Service ports, and one marker for each virtual address.
pub const MAX_SERVICES: u32 = 65_536;
/// Backends of all lists.
pub const MAX_BACKENDS: u32 = 262_144;
/// UDP flows of all pods; each pod has at most [`crate::flow::FLOWS_PER_POD`].
pub const MAX_FLOWS: u32 = 262_144;
/// Captured connections whose service the agent has not read yet.
pub const MAX_CAPTURED: u32 = 65_536;
/// Connections that are older than enrolment.
pub const MAX_OLD_CONNECTIONS: u32 = 65_536;
/// In a value of `OLD_CONNECTIONS`: it has ended, and nothing but acknowledgements may follow.
pub const OLD_ENDED: u32 = 1 << 31;
/// Tunnels that are not told by their port.
pub const MAX_TUNNELS: u32 = 65_536;
/// Tunnels whose first packet has come and that are not established yet.
pub const MAX_MARKED: u32 = 65_536;
/// Value of `MARKED`: the gate has seen the SYN. Where it met a connection that had begun before,
/// nothing became of it.
pub const MARK_SEEN: u32 = 1;
/// Value of `MARKED`: the SYN was given to the agent, and the connection is a tunnel.
pub const MARK_STEERED: u32 = 2;
/// Datagrams in fragments.
pub const MAX_FRAGMENTS: u32 = 8_192;
/// Bytes of the event ring: some 10,000 events, which is a third of a second at the rate at which two
/// CPUs do nothing but connect. The agent maps it twice, and has it resident.
pub const EVENT_BYTES: u32 = 2 << 20;

abi! {
    /// Key of the map `CAPTURED`: a captured connection before the agent accepted it. The value is
    /// the [`Endpoint`] of the service that the application asked for.
    pub struct CapturedKey {
        /// The pod's namespace.
        pub netns_cookie: u64,
        /// The destination after translation.
        pub to: Endpoint,
        /// The application's port.
        pub local_port: Port,
        /// Always 0.
        pub pad: u16,
    }

    /// Key of the map `OLD_CONNECTIONS`: a connection that is older than the enrolment, or than
    /// its peer's. The value is a [`crate::Reason`] as `u32`, with [`OLD_ENDED`]. Also of the maps
    /// `TUNNELS`, whose values are 1, and `MARKED`: [`MARK_SEEN`] or [`MARK_STEERED`].
    pub struct ConnectionKey {
        /// The pod's end.
        pub local: Endpoint,
        /// The other end.
        pub remote: Endpoint,
    }

    /// Key of the map `FRAGMENTS`: a datagram in fragments (RFC 791, RFC 8200).
    pub struct FragmentKey {
        /// Source.
        pub from: Addr,
        /// Destination.
        pub to: Addr,
        /// The identification field.
        pub id: u32,
        /// The protocol.
        pub protocol: u32,
    }

    /// Value of the map `FRAGMENTS`.
    pub struct FragmentVerdict {
        /// When the first fragment was decided (CLOCK_MONOTONIC).
        pub time_ns: u64,
        /// 1 = passes.
        pub allowed: u64,
    }

    /// Value of the map `DROP_RATE`, keyed by pod: the bound on gate events.
    pub struct DropRate {
        /// The second the count is about.
        pub second: u64,
        /// Events in it.
        pub count: u64,
    }
}
