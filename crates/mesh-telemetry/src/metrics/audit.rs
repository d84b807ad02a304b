// SPDX-License-Identifier: Apache-2.0
//! Traffic that policies in audit mode would have refused, by rule: a bounded number of series.

use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "private to this file: held for one look-up, and only by what is audited"
)]
use std::sync::Mutex;
use std::sync::PoisonError;

use mesh_common::{Direction, Reason};

/// Maximum number of rules; further ones count as `other`.
const MOST_RULES: usize = 1024;

type Key = (Direction, String, Reason);

/// The counters.
#[derive(Debug, Default)]
#[expect(clippy::disallowed_types, reason = "see the import")]
pub(super) struct Audit(Mutex<BTreeMap<Key, u64>>);

impl Audit {
    /// Adds one.
    pub(super) fn count(&self, direction: Direction, rule: &str, reason: Reason) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (direction, rule.to_owned(), reason);
        if all.len() >= MOST_RULES && !all.contains_key(&key) {
            "other".clone_into(&mut key.1);
        }
        let count = all.entry(key).or_default();
        *count = count.saturating_add(1);
    }

    /// All of them.
    pub(super) fn snapshot(&self) -> BTreeMap<Key, u64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_beyond_the_bound_count_as_other() {
        let audit = Audit::default();
        let count = |rule: &str| audit.count(Direction::Egress, rule, Reason::Policy);
        for rule in 0..MOST_RULES + 10 {
            count(&rule.to_string());
        }
        count("0");
        let all = audit.snapshot();
        let of = |rule: &str| all.get(&(Direction::Egress, rule.to_owned(), Reason::Policy));
        assert_eq!((of("0"), of("other")), (Some(&2), Some(&10)));
        assert_eq!(all.values().sum::<u64>(), MOST_RULES as u64 + 11);
    }
}
