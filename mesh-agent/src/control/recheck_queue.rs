// SPDX-License-Identifier: Apache-2.0
//! Schedules pods whose open connections are to be checked against policy again, because peers came or
//! went.
//!
//! Reading the sockets of one namespace makes the kernel walk over the sockets of all: about a
//! millisecond. So pods are checked one by one, with time for new snapshots in between. A round over all
//! pods starts at most so often that it takes a tenth of a CPU, unless a refused connection would then
//! stay open for too long.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The shortest time between two rounds.
const MIN_REST: Duration = Duration::from_millis(250);
/// The longest time between two rounds: a refused connection closes within a second.
const MAX_REST: Duration = Duration::from_millis(500);
/// Ratio of the rest to the time that the round took.
const SHARE: u32 = 10;

/// The pods of the current round, and the time of the next one.
#[derive(Debug, Default)]
pub(super) struct RecheckQueue {
    /// Peers changed since the current round began.
    is_requested: bool,
    /// Pods that the current round has left, by UID.
    left: BTreeSet<String>,
    /// The earliest time of the next round.
    rested: Option<Instant>,
    /// Time that the current round has taken so far.
    took: Duration,
}

impl RecheckQueue {
    /// Requests a round over all pods.
    pub(super) fn request(&mut self) {
        self.is_requested = true;
    }

    /// Tells whether the current round has pods left.
    pub(super) fn is_pending(&self) -> bool {
        !self.left.is_empty()
    }

    /// Returns the next pod to check, if it is time.
    pub(super) fn next<'p>(
        &mut self,
        now: Instant,
        pods: impl Iterator<Item = &'p String>,
    ) -> Option<String> {
        let is_rested = self.rested.is_none_or(|rested| now >= rested);
        if self.left.is_empty() && self.is_requested && is_rested {
            self.is_requested = false;
            self.took = Duration::ZERO;
            self.left = pods.cloned().collect();
        }
        self.left.pop_first()
    }

    /// Accounts for the check of one pod, which ends now.
    pub(super) fn took(&mut self, time: Duration) {
        self.took += time;
        self.rested = Some(Instant::now() + (self.took * SHARE).clamp(MIN_REST, MAX_REST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_coalesced_into_one_delayed_round() {
        let pods = ["a".to_owned(), "b".to_owned()];
        let mut queue = RecheckQueue::default();
        let start = Instant::now();
        assert_eq!(queue.next(start, pods.iter()), None);
        queue.request();
        queue.request();
        assert_eq!(queue.next(start, pods.iter()).as_deref(), Some("a"));
        assert!(queue.is_pending());
        queue.took(Duration::from_millis(100));
        // A change during the round may concern pods that were already checked.
        queue.request();
        assert_eq!(queue.next(start, pods.iter()).as_deref(), Some("b"));
        queue.took(Duration::from_millis(100));
        assert!(!queue.is_pending());
        assert_eq!(queue.next(start + MIN_REST, pods.iter()), None);
        // The rest is bounded, although the round took 200 ms.
        let later = Instant::now() + MAX_REST;
        assert_eq!(queue.next(later, pods.iter()).as_deref(), Some("a"));
    }
}
