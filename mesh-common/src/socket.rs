// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! What is kept with a socket (socket-local storage): it dies with the socket and no pod can evict
//! another's. Every value has spare bytes, because storage outlives an agent's update.

use crate::addr::Endpoint;

/// Backends remembered by one unconnected UDP socket.
pub const VIPS_PER_SOCKET: usize = 8;

abi! {
    /// Value of the storage `EXEMPT`: a socket of the agent. Only who holds the map's descriptor
    /// can write it, before connect(); never a mark, a pid or a cgroup, which can be forged, reused
    /// or shared.
    pub struct Exempt {
        /// [`Exempt::PLAIN`] or [`Exempt::MARKED`].
        pub exempt: u32,
        /// Always 0.
        pub spare: u32,
    }

    /// Value of the storage `SOCKETS`: what the hooks decided about an application's socket.
    pub struct SocketState {
        /// The rule that allowed it.
        pub rule: u64,
        /// The policy set under which it was decided.
        pub set: u64,
        /// When connect() was called or the connection arrived (CLOCK_MONOTONIC).
        pub start_ns: u64,
        /// The service's endpoint, for getpeername; [`Endpoint::NONE`] = no service.
        pub service: Endpoint,
        /// The backend behind it.
        pub backend: Endpoint,
        /// A [`crate::Direction`] as its number.
        pub direction: u8,
        /// A [`crate::Reason`]: why it is in clear.
        pub clear: u8,
        /// A [`crate::Reason`]: of the verdict.
        pub reason: u8,
        /// `SocketState::CAPTURED` and so on.
        pub flags: u8,
        /// The pod's index.
        pub pod: u32,
        /// Always 0.
        pub spare: [u64; 4],
    }

    /// One backend of an unconnected UDP socket, and the address the application used.
    pub struct Translation {
        /// What the datagram was sent to.
        pub backend: Endpoint,
        /// What the application asked for.
        pub service: Endpoint,
    }

    /// Value of the storage `VIPS`, of unconnected UDP sockets.
    pub struct Translations {
        /// The last translations; the oldest is overwritten.
        pub recent: [Translation; VIPS_PER_SOCKET],
        /// The next to overwrite.
        pub next: u32,
        /// Always 0.
        pub spare: u32,
    }
}

impl Exempt {
    /// Any socket of the agent.
    pub const PLAIN: u32 = 1;
    /// A tunnel towards an application's own port: its SYN carries [`TUNNEL_OPTION`].
    pub const MARKED: u32 = 2;
}

/// The TCP option of a tunnel's SYN: experimental, with an identifier of two bytes (RFC 6994).
pub const TUNNEL_OPTION: [u8; 4] = [254, 4, b'm', b'S'];

impl SocketState {
    /// Goes to the agent, which makes the connection's record.
    pub const CAPTURED: u8 = 1 << 0;
    /// The hook has decided this socket.
    pub const DECIDED: u8 = 1 << 1;
    /// The handshake was completed.
    pub const ESTABLISHED: u8 = 1 << 2;
}
