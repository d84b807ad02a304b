// SPDX-License-Identifier: Apache-2.0
//! Every number the agent shows: the only room that names the metrics library.
//!
//! Rooms count through a [`Metrics`], which is cheap to clone and never blocks on I/O. Kernel
//! counters are read when a page is asked for. Series of connections are bounded and expire; every
//! other label has a fixed set of values.

use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "private to this file: a handful of gauges with names, written once in minutes"
)]
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use mesh_common::counter::{COUNTERS, Counter};
use mesh_common::{Direction, Reason, Verdict};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::record::{Close, Reporter};
use mesh_identity::Refusal;

mod audit;
mod describe;
mod encode;
mod process;
mod series;
mod usage;

pub use describe::{ALL as DESCRIPTIONS, Description, Kind, reasons, reference};
pub use series::{Group, Labels, MOST_SERIES, Open, Totals};
pub use usage::Usage;

/// What the kernel programs count; the agent reads it when a page is asked for.
pub trait Kernel: Send + Sync + 'static {
    /// A counter, summed over CPUs.
    fn counter(&self, counter: Counter) -> u64;
    /// Name, entries and capacity of each map.
    fn map_usage(&self) -> Vec<(&'static str, u64, u64)>;
}

impl Kernel for mesh_datapath::datapath::Handles {
    fn counter(&self, counter: Counter) -> u64 {
        Self::counter(self, counter)
    }

    fn map_usage(&self) -> Vec<(&'static str, u64, u64)> {
        Self::map_usage(self)
    }
}

/// Which end of a tunnel this agent was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It opened the tunnel.
    Client,
    /// It accepted the tunnel.
    Server,
}

impl Role {
    const ALL: [Self; 2] = [Self::Client, Self::Server];

    const fn label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// How pods of this node are protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounts {
    /// Enrolled, with a gate.
    pub enrolled: u64,
    /// Known, not enrolled.
    pub not_enrolled: u64,
    /// Without a gate, whatever was asked for.
    pub not_protected: u64,
    /// Cut off, whatever else they are: what is asked for cannot be guaranteed, or does not fit.
    pub isolated: u64,
}

/// Where the agent counts. Clones share the numbers.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

const CODES: usize = Reason::CODES as usize;
/// Failures that have no [`Reason`]: reset, aborted.
const FAILURES: usize = CODES + 2;
/// Refused for each reason, or ok.
const HANDSHAKES: usize = Refusal::LABELS.len() + 1;

/// A certificate in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InUse {
    /// When it ends, in seconds since 1970.
    pub ends: u64,
    /// A CA has revoked it.
    pub revoked: bool,
}

