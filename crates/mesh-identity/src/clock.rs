// SPDX-License-Identifier: Apache-2.0
//! The wall clock, and the spread of renewals and retries.
//!
//! This crate never reads the system's clock: the program passes a clock in, so that tests of expiry
//! and renewal need not wait. Timers are tokio's.

use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{pki_types::UnixTime, time_provider::TimeProvider};

/// A wall clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// Makes a clock that calls `now` at each reading.
    pub fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// Returns the time.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.now()))
    }
}

/// Converts a time for webpki; times before 1970 become 1970.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO))
}

/// Spreads actions that many agents would otherwise do at the same time. The spread depends on seed,
/// subject and round only.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spread(pub(super) u64);

impl Spread {
    /// Returns a number in 0..1.
    pub(super) fn fraction(self, subject: &impl Hash, round: u32) -> f64 {
        let mut hasher = DefaultHasher::new();
        (self.0, subject, round).hash(&mut hasher);
        // 32 bits are exact in a double.
        f64::from((hasher.finish() >> 32) as u32) / (f64::from(u32::MAX) + 1.0)
    }

    /// Returns `middle`, give or take a tenth.
    pub(super) fn around(self, middle: Duration, subject: &impl Hash, round: u32) -> Duration {
        middle.mul_f64(0.9 + 0.2 * self.fraction(subject, round))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_differs_by_agent_subject_and_round_within_a_tenth() {
        let hour = Duration::from_secs(3600);
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..10 {
            for subject in ["a", "b"] {
                for round in 0..10 {
                    let time = Spread(seed).around(hour, &subject, round);
                    assert!(
                        time >= hour.mul_f64(0.9) && time <= hour.mul_f64(1.1),
                        "{time:?}"
                    );
                    assert_eq!(time, Spread(seed).around(hour, &subject, round));
                    seen.insert(time);
                }
            }
        }
        assert_eq!(seen.len(), 200);
    }
}
