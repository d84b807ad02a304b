// SPDX-License-Identifier: Apache-2.0
//! The bounded table of connection metrics: one row of shared counters for each label set.
//!
//! A row lives while it has an open connection, and [`IDLE`] longer. When the table is full, connections
//! count under the labels `other`: no count is lost, only detail.

use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "private to this file: counters are opened on every data thread, and a lock around the \
              table is held for one look-up"
)]
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::describe;
use crate::record::{Reporter, Security};

/// Maximum number of label sets, without those of the overflow.
pub const MOST_SERIES: usize = 2048;
/// Time that a label set without an open connection is kept.
pub(super) const IDLE: Duration = Duration::from_secs(15 * 60);

/// An endpoint of a connection, as metrics distinguish endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// The namespace; empty if the endpoint is not a pod.
    pub namespace: String,
    /// The owner of the pod, such as its Deployment, or the name of an entity.
    pub workload: String,
    /// The service account; empty if the endpoint is not a pod.
    pub service_account: String,
}

/// The labels of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Labels {
    /// Endpoint whose node counts.
    pub reporter: Reporter,
    /// Endpoint that opened the connection.
    pub source: Arc<Group>,
    /// Endpoint that was reached.
    pub destination: Arc<Group>,
    /// `namespace/name` of the service; empty = none.
    pub service: String,
    /// Protection of the connection.
    pub security: Security,
}

const OTHER: &str = "other";

impl Labels {
    fn overflow(&self) -> Self {
        let other = Arc::new(Group {
            namespace: OTHER.to_owned(),
            workload: OTHER.to_owned(),
            service_account: OTHER.to_owned(),
        });
        Self {
            reporter: self.reporter,
            source: Arc::clone(&other),
            destination: other,
            service: OTHER.to_owned(),
            security: self.security,
        }
    }

    /// Returns the name and value of each label, in the order of [`describe::WORKLOAD`].
    pub(super) fn pairs(&self) -> Vec<(&'static str, &str)> {
        let values = [
            self.reporter.label(),
            &self.source.namespace,
            &self.source.workload,
            &self.source.service_account,
            &self.destination.namespace,
            &self.destination.workload,
            &self.destination.service_account,
            &self.service,
            self.security.label(),
        ];
        describe::WORKLOAD.iter().copied().zip(values).collect()
    }
}

/// The counters of one label set.
#[derive(Debug, Default)]
pub(super) struct Row {
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    /// Time of the last use, in milliseconds since the table was created.
    used: AtomicU64,
}

/// The counters of one label set at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections opened.
    pub opened: u64,
    /// Connections closed.
    pub closed: u64,
    /// Bytes from source to destination.
    pub sent: u64,
    /// Bytes from destination to source.
    pub received: u64,
}

impl Row {
    fn totals(&self) -> Totals {
        // Closed is read before opened, so that a page never shows more closed than opened.
        let closed = self.closed.load(Relaxed);
        Totals {
            opened: self.opened.load(Relaxed),
            closed,
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }

    fn idle_since(&self, before: u64) -> bool {
        let totals = self.totals();
        totals.opened == totals.closed && self.used.load(Relaxed) < before
    }
}

/// An open connection in the metrics; dropping it counts it as closed.
#[derive(Debug)]
pub struct Open {
    table: Arc<Table>,
    row: Arc<Row>,
}

impl Open {
    /// Adds bytes in both directions.
    pub fn add(&self, sent: u64, received: u64) {
        self.row.sent.fetch_add(sent, Relaxed);
        self.row.received.fetch_add(received, Relaxed);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.row.used.store(self.table.now(), Relaxed);
        self.row.closed.fetch_add(1, Relaxed);
    }
}

#[derive(Debug)]
#[expect(clippy::disallowed_types, reason = "see the import")]
pub(super) struct Table {
    rows: RwLock<BTreeMap<Labels, Arc<Row>>>,
    overflowed: AtomicU64,
    began: Instant,
    /// Time of the last sweep of a full table, in milliseconds since the table was created.
    swept: AtomicU64,
    most: usize,
}

/// The shortest time between two sweeps of a full table, in milliseconds.
const SWEEP_EVERY: u64 = 1000;

impl Table {
    #[expect(clippy::disallowed_types, reason = "see the import")]
    pub(super) fn new(most: usize) -> Self {
        Self {
            rows: RwLock::new(BTreeMap::new()),
            overflowed: AtomicU64::new(0),
            began: Instant::now(),
            swept: AtomicU64::new(0),
            most,
        }
    }

    fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    fn at(&self, time: Instant) -> u64 {
        u64::try_from(time.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }

    /// Counts a connection as opened.
    pub(super) fn open(self: &Arc<Self>, labels: Labels) -> Open {
        let row = self.row(labels);
        Open {
            table: Arc::clone(self),
            row,
        }
    }

    fn row(&self, labels: Labels) -> Arc<Row> {
        let now = self.now();
        // Counted as opened under the lock: a row with an open connection is never removed.
        let take = |row: &Arc<Row>| {
            row.opened.fetch_add(1, Relaxed);
            row.used.store(now, Relaxed);
            Arc::clone(row)
        };
        let read = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(row) = read.get(&labels) {
            return take(row);
        }
        drop(read);
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        let full = |rows: &BTreeMap<_, _>| rows.len() >= self.most;
        if full(&rows) && now.saturating_sub(self.swept.load(Relaxed)) >= SWEEP_EVERY {
            self.swept.store(now, Relaxed);
            sweep(&mut rows, now);
        }
        if full(&rows) && !rows.contains_key(&labels) {
            self.overflowed.fetch_add(1, Relaxed);
            return take(rows.entry(labels.overflow()).or_default());
        }
        take(rows.entry(labels).or_default())
    }

    /// Removes the rows that are idle at `now`; returns the others.
    pub(super) fn snapshot(&self, now: Instant) -> Vec<(Labels, Totals)> {
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        sweep(&mut rows, self.at(now));
        rows.iter()
            .map(|(labels, row)| (labels.clone(), row.totals()))
            .collect()
    }

    /// Returns the number of connections that counted under `other`.
    pub(super) fn overflowed(&self) -> u64 {
        self.overflowed.load(Relaxed)
    }
}

fn sweep(rows: &mut BTreeMap<Labels, Arc<Row>>, now: u64) {
    let idle = u64::try_from(IDLE.as_millis()).unwrap_or(u64::MAX);
    let Some(before) = now.checked_sub(idle) else {
        return;
    };
    // Overflow rows are kept: there are few, and their connections are unknown.
    rows.retain(|labels, row| labels.service == OTHER || !row.idle_since(before));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(workload: usize) -> Labels {
        let group = Arc::new(Group {
            workload: format!("w{workload}"),
            ..Group::default()
        });
        Labels {
            reporter: Reporter::Source,
            source: Arc::clone(&group),
            destination: group,
            service: String::new(),
            security: Security::None,
        }
    }

    #[test]
    fn label_sets_beyond_the_bound_count_as_other() {
        let table = Arc::new(Table::new(3));
        for workload in 0..10 {
            table.open(labels(workload)).add(1, 2);
        }
        table.open(labels(0)).add(1, 2);
        let rows = table.snapshot(Instant::now());
        assert_eq!(rows.len(), 4, "three, and other");
        let sent: u64 = rows.iter().map(|(_, totals)| totals.sent).sum();
        assert_eq!(sent, 11);
        let other = labels(0).overflow();
        let (_, totals) = rows.iter().find(|(labels, _)| *labels == other).unwrap();
        assert_eq!((totals.closed, table.overflowed()), (7, 7));
    }

    #[test]
    fn idle_label_sets_are_removed_and_open_ones_are_kept() {
        let table = Arc::new(Table::new(3));
        let open = table.open(labels(0));
        drop(table.open(labels(1)));
        let now = Instant::now();
        assert_eq!(
            table.snapshot(now + IDLE).len(),
            2,
            "not idle for long enough"
        );
        let later = now + IDLE + Duration::from_secs(1);
        let left = table.snapshot(later);
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].0, labels(0));
        assert_eq!((left[0].1.opened, left[0].1.closed), (1, 0));
        drop(open);
        // Its end was a use.
        assert_eq!(table.snapshot(now + IDLE).len(), 1);
    }

    #[test]
    fn counters_of_a_live_series_never_go_backwards() {
        let table = Arc::new(Table::new(4));
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let table = Arc::clone(&table);
                std::thread::spawn(move || {
                    for i in 0..2000 {
                        table.open(labels((n + i) % 6)).add(1, 0);
                    }
                })
            })
            .collect();
        let mut last: BTreeMap<Labels, Totals> = BTreeMap::new();
        while threads.iter().any(|thread| !thread.is_finished()) {
            for (labels, totals) in table.snapshot(Instant::now()) {
                assert!(totals.closed <= totals.opened);
                let before = last.insert(labels, totals).unwrap_or_default();
                assert!(before.sent <= totals.sent && before.opened <= totals.opened);
            }
        }
        for thread in threads {
            thread.join().unwrap();
        }
        let rows = table.snapshot(Instant::now());
        assert_eq!(
            rows.iter().map(|(_, totals)| totals.closed).sum::<u64>(),
            8000
        );
    }
}
