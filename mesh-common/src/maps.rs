// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Capacities of the maps, and the keys and values of those without a module of their own. A map's
//! name is also the name of its pin below `/sys/fs/bpf/mesh/v1`.

use crate::addr::{Addr, Endpoint, Port};

/// The version of the map layouts: the name of the directory of the pins. It changes when any type of
/// this crate changes its layout.
pub const VERSION: &str = "v1";

/// The most managed pods of one node, enrolled or not. Kubernetes recommends at most 110 pods per
/// node; large nodes run 500.
pub const MAX_PODS: u32 = 1024;
/// The most addresses of managed pods of one node: two for each pod.
pub const MAX_LOCAL_ADDRS: u32 = 2 * MAX_PODS;
/// The most addresses of pods and nodes of the cluster.
pub const MAX_PEERS: u32 = 262_144;
/// The most pod CIDRs of the cluster.
pub const MAX_POD_CIDRS: u32 = 16_384;
/// The most policy sets of one node, old and new ones during an update.
pub const MAX_POLICY_SETS: u32 = 4 * MAX_PODS;
/// The most (policy set, peer identity, direction) triples of one node.
pub const MAX_POLICY_SELECTS: u32 = 1_048_576;
/// The most (policy set, direction, CIDR) triples of one node.
pub const MAX_POLICY_CIDRS: u32 = 65_536;
/// The most (rule list, protocol, port prefix) triples of one node.
pub const MAX_POLICY_PORTS: u32 = 262_144;
/// The most ports of one node with a mode of their own.
pub const MAX_PORT_MODES: u32 = 16_384;
/// The most service ports of the cluster, with one marker for each virtual address.
pub const MAX_SERVICES: u32 = 65_536;
/// The most backends of all services.
pub const MAX_BACKENDS: u32 = 262_144;
/// The most UDP flows of one node; each pod has at most [`crate::flow::FLOWS_PER_POD`].
pub const MAX_FLOWS: u32 = 262_144;
/// The most captured connections that the agent has not accepted yet.
pub const MAX_CAPTURED: u32 = 65_536;
/// The most plaintext connections of one node that are older than an enrollment.
pub const MAX_OLD_CONNECTIONS: u32 = 65_536;
/// The flag of a closed connection in a value of `OLD_CONNECTIONS`: only segments without payload may
/// follow.
pub const OLD_ENDED: u32 = 1 << 31;
/// The most open tunnels of one node to or from applications' own ports.
pub const MAX_TUNNELS: u32 = 65_536;
/// The most incoming tunnels to applications' own ports that are not established yet.
pub const MAX_MARKED: u32 = 65_536;
/// The value of `MARKED` once the gate saw the marked SYN. It stays so if the SYN belongs to a
/// connection that already exists.
pub const MARK_SEEN: u32 = 1;
/// The value of `MARKED` once sk_lookup gave the SYN to the agent: the connection is a tunnel.
pub const MARK_STEERED: u32 = 2;
/// The most fragmented datagrams that are tracked at the same time.
pub const MAX_FRAGMENTS: u32 = 8_192;
/// The size of the event ring buffer in bytes: about 10,000 events, a third of a second of events of
/// two CPUs that only open connections. The memory is resident, and the agent maps it twice.
pub const EVENT_BYTES: u32 = 2 << 20;

abi! {
    /// Key of the map `CAPTURED`: a captured connection that the agent has not accepted yet. The value
    /// is the [`Endpoint`] of the service that the application used.
    pub struct CapturedKey {
        /// The cookie of the pod's network namespace.
        pub netns_cookie: u64,
        /// The destination after service translation.
        pub to: Endpoint,
        /// The application's port.
        pub local_port: Port,
        /// Always 0.
        pub pad: u16,
    }

    /// Key of three maps of TCP connections. `OLD_CONNECTIONS` has plaintext connections that are older
    /// than the enrollment of the pod or its peer; a value is the code of a [`crate::Reason`], with the
    /// flag [`OLD_ENDED`]. `TUNNELS` has open tunnels; values are 1.
    /// `MARKED` has incoming tunnels before they are established; a value is [`MARK_SEEN`] or
    /// [`MARK_STEERED`].
    pub struct ConnectionKey {
        /// The pod's endpoint.
        pub local: Endpoint,
        /// The peer's endpoint.
        pub remote: Endpoint,
    }

    /// Key of the map `FRAGMENTS`: a fragmented datagram (RFC 791, RFC 8200).
    pub struct FragmentKey {
        /// The source address.
        pub from: Addr,
        /// The destination address.
        pub to: Addr,
        /// The identification field of the IPv4 header or of the IPv6 fragment header.
        pub id: u32,
        /// The IP protocol number.
        pub protocol: u32,
    }

    /// Value of the map `FRAGMENTS`: the verdict of a datagram's first fragment.
    pub struct FragmentVerdict {
        /// The time of the verdict, in nanoseconds of CLOCK_MONOTONIC.
        pub time_ns: u64,
        /// 1 = the fragments pass.
        pub allowed: u64,
    }

    /// Value of the map `DROP_RATE`, keyed by [`crate::pod::PodIndex`]: the state of the rate limit of a
    /// pod's events.
    pub struct DropRate {
        /// The second of CLOCK_MONOTONIC that `count` is about.
        pub second: u64,
        /// The number of events in that second, sent or suppressed.
        pub count: u64,
    }
}
