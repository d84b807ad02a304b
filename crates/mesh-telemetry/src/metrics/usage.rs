// SPDX-License-Identifier: Apache-2.0
//! Resource usage of each workload in the agent: time of its workers, and buffers.

use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "private to this file: one look-up for each pod that comes, and one for each page"
)]
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

/// The resource usage of one workload.
#[derive(Debug, Default)]
pub struct Usage {
    nanoseconds: AtomicU64,
    buffers: AtomicU64,
}

impl Usage {
    /// Adds worker time.
    pub fn worked(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }

    /// Adds buffers; returns the bytes that the workload holds now.
    pub fn lent(&self, bytes: usize) -> u64 {
        let bytes = bytes as u64;
        self.buffers.fetch_add(bytes, Relaxed) + bytes
    }

    /// Subtracts buffers.
    pub fn gave_back(&self, bytes: usize) {
        self.buffers.fetch_sub(bytes as u64, Relaxed);
    }

    /// Returns the worker time in seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        Duration::from_nanos(self.nanoseconds.load(Relaxed)).as_secs_f64()
    }

    /// Returns the bytes of buffers.
    #[must_use]
    pub fn buffers(&self) -> u64 {
        self.buffers.load(Relaxed)
    }
}

/// The workloads of this node whose usage is kept by someone.
#[derive(Debug, Default)]
#[expect(clippy::disallowed_types, reason = "see the import")]
pub(super) struct Table(Mutex<BTreeMap<(String, String), Weak<Usage>>>);

impl Table {
    pub(super) fn of(&self, namespace: &str, workload: &str) -> Arc<Usage> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, usage| usage.strong_count() > 0);
        let key = (namespace.to_owned(), workload.to_owned());
        let known = all.get(&key).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let usage = Arc::default();
            all.insert(key, Arc::downgrade(&usage));
            usage
        })
    }

    /// Returns the usage by namespace and workload.
    pub(super) fn all(&self) -> Vec<((String, String), Arc<Usage>)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.iter();
        all.filter_map(|(key, usage)| Some((key.clone(), usage.upgrade()?)))
            .collect()
    }
}
