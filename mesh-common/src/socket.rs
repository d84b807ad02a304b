// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Values of socket-local storage. A value lives as long as its socket, and no pod can evict another
//! pod's. Every value has spare bytes, because storage outlives an update of the agent.

use crate::addr::Endpoint;

/// The number of service translations that one unconnected UDP socket remembers; a power of two.
pub const VIPS_PER_SOCKET: usize = 8;

abi! {
    /// Value of the storage `EXEMPT`, which marks a socket of the agent. Only a holder of the map's
    /// file descriptor can write it, before connect(). A socket mark, process ID or cgroup would not
    /// do: these can be forged, reused or shared.
    pub struct Exempt {
        /// One of [`Exempt::PLAIN`] and [`Exempt::MARKED`].
        pub exempt: u32,
        /// Always 0.
        pub spare: u32,
    }

    /// Value of the storage `SOCKETS`: the hooks' decision about an application's socket.
    pub struct SocketState {
        /// The [`crate::policy::RuleId`] that allowed the connection; 0 = no rule.
        pub rule: u64,
        /// The [`crate::policy::PolicySetId`] by which the connection was decided.
        pub set: u64,
        /// The time of connect() or of the connection's arrival, in nanoseconds of CLOCK_MONOTONIC.
        pub start_ns: u64,
        /// The service's endpoint, which getpeername() returns; [`Endpoint::NONE`] = no service.
        pub service: Endpoint,
        /// The destination after service translation.
        pub backend: Endpoint,
        /// The [`crate::Direction`] as a number, seen from the pod.
        pub direction: u8,
        /// The code of the [`crate::Reason`] why the connection is plaintext.
        pub plaintext: u8,
        /// The code of the verdict's [`crate::Reason`].
        pub reason: u8,
        /// A set of `SocketState::CAPTURED`, `SocketState::DECIDED` and so on.
        pub flags: u8,
        /// The pod's [`crate::pod::PodIndex`].
        pub pod: u32,
        /// Always 0.
        pub spare: [u64; 4],
    }

    /// A service translation of an unconnected UDP socket.
    pub struct Translation {
        /// The backend that the datagram was sent to.
        pub backend: Endpoint,
        /// The service's endpoint that the application used.
        pub service: Endpoint,
    }

    /// Value of the storage `VIPS`: the service translations of an unconnected UDP socket.
    pub struct Translations {
        /// The last translations, in a ring.
        pub recent: [Translation; VIPS_PER_SOCKET],
        /// The number of translations written so far: modulo the ring's size, the next to overwrite.
        pub next: u32,
        /// Always 0.
        pub spare: u32,
    }
}

impl Exempt {
    /// The value of an agent's socket whose SYN carries no option.
    pub const PLAIN: u32 = 1;
    /// The value of a tunnel to an application's own port: its SYN carries [`TUNNEL_OPTION`].
    pub const MARKED: u32 = 2;
}

/// The TCP option in the SYN of a tunnel to an application's own port: kind 254 (experimental),
/// length 4 and a two-byte experiment identifier (RFC 6994).
pub const TUNNEL_OPTION: [u8; 4] = [254, 4, b'm', b'S'];

impl SocketState {
    /// The connection is routed to the agent, which writes its flow record.
    pub const CAPTURED: u8 = 1 << 0;
    /// A hook decided the connection.
    pub const DECIDED: u8 = 1 << 1;
    /// The TCP handshake completed.
    pub const ESTABLISHED: u8 = 1 << 2;
}
