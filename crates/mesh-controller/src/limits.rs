// SPDX-License-Identifier: Apache-2.0
//! Rate limits per caller, and the memory of certified keys. Both have a maximum size.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tokio::time::{Duration, Instant};

/// Requests that a caller may send at once: an agent that starts on a full node.
const BURST: f64 = 256.0;
/// Requests per second that a caller may send in the long run.
const RATE: f64 = 16.0;
/// Maximum number of tracked callers. The caller that was longest idle is forgotten first.
const MAX_CALLERS: usize = 8192;
/// Maximum number of remembered keys. A forgotten key can be certified again, which still requires a
/// token of its node.
const MAX_KEYS: usize = 65_536;

/// A token bucket for each caller.
#[derive(Debug, Default)]
pub(super) struct RateLimiter(BTreeMap<String, (f64, Instant)>);

impl RateLimiter {
    /// Takes a token of the caller. Returns false if the caller exceeds its rate.
    pub(super) fn take(&mut self, caller: &str, now: Instant) -> bool {
        if self.0.len() >= MAX_CALLERS && !self.0.contains_key(caller) {
            // A forgotten caller starts with a full bucket, as an unknown one does.
            let idle = Duration::from_secs_f64(BURST / RATE);
            self.0
                .retain(|_, (_, last)| now.duration_since(*last) < idle);
            if self.0.len() >= MAX_CALLERS {
                let oldest = self.0.iter().min_by_key(|(_, (_, last))| *last);
                if let Some(oldest) = oldest.map(|(caller, _)| caller.clone()) {
                    self.0.remove(&oldest);
                }
            }
        }
        let (left, last) = self.0.entry(caller.to_owned()).or_insert((BURST, now));
        *left = (*left + now.duration_since(*last).as_secs_f64() * RATE).min(BURST);
        *last = now;
        let allowed = *left >= 1.0;
        if allowed {
            *left -= 1.0;
        }
        allowed
    }
}

/// The most recently certified keys.
#[derive(Debug, Default)]
pub(super) struct CertifiedKeys {
    known: BTreeSet<[u8; 32]>,
    order: VecDeque<[u8; 32]>,
}

impl CertifiedKeys {
    /// Remembers the digest of a key. Returns false if the key is already known.
    pub(super) fn add(&mut self, key: [u8; 32]) -> bool {
        if !self.known.insert(key) {
            return false;
        }
        self.order.push_back(key);
        if self.order.len() > MAX_KEYS
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn burst_and_rate_are_per_caller() {
        let mut buckets = RateLimiter::default();
        let start = Instant::now();
        let taken = (0..1000).filter(|_| buckets.take("a", start)).count();
        assert_eq!(taken, 256);
        assert!(buckets.take("b", start));
        let later = start + Duration::from_secs(1);
        let taken = (0..1000).filter(|_| buckets.take("a", later)).count();
        assert_eq!(taken, 16);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_are_longest_idle_are_forgotten_first() {
        let mut buckets = RateLimiter::default();
        let start = Instant::now();
        for caller in 0..MAX_CALLERS {
            assert!(buckets.take(&caller.to_string(), start));
        }
        let soon = start + Duration::from_secs(10);
        while buckets.take("0", soon) {}
        assert!(buckets.take("1", soon));
        for caller in 0..100 {
            assert!(buckets.take(&format!("stranger {caller}"), soon));
            assert!(!buckets.take("0", soon) && buckets.take("1", soon));
        }
        assert_eq!(buckets.0.len(), MAX_CALLERS);
        // A caller is removed after the time that an empty bucket takes to fill.
        let later = start + Duration::from_secs(17);
        assert!(buckets.take("stranger", later));
        let active = ["0", "1", "stranger", "stranger 0", "stranger 99"];
        assert!(active.iter().all(|caller| buckets.0.contains_key(*caller)));
        assert_eq!(buckets.0.len(), 2 + 100 + 1);
        // The removal gives no caller a new burst.
        let taken = (0..1000).filter(|_| buckets.take("0", later)).count();
        assert_eq!(taken, 7 * 16);
    }

    #[test]
    fn key_is_new_only_once() {
        let mut keys = CertifiedKeys::default();
        assert!(keys.add([1; 32]) && keys.add([2; 32]));
        assert!(!keys.add([1; 32]));
        for n in 0..u32::try_from(MAX_KEYS).unwrap() {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            keys.add(key);
        }
        assert!(keys.order.len() <= MAX_KEYS && keys.known.len() == keys.order.len());
    }
}
