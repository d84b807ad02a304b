// SPDX-License-Identifier: Apache-2.0
//! The delay before a retry, as a pure function of the number of failures and a random number.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::time::Duration;

/// An exponential backoff with jitter.
#[derive(Clone, Debug)]
pub struct Backoff {
    /// The delay after the first failure, before jitter.
    pub first: Duration,
    /// The upper bound of the delay, before jitter.
    pub longest: Duration,
    /// The range of the random factor that scales the delay, so that clients that failed together do not retry
    /// together.
    pub jitter: RangeInclusive<f64>,
}

impl Backoff {
    /// Returns the delay before the next attempt, which doubles with each earlier failure. `random` is a number
    /// between 0 and 1.
    #[must_use]
    pub fn delay(&self, earlier_failures: u32, random: f64) -> Duration {
        let doubled = self
            .first
            .saturating_mul(2_u32.saturating_pow(earlier_failures));
        let (low, high) = (*self.jitter.start(), *self.jitter.end());
        doubled
            .min(self.longest)
            .mul_f64(low + (high - low) * random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff {
        first: Duration::from_millis(400),
        longest: Duration::from_secs(20),
        jitter: 0.5..=1.0,
    };

    #[test]
    fn delay_doubles_up_to_the_longest() {
        let delays = [0, 1, 2, 5, 6, u32::MAX].map(|failures| BACKOFF.delay(failures, 1.0));
        assert_eq!(
            delays.map(|delay| delay.as_millis()),
            [400, 800, 1600, 12_800, 20_000, 20_000]
        );
    }

    #[test]
    fn jitter_scales_the_delay_within_its_range() {
        let delays = [0.0, 0.5, 1.0, 7.0].map(|random| BACKOFF.delay(0, random).as_millis());
        assert_eq!(delays, [200, 300, 400, 400]);
    }
}
