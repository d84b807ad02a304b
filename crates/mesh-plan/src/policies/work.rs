// SPDX-License-Identifier: Apache-2.0
//! The maximum number of steps to compile a set.
//!
//! Rules, peers, blocks and ports multiply, and a user who may write policies can exploit that:
//! without a limit, one object of a megabyte would keep the agents of all nodes from compiling
//! anything else.

use std::cell::Cell;

/// The maximum number of steps for a set. A step is a rule at a peer, at an address block, or at a
/// span of ports. The maximum takes some tenths of a second; all policies of a large cluster for
/// one pod take about ten thousand steps.
pub(crate) const STEPS: usize = 1 << 23;

/// The remaining steps.
#[derive(Debug, Default)]
pub(crate) struct Work(Cell<usize>);

impl Work {
    /// Begins a set with a number of steps.
    pub(crate) fn begin(&self, steps: usize) {
        self.0.set(steps);
    }

    /// Takes a number of steps; `false` = the limit is reached, and the work should stop.
    pub(crate) fn take(&self, steps: usize) -> bool {
        let left = self.0.get().checked_sub(steps);
        self.0.set(left.unwrap_or(0));
        left.is_some()
    }

    /// Whether the limit was reached.
    pub(crate) fn is_spent(&self) -> bool {
        self.0.get() == 0
    }
}
