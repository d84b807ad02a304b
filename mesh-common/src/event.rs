// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Events that the kernel programs send to the agent through the ring buffer `EVENTS`.

use crate::addr::Endpoint;

/// Values of [`Event::kind`].
pub mod kind {
    /// A plaintext TCP connection of a local pod closed: one event from each local endpoint.
    pub const CLOSED: u8 = 1;
    /// A socket hook denied a connection or datagram.
    pub const DENIED: u8 = 2;
    /// The gate dropped a packet.
    pub const DROPPED: u8 = 3;
    /// Traffic was allowed that policies in audit mode would deny.
    pub const AUDIT: u8 = 4;
}

/// Values of [`Event::closed_by`]: the endpoint that closed the connection first.
pub mod closed_by {
    /// It is not known which endpoint closed first.
    pub const UNKNOWN: u8 = 0;
    /// The local endpoint closed first.
    pub const LOCAL: u8 = 1;
    /// The remote endpoint closed first.
    pub const REMOTE: u8 = 2;
    /// A reset or a socket error closed the connection.
    pub const RESET: u8 = 3;
    /// The connection was never established.
    pub const FAILED: u8 = 4;
}

/// The most denied, dropped and audit events of one pod per second, so that one pod's flood does
/// not hide the events of others. More are counted as
/// [`crate::counter::Counter::SuppressedEvents`].
pub const DROPS_PER_POD_SECOND: u32 = 100;

abi! {
    /// One event. `local` is the pod's endpoint of the traffic, `remote` the peer's.
    pub struct Event {
        /// The time of the event, in nanoseconds of CLOCK_MONOTONIC.
        pub time_ns: u64,
        /// The time at which the connection began, in nanoseconds of CLOCK_MONOTONIC.
        pub start_ns: u64,
        /// The [`crate::policy::RuleId`] that decided; 0 = no rule.
        pub rule: u64,
        /// Application bytes that the pod sent.
        pub sent: u64,
        /// Application bytes that the pod received.
        pub received: u64,
        /// The pod's endpoint.
        pub local: Endpoint,
        /// The peer's endpoint, after service translation.
        pub remote: Endpoint,
        /// The service's endpoint that the application used, or [`Endpoint::NONE`].
        pub service: Endpoint,
        /// The pod's [`crate::pod::PodIndex`].
        pub pod: u32,
        /// The smoothed round-trip time, in microseconds.
        pub rtt_us: u32,
        /// The number of retransmitted segments.
        pub retransmits: u32,
        /// One of [`kind`].
        pub kind: u8,
        /// The [`crate::Direction`] as a number, seen from the pod.
        pub direction: u8,
        /// The IP protocol number.
        pub protocol: u8,
        /// The code of the verdict's [`crate::Reason`].
        pub reason: u8,
        /// The code of the [`crate::Reason`] why the connection is plaintext.
        pub plaintext: u8,
        /// One of [`closed_by`].
        pub closed_by: u8,
        /// Always 0.
        pub spare: u16,
        /// Always 0.
        pub spare_end: u64,
    }
}
