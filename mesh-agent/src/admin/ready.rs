// SPDX-License-Identifier: Apache-2.0
//! Readiness: a set of named conditions, each owned by the task that fulfils it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::metrics::Metrics;

/// Whether the agent is ready: all conditions hold. Clones share them.
#[derive(Clone, Debug)]
pub struct Readiness {
    conditions: Arc<watch::Sender<BTreeMap<&'static str, bool>>>,
    metrics: Metrics,
}

impl Readiness {
    /// Without a condition: ready. Conditions are shown in the metrics too.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        Self {
            conditions: Arc::new(watch::Sender::new(BTreeMap::new())),
            metrics,
        }
    }

    /// Adds a condition that does not hold until [`ReadyTask::done`] is called. A task that drops
    /// it otherwise has failed, and the condition never holds.
    #[must_use = "the condition never holds unless somebody says so"]
    pub fn task(&self, condition: &'static str) -> ReadyTask {
        self.set(condition, false);
        ReadyTask {
            condition,
            readiness: self.clone(),
        }
    }

    /// Sets a condition: `shutting down` is one that ceases to hold.
    pub fn set(&self, condition: &'static str, holds: bool) {
        self.metrics.ready(condition, holds);
        self.conditions.send_modify(|all| {
            all.insert(condition, holds);
        });
    }

    /// Whether all conditions hold.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.conditions.borrow().values().all(|holds| *holds)
    }

    /// Every condition, and whether it holds.
    #[must_use]
    pub fn conditions(&self) -> BTreeMap<&'static str, bool> {
        self.conditions.borrow().clone()
    }

    /// Waits until all conditions hold.
    pub async fn wait(&self) {
        let mut changes = self.conditions.subscribe();
        // The sender is in `self`.
        drop(
            changes
                .wait_for(|all| all.values().all(|holds| *holds))
                .await,
        );
    }
}

/// The right to say that a condition holds.
#[derive(Debug)]
pub struct ReadyTask {
    condition: &'static str,
    readiness: Readiness,
}

impl ReadyTask {
    /// The condition holds from now on.
    pub fn done(self) {
        self.readiness.set(self.condition, true);
    }
}
