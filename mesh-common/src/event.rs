// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! What the kernel programs report to the agent, through the ring buffer `EVENTS`.

use crate::addr::Endpoint;

/// What an [`Event`] tells.
pub mod kind {
    /// A connection of a local pod's socket ended: one per end.
    pub const CLOSED: u8 = 1;
    /// A hook refused a connection or datagram.
    pub const DENIED: u8 = 2;
    /// The gate dropped a packet. At most [`super::DROPS_PER_POD_SECOND`] a second for each pod.
    pub const DROPPED: u8 = 3;
    /// A connection that audit policies would have refused.
    pub const AUDIT: u8 = 4;
}

/// Who closed a connection first.
pub mod closed_by {
    /// Not known.
    pub const UNKNOWN: u8 = 0;
    /// This end.
    pub const LOCAL: u8 = 1;
    /// The other end.
    pub const REMOTE: u8 = 2;
    /// A reset or an error.
    pub const RESET: u8 = 3;
    /// The connection was never established.
    pub const FAILED: u8 = 4;
}

/// The bound on gate events of one pod, so that a flood in one does not hide another's.
pub const DROPS_PER_POD_SECOND: u32 = 100;

abi! {
    /// One event. Endpoints are seen from the pod.
    pub struct Event {
        /// CLOCK_MONOTONIC.
        pub time_ns: u64,
        /// When the connection began.
        pub start_ns: u64,
        /// The deciding rule.
        pub rule: u64,
        /// Application bytes sent.
        pub sent: u64,
        /// Application bytes received.
        pub received: u64,
        /// The pod's end.
        pub local: Endpoint,
        /// The other end, after translation.
        pub remote: Endpoint,
        /// The service's endpoint that the application used, or none.
        pub service: Endpoint,
        /// The pod's index.
        pub pod: u32,
        /// Smoothed round-trip time, microseconds.
        pub rtt_us: u32,
        /// Segments sent again.
        pub retransmits: u32,
        /// See [`kind`].
        pub kind: u8,
        /// A [`crate::Direction`] as its number.
        pub direction: u8,
        /// The IP protocol.
        pub protocol: u8,
        /// A [`crate::Reason`]: of the verdict.
        pub reason: u8,
        /// A [`crate::Reason`]: why it is in clear.
        pub clear: u8,
        /// See [`closed_by`].
        pub closed_by: u8,
        /// Always 0.
        pub spare: u16,
        /// Always 0.
        pub spare_end: u64,
    }
}
