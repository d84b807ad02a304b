// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Counters of the kernel programs. The kernel keeps one value per CPU, so no count is lost; the
//! agent adds them up.

use crate::policy::Direction;
use crate::verdict::Reason;

/// Names a counter of the map `COUNTERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Verdicts of the hooks and of the gate.
    Verdict {
        /// The direction of the traffic, seen from the pod.
        direction: Direction,
        /// Whether the traffic was allowed.
        allowed: bool,
        /// The reason of the verdict.
        reason: Reason,
    },
    /// Application bytes of workloads sent or received without mTLS, by the reason for plaintext.
    UnencryptedBytes(Reason),
    /// Events dropped because the ring buffer was full.
    LostEvents,
    /// Events suppressed by the rate limit per pod,
    /// [`crate::event::DROPS_PER_POD_SECOND`].
    SuppressedEvents,
}

/// The number of counters: the size of the map `COUNTERS`.
pub const COUNTERS: u32 = 5 * Reason::CODES + 2;

impl Counter {
    /// Returns the counter's index in the map `COUNTERS`, below [`COUNTERS`].
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> u32 {
        match self {
            Self::Verdict {
                direction,
                allowed,
                reason,
            } => (direction as u32 * 2 + allowed as u32) * Reason::CODES + reason as u32,
            Self::UnencryptedBytes(reason) => 4 * Reason::CODES + reason as u32,
            Self::LostEvents => 5 * Reason::CODES,
            Self::SuppressedEvents => 5 * Reason::CODES + 1,
        }
    }

    /// Returns every counter, each once.
    #[cfg(feature = "std")]
    pub fn all() -> impl Iterator<Item = Self> {
        let verdicts = [Direction::Ingress, Direction::Egress]
            .into_iter()
            .flat_map(|direction| [false, true].map(|allowed| (direction, allowed)))
            .flat_map(|(direction, allowed)| {
                Reason::ALL.iter().map(move |reason| Self::Verdict {
                    direction,
                    allowed,
                    reason: *reason,
                })
            });
        let bytes = Reason::ALL
            .iter()
            .map(|reason| Self::UnencryptedBytes(*reason));
        verdicts
            .chain(bytes)
            .chain([Self::LostEvents, Self::SuppressedEvents])
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;

    #[test]
    fn counter_indexes_are_unique() {
        let mut seen = std::collections::BTreeSet::new();
        for counter in Counter::all() {
            assert!(counter.index() < COUNTERS);
            assert!(seen.insert(counter.index()), "{counter:?} shares its index");
        }
    }
}
