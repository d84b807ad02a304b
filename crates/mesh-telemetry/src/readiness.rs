// SPDX-License-Identifier: Apache-2.0
//! Readiness of a program: a set of named conditions, each owned by the task that fulfills it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

/// The conditions of readiness. A program is ready while all of them hold. Clones share them.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<watch::Sender<BTreeMap<&'static str, bool>>>);

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Starts without conditions, that is, ready.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(BTreeMap::new())))
    }

    /// Adds a condition that holds once [`ReadyTask::done`] is called. If the task is dropped instead,
    /// it has failed, and the condition never holds.
    #[must_use = "the condition never holds unless `done` is called"]
    pub fn task(&self, condition: &'static str) -> ReadyTask {
        self.set(condition, false);
        ReadyTask {
            condition,
            readiness: self.clone(),
        }
    }

    /// Sets whether a condition holds.
    pub fn set(&self, condition: &'static str, holds: bool) {
        self.0
            .send_if_modified(|all| all.insert(condition, holds) != Some(holds));
    }

    /// Tells whether all conditions hold.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.borrow().values().all(|holds| *holds)
    }

    /// Returns every condition and whether it holds.
    #[must_use]
    pub fn conditions(&self) -> BTreeMap<&'static str, bool> {
        self.0.borrow().clone()
    }

    /// Waits until all conditions hold.
    pub async fn wait(&self) {
        let mut changes = self.0.subscribe();
        // Never fails: `self` keeps the sender.
        drop(
            changes
                .wait_for(|all| all.values().all(|holds| *holds))
                .await,
        );
    }
}

/// The right to declare that a condition holds.
#[derive(Debug)]
pub struct ReadyTask {
    condition: &'static str,
    readiness: Readiness,
}

impl ReadyTask {
    /// Declares that the condition holds from now on.
    pub fn done(self) {
        self.readiness.set(self.condition, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_task_keeps_the_program_unready() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let done = readiness.task("plan applied");
        let failed = readiness.task("certificates");
        done.done();
        drop(failed);
        assert!(!readiness.is_ready());
        let conditions = BTreeMap::from([("certificates", false), ("plan applied", true)]);
        assert_eq!(readiness.conditions(), conditions);
    }
}
