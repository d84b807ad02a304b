// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The UDP flow table, which lets replies to allowed datagrams pass. Each pod has slots of its own,
//! so no pod can evict another pod's flows.

use crate::addr::{Endpoint, Port};
use crate::path::Origin;
use crate::settings::{FLOW_IDLE_BOTH_NS, FLOW_IDLE_NS};
use crate::verdict::Reason;

/// The number of slots of one pod in the map `FLOWS`; a power of two.
pub const FLOWS_PER_POD: u32 = 4096;

/// The number of consecutive slots that a flow can be in: the table is set-associative.
pub const FLOW_WAYS: u32 = 4;

abi! {
    /// Key of the map `FLOWS`.
    pub struct FlowSlot {
        /// The [`crate::pod::PodIndex`].
        pub pod: u32,
        /// The slot of the pod, below [`FLOWS_PER_POD`].
        pub slot: u32,
    }

    /// Identifies a flow of a pod.
    pub struct FlowTuple {
        /// The peer's endpoint.
        pub remote: Endpoint,
        /// The pod's port.
        pub local_port: Port,
        /// 1 = the flow is of the pod's IPv6 address, 0 = of its IPv4 address.
        pub family6: u8,
        /// Always 0.
        pub pad: u8,
    }

    /// Value of the map `FLOWS`.
    pub struct Flow {
        /// The config generation (map `CONFIG_GENERATION`) at which the flow was allowed. At any
        /// other generation the flow is decided again, in the direction in which it was opened.
        pub generation: u64,
        /// The time of the last datagram, in nanoseconds of CLOCK_MONOTONIC.
        pub last_ns: u64,
        /// UDP payload bytes in both directions.
        pub bytes: u64,
        /// The [`crate::policy::RuleId`] that allowed the flow; 0 = no rule.
        pub rule: u64,
        /// The tuple of the flow: all tuples that hash to a slot share it.
        pub tuple: FlowTuple,
        /// A set of `Flow::FROM_POD`, `Flow::TO_POD` and so on.
        pub flags: u32,
        /// The code of the [`Reason`] why the flow is plaintext.
        pub plaintext: u32,
    }
}

impl Flow {
    /// The pod has sent a datagram.
    pub const FROM_POD: u32 = 1 << 0;
    /// The pod has received a datagram.
    pub const TO_POD: u32 = 1 << 1;
    /// The pod opened the flow; without it, the peer did.
    pub const EGRESS: u32 = 1 << 2;
    /// The flow's first datagram had the origin [`Origin::Translated`].
    pub const TRANSLATED: u32 = 1 << 3;
    /// The flow's first datagram had the origin [`Origin::Ungated`].
    pub const UNGATED: u32 = 1 << 4;

    /// Returns the flags of a flow that the peer opened, by the origin of its first datagram.
    #[inline(always)]
    #[must_use]
    pub const fn from_origin(origin: Origin) -> u32 {
        match origin {
            Origin::Address => 0,
            Origin::Translated => Self::TRANSLATED,
            Origin::Ungated => Self::UNGATED,
        }
    }

    /// Returns the origin of the first datagram of a flow with these flags.
    #[inline(always)]
    #[must_use]
    pub const fn origin(flags: u32) -> Origin {
        if flags & Self::TRANSLATED != 0 {
            Origin::Translated
        } else if flags & Self::UNGATED != 0 {
            Origin::Ungated
        } else {
            Origin::Address
        }
    }

    /// Returns whether the flow is not idle for too long at a time of CLOCK_MONOTONIC:
    /// [`FLOW_IDLE_BOTH_NS`] after datagrams in both directions, else [`FLOW_IDLE_NS`].
    #[inline(always)]
    #[must_use]
    pub fn alive(&self, now_ns: u64) -> bool {
        let both = self.flags & (Self::FROM_POD | Self::TO_POD) == (Self::FROM_POD | Self::TO_POD);
        let idle = if both {
            FLOW_IDLE_BOTH_NS
        } else {
            FLOW_IDLE_NS
        };
        now_ns.saturating_sub(self.last_ns) < idle
    }

    /// Returns the reason why the flow is plaintext; [`Reason::Udp`] for a code that is not known.
    #[must_use]
    pub fn plaintext_reason(&self) -> Reason {
        u8::try_from(self.plaintext)
            .ok()
            .and_then(Reason::from_code)
            .unwrap_or(Reason::Udp)
    }
}

impl FlowTuple {
    /// Returns the first slot of the tuple, below [`FLOWS_PER_POD`]. The hash mixes by Fibonacci
    /// hashing (Knuth, TAOCP 3, 6.4). It has no secret: a pod that collides tuples on purpose evicts
    /// only its own flows.
    #[inline(always)]
    #[must_use]
    pub fn slot(&self) -> u32 {
        let [a, b, c, d] = self.remote.addr.words();
        let ports = (self.remote.port.0 as u32) << 16 | self.local_port.0 as u32;
        let mut h = a ^ b.rotate_left(7) ^ c.rotate_left(14) ^ d.rotate_left(21);
        h = (h ^ ports).wrapping_mul(0x9e37_79b1);
        h ^= h >> 15;
        h.wrapping_mul(0x85eb_ca77) >> 20
    }
}
