// SPDX-License-Identifier: Apache-2.0
//! Byte counters of a connection that the proxy carries.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::metrics::Open;

/// The byte counter of one direction.
#[derive(Debug, Default)]
struct Direction {
    total: AtomicU64,
    counted: AtomicU64,
}

/// Bytes by which the metrics of an open connection may lag.
pub(super) const COUNT_EVERY: u64 = 1 << 20;

/// The byte counters of an open connection. Both directions may add at once.
#[derive(Debug)]
pub struct Bytes {
    sent: Direction,
    received: Direction,
    counted: Open,
}

impl Bytes {
    pub(super) fn new(counted: Open) -> Self {
        Self {
            sent: Direction::default(),
            received: Direction::default(),
            counted,
        }
    }

    /// Adds application bytes from source to destination.
    pub fn add_sent(&self, bytes: u64) {
        let new = self.sent.add(bytes);
        if new > 0 {
            self.counted.add(new, 0);
        }
    }

    /// Adds application bytes from destination to source.
    pub fn add_received(&self, bytes: u64) {
        let new = self.received.add(bytes);
        if new > 0 {
            self.counted.add(0, new);
        }
    }

    /// Counts the remainder in the metrics; returns the totals sent and received.
    pub(super) fn finish(&self) -> (u64, u64) {
        self.counted.add(self.sent.take(), self.received.take());
        (
            self.sent.total.load(Relaxed),
            self.received.total.load(Relaxed),
        )
    }
}

impl Direction {
    /// Adds bytes; returns the bytes to count in the metrics now.
    fn add(&self, bytes: u64) -> u64 {
        let before = self.total.fetch_add(bytes, Relaxed);
        if before / COUNT_EVERY == before.wrapping_add(bytes) / COUNT_EVERY {
            return 0;
        }
        self.take()
    }

    /// Takes the bytes that are not in the metrics yet. Only the task that adds may call it.
    fn take(&self) -> u64 {
        let total = self.total.load(Relaxed);
        total.saturating_sub(self.counted.swap(total, Relaxed))
    }
}
