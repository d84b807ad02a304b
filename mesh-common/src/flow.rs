// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! UDP flows: replies to what was allowed pass. Bounded per pod, so that no pod can evict another's.

use crate::addr::{Endpoint, Port};
use crate::path::Origin;
use crate::settings::{FLOW_IDLE_BOTH_NS, FLOW_IDLE_NS};
use crate::verdict::Reason;

/// Slots of one pod in the map `FLOWS`; a power of two.
pub const FLOWS_PER_POD: u32 = 4096;

/// How many slots, one after the other, a flow may be in.
pub const FLOW_WAYS: u32 = 4;

abi! {
    /// Key of the map `FLOWS`.
    pub struct FlowSlot {
        /// The pod.
        pub pod: u32,
        /// Below [`FLOWS_PER_POD`].
        pub slot: u32,
    }

    /// Who talks to whom, seen from the pod.
    pub struct FlowTuple {
        /// The other end.
        pub remote: Endpoint,
        /// The pod's port.
        pub local_port: Port,
        /// 1 = IPv6 (which of the pod's two addresses).
        pub family6: u8,
        /// Always 0.
        pub pad: u8,
    }

    /// Value of the map `FLOWS`.
    pub struct Flow {
        /// The revision of facts (map `FACTS`) under which it was allowed: under another it is
        /// decided again, as what it was opened as.
        pub facts: u64,
        /// When the last datagram was seen (CLOCK_MONOTONIC).
        pub last_ns: u64,
        /// Bytes in both directions (IP payload).
        pub bytes: u64,
        /// The rule that allowed it.
        pub rule: u64,
        /// Whose flow this is; a slot is shared by all tuples that hash to it.
        pub tuple: FlowTuple,
        /// `Flow::FROM_POD` and so on.
        pub flags: u32,
        /// A [`Reason`]: why it is in clear.
        pub clear: u32,
    }
}

impl Flow {
    /// A datagram from the pod was seen.
    pub const FROM_POD: u32 = 1 << 0;
    /// A datagram to the pod was seen.
    pub const TO_POD: u32 = 1 << 1;
    /// It was opened by the pod (else to it).
    pub const EGRESS: u32 = 1 << 2;
    /// What opened it came translated ([`Origin::Translated`]).
    pub const TRANSLATED: u32 = 1 << 3;
    /// What opened it came past no gate ([`Origin::Ungated`]).
    pub const UNGATED: u32 = 1 << 4;

    /// The flags of what came to the pod.
    #[inline(always)]
    #[must_use]
    pub const fn from_origin(origin: Origin) -> u32 {
        match origin {
            Origin::Address => 0,
            Origin::Translated => Self::TRANSLATED,
            Origin::Ungated => Self::UNGATED,
        }
    }

    /// Where what opened a flow of these flags came from, as could be told then.
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

    /// Whether it is still alive at a time.
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

    /// Why its bytes are in clear.
    #[must_use]
    pub fn clear_reason(&self) -> Reason {
        u8::try_from(self.clear)
            .ok()
            .and_then(Reason::from_code)
            .unwrap_or(Reason::Udp)
    }
}

impl FlowTuple {
    /// The tuple's first slot. Mixing by Fibonacci hashing (Knuth, TAOCP 3, 6.4): a pod that
    /// chooses its tuples badly only evicts its own flows.
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
