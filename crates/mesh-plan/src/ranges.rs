// SPDX-License-Identifier: Apache-2.0
//! Nested prefixes as a step function, so that a longest-prefix match is one binary search.

use mesh_common::Addr;

/// A number that prefixes are of.
pub(crate) trait Point: Copy + Ord {
    /// The largest number.
    const MAX: Self;
    /// The next number; `None` after the largest.
    fn next(self) -> Option<Self>;
    /// The number before; the smallest has none and returns itself.
    fn previous(self) -> Self;
}

macro_rules! point {
    ($($number:ty),*) => {
        $(impl Point for $number {
            const MAX: Self = Self::MAX;

            fn next(self) -> Option<Self> {
                self.checked_add(1)
            }

            fn previous(self) -> Self {
                self.saturating_sub(1)
            }
        })*
    };
}

point!(u16, u128);

/// The first and the last number of a prefix, and its value.
pub(crate) type Range<K, V> = (K, K, V);

/// The value of the longest prefix, for every number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ranges<K, V> {
    /// Ascending: the value holds from this number on, up to the next step.
    steps: Vec<(K, Option<V>)>,
}

impl<K, V> Default for Ranges<K, V> {
    fn default() -> Self {
        Self { steps: Vec::new() }
    }
}

impl<K: Point, V: Copy + PartialEq> Ranges<K, V> {
    /// Flattens prefixes, of which any two are disjoint or one holds the other.
    pub(crate) fn of(mut prefixes: Vec<Range<K, V>>) -> Self {
        prefixes.sort_by_key(|(first, last, _)| (*first, std::cmp::Reverse(*last)));
        let mut ranges = Self::default();
        // The prefixes around the current one, the shortest first.
        let mut around: Vec<(K, V)> = Vec::new();
        for (first, last, value) in prefixes {
            ranges.leave(&mut around, Some(first));
            ranges.step(first, Some(value));
            around.push((last, value));
        }
        ranges.leave(&mut around, None);
        ranges
    }

    /// Ends the prefixes that end before a number, or all.
    fn leave(&mut self, around: &mut Vec<(K, V)>, before: Option<K>) {
        while let Some((last, _)) = around.last().copied()
            && before.is_none_or(|before| last < before)
        {
            around.pop();
            if let Some(next) = last.next() {
                self.step(next, around.last().map(|(_, value)| *value));
            }
        }
    }

    fn step(&mut self, from: K, value: Option<V>) {
        if self.steps.last().is_some_and(|(start, _)| *start == from) {
            self.steps.pop();
        }
        if self.steps.last().is_none_or(|(_, before)| *before != value) {
            self.steps.push((from, value));
        }
    }

    /// The value of the longest prefix that holds a number.
    pub(crate) fn get(&self, number: K) -> Option<&V> {
        let after = self.steps.partition_point(|(start, _)| *start <= number);
        self.steps.get(after.checked_sub(1)?)?.1.as_ref()
    }

    /// The ranges of numbers with one value, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<K, V>> {
        let ends = self.steps.iter().skip(1).map(|(next, _)| next.previous());
        self.steps
            .iter()
            .zip(ends.chain([K::MAX]))
            .filter_map(|((first, value), last)| Some((*first, last, (*value)?)))
    }
}

/// An address as a number.
pub(crate) fn number(addr: Addr) -> u128 {
    u128::from_be_bytes(addr.octets())
}

/// The first and the last address of a block.
pub(crate) fn block(addr: Addr, bits: u32) -> (u128, u128) {
    let first = number(addr);
    (first, first | u128::MAX.checked_shr(bits).unwrap_or(0))
}

/// The first and the last port of a prefix.
pub(crate) fn ports(port: u16, bits: u32) -> (u16, u16) {
    (port, port | u16::MAX.checked_shr(bits).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(prefixes: &[(u32, u16, u8)]) -> Ranges<u16, u8> {
        let range = |(bits, port, value): &(u32, u16, u8)| {
            let (first, last) = ports(*port, *bits);
            (first, last, *value)
        };
        Ranges::of(prefixes.iter().map(range).collect())
    }

    #[test]
    fn prefixes_become_ranges() {
        let all = [(0, 0, 0), (16, 80, 1), (16, 81, 1), (1, 32768, 2)];
        let expected = [(0, 79, 0), (80, 81, 1), (82, 32767, 0), (32768, 65535, 2)];
        assert_eq!(of(&all).iter().collect::<Vec<_>>(), expected);
        assert_eq!(of(&[]).get(0), None);
        assert_eq!(
            of(&[(16, 65535, 3)]).iter().collect::<Vec<_>>(),
            [(65535, 65535, 3)]
        );
    }

    /// Every number has the value of the longest prefix that holds it.
    #[test]
    fn get_finds_the_longest_prefix() {
        let mut seed = 7_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..300 {
            let mut prefixes: std::collections::BTreeMap<(u32, u16), u8> = Default::default();
            for _ in 0..random(9) {
                let bits = u32::try_from(random(17)).unwrap();
                let mask = !u16::MAX.checked_shr(bits).unwrap_or(0);
                let port = u16::try_from(random(1 << 16)).unwrap() & mask;
                prefixes.insert((bits, port), u8::try_from(random(3)).unwrap());
            }
            let list: Vec<_> = prefixes.iter().map(|((b, p), v)| (*b, *p, *v)).collect();
            let ranges = of(&list);
            let borders = ranges.steps.iter().map(|(start, _)| *start);
            let borders = borders.chain(list.iter().map(|(_, port, _)| *port));
            let around = |at: u16| [at.wrapping_sub(1), at, at.wrapping_add(1)];
            let random: Vec<u16> = (0..50)
                .map(|_| u16::try_from(random(1 << 16)).unwrap())
                .collect();
            for number in borders.flat_map(around).chain(random).chain([0, u16::MAX]) {
                let expected = (0..=16).rev().find_map(|bits| {
                    let mask = !u16::MAX.checked_shr(bits).unwrap_or(0);
                    prefixes.get(&(bits, number & mask))
                });
                assert_eq!(ranges.get(number), expected, "{number} of {list:?}");
            }
        }
    }
}
