// SPDX-License-Identifier: Apache-2.0
//! Which pods' open connections are to be decided again because peers came or went, and when.
//!
//! Looking at the sockets of one namespace takes the kernel a walk over those of all: about a
//! millisecond. So pods are looked at one by one, with time for new facts in between, and all of
//! them no more often than takes a tenth of a CPU, or than a connection that is denied may still go on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// From one look at all pods to the next, at least.
const REST: Duration = Duration::from_millis(250);
/// At most: what is denied ends within a second.
const MOST: Duration = Duration::from_millis(500);
/// How many times longer the rest is than the look was.
const SHARE: u32 = 10;

/// What is still to be looked at.
#[derive(Debug, Default)]
pub(super) struct Undecided {
    /// Peers changed since the last look began.
    wanted: bool,
    /// Pods of the look that runs, by UID.
    left: BTreeSet<String>,
    /// No other begins before.
    rested: Option<Instant>,
    /// What this one has taken so far.
    took: Duration,
}

impl Undecided {
    /// All pods are to be looked at.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    /// Whether pods can be looked at without waiting.
    pub(super) fn is_waiting(&self) -> bool {
        !self.left.is_empty()
    }

    /// The next of these pods, if it is time.
    pub(super) fn next<'p>(
        &mut self,
        now: Instant,
        pods: impl Iterator<Item = &'p String>,
    ) -> Option<String> {
        if self.left.is_empty() && self.wanted && self.rested.is_none_or(|rested| now >= rested) {
            self.wanted = false;
            self.took = Duration::ZERO;
            self.left = pods.cloned().collect();
        }
        self.left.pop_first()
    }

    /// A look at one pod ended, now.
    pub(super) fn took(&mut self, time: Duration) {
        self.took += time;
        self.rested = Some(Instant::now() + (self.took * SHARE).clamp(REST, MOST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pods_are_looked_at_once_for_many_changes_and_again_after_a_rest() {
        let pods = ["a".to_owned(), "b".to_owned()];
        let mut undecided = Undecided::default();
        let start = Instant::now();
        assert_eq!(undecided.next(start, pods.iter()), None);
        undecided.want();
        undecided.want();
        assert_eq!(undecided.next(start, pods.iter()).as_deref(), Some("a"));
        assert!(undecided.is_waiting());
        undecided.took(Duration::from_millis(100));
        // What changes while pods are looked at may concern those that were.
        undecided.want();
        assert_eq!(undecided.next(start, pods.iter()).as_deref(), Some("b"));
        undecided.took(Duration::from_millis(100));
        assert!(!undecided.is_waiting());
        assert_eq!(undecided.next(start + REST, pods.iter()), None);
        // Not ten times as long as the look.
        let later = Instant::now() + MOST;
        assert_eq!(undecided.next(later, pods.iter()).as_deref(), Some("a"));
    }
}
