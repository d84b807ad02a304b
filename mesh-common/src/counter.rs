// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Counters of the kernel programs: never lossy, one per CPU, summed by the agent.

use crate::policy::Direction;
use crate::verdict::Reason;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// A verdict at a hook or at the gate, by direction, outcome and reason.
    Verdict(Direction, bool, Reason),
    /// Bytes of workloads that were not under mTLS, by reason.
    UnencryptedBytes(Reason),
    /// Events that the ring buffer had no room for.
    LostEvents,
    /// Gate events beyond the bound per pod and second.
    SuppressedEvents,
}

/// Number of counters: the size of the map `COUNTERS`.
pub const COUNTERS: u32 = 5 * Reason::CODES + 2;

impl Counter {
    /// The counter's index in the map `COUNTERS`.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> u32 {
        match self {
            Self::Verdict(direction, allowed, reason) => {
                (direction as u32 * 2 + allowed as u32) * Reason::CODES + reason as u32
            }
            Self::UnencryptedBytes(reason) => 4 * Reason::CODES + reason as u32,
            Self::LostEvents => 5 * Reason::CODES,
            Self::SuppressedEvents => 5 * Reason::CODES + 1,
        }
    }

    /// Every counter.
    #[cfg(feature = "std")]
    pub fn all() -> impl Iterator<Item = Self> {
        let verdicts = [Direction::Ingress, Direction::Egress]
            .into_iter()
            .flat_map(|d| [false, true].map(|allowed| (d, allowed)))
            .flat_map(|(d, allowed)| {
                Reason::ALL
                    .iter()
                    .map(move |r| Self::Verdict(d, allowed, *r))
            });
        let bytes = Reason::ALL.iter().map(|r| Self::UnencryptedBytes(*r));
        verdicts
            .chain(bytes)
            .chain([Self::LostEvents, Self::SuppressedEvents])
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_a_place_of_its_own() {
        let mut seen = std::collections::BTreeSet::new();
        for counter in Counter::all() {
            assert!(counter.index() < COUNTERS);
            assert!(seen.insert(counter.index()), "{counter:?} shares its place");
        }
    }
}