#[expect(clippy::disallowed_types, reason = "see the import")]
struct Inner {
    connections: Arc<series::Table>,
    failures: [[AtomicU64; FAILURES]; 2],
    verdicts: [AtomicU64; COUNTERS as usize],
    audit: audit::Audit,
    handshakes: [[AtomicU64; HANDSHAKES]; 2],
    retried: [AtomicU64; CODES],
    violations: [AtomicU64; 2],
    marks_lost: AtomicU64,
    /// Refused in silence: held, and not held.
    silent: [AtomicU64; 2],
    certificates: Mutex<BTreeMap<(String, String), InUse>>,
    crls: Mutex<BTreeMap<String, u64>>,
    clock_skew: AtomicU64,
    ready: Mutex<BTreeMap<&'static str, bool>>,
    plan_apply: Histogram,
    revision: AtomicU64,
    rejected: AtomicU64,
    stale: AtomicU64,
    pods: Mutex<PodCounts>,
    lost: AtomicU64,
    panics: AtomicU64,
    usage: usage::Table,
    kernel: OnceLock<Box<dyn Kernel>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

fn zeros<const N: usize>() -> [AtomicU64; N] {
    std::array::from_fn(|_| AtomicU64::new(0))
}

/// Buckets of the time to apply a plan, in seconds: from a small change to a node's first plan.
const APPLY_BUCKETS: [f64; 12] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
];

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Numbers that begin at 0.
    #[must_use]
    #[expect(clippy::disallowed_types, reason = "see the import")]
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            connections: Arc::new(series::Table::new(MOST_SERIES)),
            failures: std::array::from_fn(|_| zeros()),
            verdicts: zeros(),
            audit: audit::Audit::default(),
            handshakes: std::array::from_fn(|_| zeros()),
            retried: zeros(),
            violations: zeros(),
            marks_lost: AtomicU64::new(0),
            silent: zeros(),
            certificates: Mutex::new(BTreeMap::new()),
            crls: Mutex::new(BTreeMap::new()),
            clock_skew: AtomicU64::new(0),
            ready: Mutex::new(BTreeMap::new()),
            plan_apply: Histogram::new(APPLY_BUCKETS),
            revision: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            pods: Mutex::new(PodCounts::default()),
            lost: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            usage: usage::Table::default(),
            kernel: OnceLock::new(),
        }))
    }

    /// Adds the kernel's counters to every page. The first call counts.
    pub fn set_kernel(&self, kernel: impl Kernel) {
        // A second kernel would make counters go backwards.
        drop(self.0.kernel.set(Box::new(kernel)));
    }

    /// Counts a connection as opened; the handle counts it as closed when dropped.
    #[must_use]
    pub fn open(&self, labels: Labels) -> Open {
        self.0.connections.open(labels)
    }

    /// Counts how a connection ended, unless it ended in order.
    pub(crate) fn closed(&self, reporter: Reporter, close: &Close) {
        let index = match close {
            Close::Finished(_) => return,
            Close::Refused(verdict) => verdict.reason as usize,
            Close::Failed(reason) => *reason as usize,
            Close::Changed(_) => Reason::PolicyChanged as usize,
            Close::Reset(_) => CODES,
            Close::Aborted => CODES + 1,
        };
        self.0.failures[reporter as usize][index].fetch_add(1, Relaxed);
    }

    /// Counts a connection that is made to another endpoint of its service, because this happened
    /// with the first one.
    pub(crate) fn retried(&self, close: &Close) {
        if let Close::Refused(Verdict { reason, .. }) | Close::Failed(reason) = close {
            self.0.retried[*reason as usize].fetch_add(1, Relaxed);
        }
    }

    /// Counts a connection that was refused in silence: held, or one too many.
    pub(crate) fn silent(&self, held: bool) {
        self.0.silent[usize::from(!held)].fetch_add(1, Relaxed);
    }

    /// Counts a decision that the agent made. The kernel's are counted by the kernel.
    pub fn verdict(&self, direction: Direction, verdict: &Verdict) {
        let counter = Counter::Verdict {
            direction,
            allowed: verdict.allowed,
            reason: verdict.reason,
        };
        if let Some(count) = self.0.verdicts.get(counter.index() as usize) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// Counts what passed and a rule in audit mode would have refused.
    pub(crate) fn audited(&self, direction: Direction, rule: &str, reason: Reason) {
        self.0.audit.count(direction, rule, reason);
    }

    /// Counts a TLS handshake.
    pub fn handshake(&self, role: Role, result: Result<(), Refusal>) {
        let index = match result {
            Ok(()) => HANDSHAKES - 1,
            Err(refusal) => refusal.index(),
        };
        self.0.handshakes[role as usize][index].fetch_add(1, Relaxed);
    }

    /// Shows the certificate in use of a service account; `None` = there is none any more.
    pub fn certificate(&self, namespace: &str, service_account: &str, in_use: Option<InUse>) {
        let key = (namespace.to_owned(), service_account.to_owned());
        let mut all = self
            .0
            .certificates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match in_use {
            Some(now) => all.insert(key, now),
            None => all.remove(&key),
        };
    }

    /// Where is counted what the connections of a workload use of the agent, for as long as somebody
    /// keeps it.
    #[must_use]
    pub fn usage(&self, namespace: &str, workload: &str) -> Arc<Usage> {
        self.0.usage.of(namespace, workload)
    }

    /// Counts a tunnel whose peer has broken its protocol.
    pub(crate) fn violated(&self, role: Role) {
        self.0.violations[role as usize].fetch_add(1, Relaxed);
    }

    /// Counts a peer that was not reached on an application's port, but on the tunnel port.
    pub(crate) fn mark_lost(&self) {
        self.0.marks_lost.fetch_add(1, Relaxed);
    }

    /// Shows when each revocation list promises to be replaced, in seconds since 1970, by file.
    pub fn revocation_lists(&self, next_updates: BTreeMap<String, u64>) {
        *self.0.crls.lock().unwrap_or_else(PoisonError::into_inner) = next_updates;
    }

    /// Shows by how much this node's clock was seen to be behind.
    pub fn clock_skew(&self, behind: Duration) {
        self.0.clock_skew.store(behind.as_secs(), Relaxed);
    }

    /// Counts a plan that is in force, and how long that took since the change was seen. Returns
    /// its number.
    pub fn plan_applied(&self, took: Duration) -> u64 {
        self.0.plan_apply.observe(took.as_secs_f64());
        self.0.revision.fetch_add(1, Relaxed) + 1
    }

    /// Shows how many parts of objects are rejected, whether or not a plan came of it.
    pub fn rejected_fields(&self, rejected: usize) {
        self.0.rejected.store(rejected as u64, Relaxed);
    }

    /// Shows whether the source of the cluster's state can be followed.
    pub fn source_stale(&self, stale: bool) {
        self.0.stale.store(stale.into(), Relaxed);
    }

    /// Number of the plan in force; 0 = none yet.
    #[must_use]
    pub fn policy_revision(&self) -> u64 {
        self.0.revision.load(Relaxed)
    }

    /// Shows how the pods of this node are protected.
    pub fn pods(&self, counts: PodCounts) {
        *self.0.pods.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// Shows a condition of readiness.
    pub(crate) fn ready(&self, condition: &'static str, holds: bool) {
        let mut all = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(condition, holds);
    }

    /// Counts records that did not reach the flow log.
    pub(crate) fn lost(&self, records: u64) {
        self.0.lost.fetch_add(records, Relaxed);
    }

    /// Counts a task that panicked.
    pub fn panicked(&self) {
        self.0.panics.fetch_add(1, Relaxed);
    }

    /// Counters of connections at a moment, after those idle for long were forgotten.
    #[must_use]
    pub fn connections(&self, now: Instant) -> Vec<(Labels, Totals)> {
        self.0.connections.snapshot(now)
    }

    /// The page, in one of its two forms.
    #[must_use]
    pub fn page(&self, form: Form) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(encode::Page(self.clone())));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)
            .expect("a String takes everything");
        match form {
            Form::OpenMetrics => text,
            Form::Prometheus => encode::prometheus(&text),
        }
    }
}

/// The forms of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The Prometheus text format, 0.0.4.
    Prometheus,
}

impl Form {
    /// What an `Accept` header asks for. Prometheus names OpenMetrics first if it can read it.
    #[must_use]
    pub fn accepted(header: &str) -> Self {
        if header.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// The page's `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

#[cfg(test)]
mod tests;
