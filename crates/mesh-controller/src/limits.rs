// SPDX-License-Identifier: Apache-2.0
//! How much one caller may ask, and which keys were certified before; both bounded.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tokio::time::{Duration, Instant};

/// So many may come at once: an agent that starts on a full node.
const BURST: f64 = 256.0;
/// So many a second may follow.
const RATE: f64 = 16.0;
/// Callers that are told apart; beyond, those that asked little lately are forgotten first.
const MOST_CALLERS: usize = 8192;
/// Keys that are remembered. A key that is forgotten can be certified again, which takes a token of
/// its node all the same.
const MOST_KEYS: usize = 65_536;

/// A bucket of tokens for each caller.
#[derive(Debug, Default)]
pub(super) struct Buckets(BTreeMap<String, (f64, Instant)>);

impl Buckets {
    /// Whether `caller` may ask once more now.
    pub(super) fn take(&mut self, caller: &str, now: Instant) -> bool {
        if self.0.len() >= MOST_CALLERS && !self.0.contains_key(caller) {
            let idle = Duration::from_secs_f64(BURST / RATE);
            self.0
                .retain(|_, (_, last)| now.duration_since(*last) < idle);
            if self.0.len() >= MOST_CALLERS {
                return false;
            }
        }
        let (left, last) = self.0.entry(caller.to_owned()).or_insert((BURST, now));
        *left = (*left + now.duration_since(*last).as_secs_f64() * RATE).min(BURST);
        *last = now;
        let may = *left >= 1.0;
        if may {
            *left -= 1.0;
        }
        may
    }
}

/// The keys that were certified last.
#[derive(Debug, Default)]
pub(super) struct Keys {
    known: BTreeSet<[u8; 32]>,
    order: VecDeque<[u8; 32]>,
}

impl Keys {
    /// Remembers a key, by its digest; whether it is new.
    pub(super) fn add(&mut self, key: [u8; 32]) -> bool {
        if !self.known.insert(key) {
            return false;
        }
        self.order.push_back(key);
        if self.order.len() > MOST_KEYS
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
    async fn a_burst_then_a_rate_for_each_caller_by_itself() {
        let mut buckets = Buckets::default();
        let start = Instant::now();
        let taken = (0..1000).filter(|_| buckets.take("a", start)).count();
        assert_eq!(taken, 256);
        assert!(buckets.take("b", start));
        let later = start + Duration::from_secs(1);
        let taken = (0..1000).filter(|_| buckets.take("a", later)).count();
        assert_eq!(taken, 16);
    }

    #[tokio::test(start_paused = true)]
    async fn more_callers_than_are_told_apart_take_nothing_from_those_that_are() {
        let mut buckets = Buckets::default();
        let start = Instant::now();
        for caller in 0..MOST_CALLERS {
            assert!(buckets.take(&caller.to_string(), start));
        }
        let lately = start + Duration::from_secs(10);
        assert!(buckets.take("0", lately));
        for caller in 0..100 {
            assert!(!buckets.take(&format!("stranger {caller}"), lately));
            assert!(buckets.take("0", lately) && buckets.take("1", lately));
        }
        assert_eq!(buckets.0.len(), MOST_CALLERS);
        while buckets.take("0", lately) {}
        // Room is made of those that asked nothing for as long as an empty bucket takes to fill.
        let later = start + Duration::from_secs(17);
        assert!(buckets.take("stranger", later));
        let known: Vec<_> = buckets.0.keys().map(String::as_str).collect();
        assert_eq!(known, ["0", "1", "stranger"]);
        // Nobody has a new burst by that.
        let taken = (0..1000).filter(|_| buckets.take("0", later)).count();
        assert_eq!(taken, 7 * 16);
    }

    #[test]
    fn a_key_is_new_once() {
        let mut keys = Keys::default();
        assert!(keys.add([1; 32]) && keys.add([2; 32]));
        assert!(!keys.add([1; 32]));
        for n in 0..u32::try_from(MOST_KEYS).unwrap() {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            keys.add(key);
        }
        assert!(keys.order.len() <= MOST_KEYS && keys.known.len() == keys.order.len());
    }
}
