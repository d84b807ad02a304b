// SPDX-License-Identifier: Apache-2.0
//! What compiling a set may cost.
//!
//! Rules, peers, blocks and ports multiply, and whoever may write policies in a namespace can make them
//! multiply on purpose: without a bound one object of a megabyte would keep the agents of all nodes from
//! compiling anything else.

use std::cell::Cell;

/// Steps for a set: a rule at a peer, at an address block, or at a span of ports. Some tenths of a
/// second at worst; all policies of a large cluster for one pod take some ten thousand.
pub(crate) const STEPS: usize = 1 << 23;

/// What is left.
#[derive(Debug, Default)]
pub(crate) struct Work(Cell<usize>);

impl Work {
    /// For another set, so many.
    pub(crate) fn begin(&self, steps: usize) {
        self.0.set(steps);
    }

    /// Takes so many steps; `false` = there are too many, and nothing further is worth doing.
    pub(crate) fn take(&self, steps: usize) -> bool {
        let left = self.0.get().checked_sub(steps);
        self.0.set(left.unwrap_or(0));
        left.is_some()
    }

    /// Whether there were too many.
    pub(crate) fn is_spent(&self) -> bool {
        self.0.get() == 0
    }
}
