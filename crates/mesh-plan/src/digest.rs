// SPDX-License-Identifier: Apache-2.0
//! Ids that are hashes of their content: equal content has an equal id on every node and in every
//! run, and an id never changes its meaning.
//!
//! With 64 bits, a user who may create objects could search for two contents with one id. Code that
//! stores content under an id therefore compares it, and isolates both sides of a collision.

use std::hash::{Hash, Hasher};

/// Changes when the meaning of hashed content changes, so that an agent never takes an older
/// agent's entry for its own.
const EPOCH: &str = "crates/mesh-plan/1";

/// Creates ids. The mask is all ones; tests clear bits to provoke collisions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids {
    mask: u64,
}

impl Default for Ids {
    fn default() -> Self {
        Self { mask: u64::MAX }
    }
}

impl Ids {
    /// Creates ids in which only the masked bits differ.
    #[cfg(test)]
    pub(crate) const fn masked(mask: u64) -> Self {
        Self { mask }
    }

    /// The id of some content of one kind, at least `first`.
    pub(crate) fn id(self, kind: &str, first: u64, content: &impl Hash) -> u64 {
        let digest = digest(kind, content);
        let [a, b, c, d, e, f, g, h, ..] = digest;
        (u64::from_le_bytes([a, b, c, d, e, f, g, h]) & self.mask).max(first)
    }
}

/// The whole hash of some content.
pub(crate) fn digest(kind: &str, content: &impl Hash) -> [u8; 32] {
    let mut input = Input(Vec::with_capacity(256));
    EPOCH.hash(&mut input);
    kind.hash(&mut input);
    content.hash(&mut input);
    *blake3::hash(&input.0).as_bytes()
}

/// Collects the bytes that `Hash` implementations write. They are prefix-free: each length precedes
/// its content.
struct Input(Vec<u8>);

impl Hasher for Input {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_depends_on_kind_and_field_boundaries() {
        let ids = Ids::default();
        assert_eq!(ids.id("a", 0, &("x", "y")), ids.id("a", 0, &("x", "y")));
        assert_ne!(ids.id("a", 0, &("x", "y")), ids.id("b", 0, &("x", "y")));
        assert_ne!(ids.id("a", 0, &("xy", "")), ids.id("a", 0, &("x", "y")));
        assert_ne!(
            ids.id("a", 0, &(vec![1u8], vec![2u8, 3])),
            ids.id("a", 0, &(vec![1u8, 2], vec![3u8]))
        );
    }

    #[test]
    fn reserved_ids_are_never_assigned() {
        assert_eq!(Ids::masked(0).id("a", 256, &1u8), 256);
    }
}
