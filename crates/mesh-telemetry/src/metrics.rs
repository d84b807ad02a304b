// SPDX-License-Identifier: Apache-2.0
//! The metrics of the agent, and the pieces of a metrics page for other programs
//! ([`Description`], [`Family`], [`page`]).
//!
//! [`Metrics`] is cheap to clone and never blocks on I/O. Kernel counters are read when a page is
//! requested. Series of connections are bounded and expire; every other label has a fixed set of values.

use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "private to this module: gauges that change within minutes, and failures of TLS handshakes"
)]
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use mesh_common::counter::{COUNTERS, Counter};
use mesh_common::{Direction, Reason, Verdict};
use prometheus_client::metrics::histogram::Histogram;

use crate::readiness::Readiness;
use crate::record::{Close, Reporter};

mod audit;
mod describe;
mod encode;
mod exposition;
mod process;
mod series;
mod usage;

pub use describe::{ALL as DESCRIPTIONS, Description, Kind, reasons, reference};
pub use exposition::{Family, Format, Pairs, family, page};
pub use process::process;
pub use series::{Group, Labels, MOST_SERIES, Open, Totals};
pub use usage::Usage;

/// The counters and maps of the kernel programs, read when a page is requested.
pub trait Kernel: Send + Sync + 'static {
    /// Returns a counter, summed over CPUs.
    fn counter(&self, counter: Counter) -> u64;
    /// Returns the name, entries and capacity of each map.
    fn map_usage(&self) -> Vec<(&'static str, u64, u64)>;
}

/// The side of a tunnel that this agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Opens the tunnel.
    Client,
    /// Accepts the tunnel.
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

/// Pods of this node by protection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounts {
    /// Enrolled, with a tc gate.
    pub enrolled: u64,
    /// Not enrolled.
    pub not_enrolled: u64,
    /// Without a tc gate, enrolled or not.
    pub not_protected: u64,
    /// Isolated, whatever else they are: the requested protection cannot be guaranteed, or does not fit
    /// into a map.
    pub isolated: u64,
}

/// The metrics of the agent. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

const CODES: usize = Reason::CODES as usize;
/// Failures: every [`Reason`], reset, aborted.
const FAILURES: usize = CODES + 2;
/// The state of a certificate in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CertificateInUse {
    /// Expiry, in seconds since 1970.
    pub expires: u64,
    /// Revoked by a CA.
    pub revoked: bool,
}

#[expect(clippy::disallowed_types, reason = "see the import")]
struct Inner {
    connections: Arc<series::Table>,
    failures: [[AtomicU64; FAILURES]; 2],
    verdicts: [AtomicU64; COUNTERS as usize],
    audit: audit::Audit,
    handshakes: [AtomicU64; 2],
    handshake_failures: Mutex<BTreeMap<(Role, &'static str), u64>>,
    retried: [AtomicU64; CODES],
    violations: [AtomicU64; 2],
    marks_lost: AtomicU64,
    /// Silently refused connections: held, and over the limit.
    silent: [AtomicU64; 2],
    certificates: Mutex<BTreeMap<(String, String), CertificateInUse>>,
    crls: Mutex<BTreeMap<String, u64>>,
    clock_skew: AtomicU64,
    readiness: Readiness,
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

/// Histogram buckets of the time to apply a plan, in seconds: from a small change to a node's first plan.
const APPLY_BUCKETS: [f64; 12] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
];

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Starts all metrics at 0.
    #[must_use]
    #[expect(clippy::disallowed_types, reason = "see the import")]
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            connections: Arc::new(series::Table::new(MOST_SERIES)),
            failures: std::array::from_fn(|_| zeros()),
            verdicts: zeros(),
            audit: audit::Audit::default(),
            handshakes: zeros(),
            handshake_failures: Mutex::new(BTreeMap::new()),
            retried: zeros(),
            violations: zeros(),
            marks_lost: AtomicU64::new(0),
            silent: zeros(),
            certificates: Mutex::new(BTreeMap::new()),
            crls: Mutex::new(BTreeMap::new()),
            clock_skew: AtomicU64::new(0),
            readiness: Readiness::new(),
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

    /// Adds the kernel's counters to every page. Only the first call has an effect.
    pub fn set_kernel(&self, kernel: impl Kernel) {
        // A second source would make counters decrease.
        drop(self.0.kernel.set(Box::new(kernel)));
    }

    /// Counts a connection as opened; dropping the handle counts it as closed.
    #[must_use]
    pub fn open(&self, labels: Labels) -> Open {
        self.0.connections.open(labels)
    }

    /// Counts the failure of a connection; an orderly close is no failure.
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

    /// Counts a connection that is retried with another endpoint of its service, after `close` with the
    /// first one.
    pub fn retried(&self, close: &Close) {
        if let Close::Refused(Verdict { reason, .. }) | Close::Failed(reason) = close {
            self.0.retried[*reason as usize].fetch_add(1, Relaxed);
        }
    }

    /// Counts a silently refused connection: held, or over the limit.
    pub fn silent(&self, held: bool) {
        self.0.silent[usize::from(!held)].fetch_add(1, Relaxed);
    }

    /// Counts a decision of the agent. The kernel counts its own.
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

    /// Counts traffic that passed and that a rule in audit mode would have refused.
    pub(crate) fn audited(&self, direction: Direction, rule: &str, reason: Reason) {
        self.0.audit.count(direction, rule, reason);
    }

    /// Counts a TLS handshake; the error is the failure's label, one of a fixed set.
    pub fn handshake(&self, role: Role, result: Result<(), &'static str>) {
        match result {
            Ok(()) => {
                self.0.handshakes[role as usize].fetch_add(1, Relaxed);
            }
            Err(failure) => {
                let failures = self.0.handshake_failures.lock();
                let mut failures = failures.unwrap_or_else(PoisonError::into_inner);
                *failures.entry((role, failure)).or_default() += 1;
            }
        }
    }

    /// Sets the certificate in use of a service account; `None` = no longer any.
    pub fn certificate(
        &self,
        namespace: &str,
        service_account: &str,
        in_use: Option<CertificateInUse>,
    ) {
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

    /// Returns the resource usage of a workload's connections. It is shown while the value is kept.
    #[must_use]
    pub fn usage(&self, namespace: &str, workload: &str) -> Arc<Usage> {
        self.0.usage.of(namespace, workload)
    }

    /// Counts a protocol violation by the peer of a tunnel.
    pub fn violated(&self, role: Role) {
        self.0.violations[role as usize].fetch_add(1, Relaxed);
    }

    /// Counts a peer that was reached on the tunnel port only, and not on an application's port.
    pub fn mark_lost(&self) {
        self.0.marks_lost.fetch_add(1, Relaxed);
    }

    /// Sets the promised time of the next update of each revocation list, in seconds since 1970, by file.
    pub fn revocation_lists(&self, next_updates: BTreeMap<String, u64>) {
        *self.0.crls.lock().unwrap_or_else(PoisonError::into_inner) = next_updates;
    }

    /// Sets the observed lag of this node's clock.
    pub fn clock_skew(&self, behind: Duration) {
        self.0.clock_skew.store(behind.as_secs(), Relaxed);
    }

    /// Sets the revision of the plan in force, and counts the time from the change to its being in force.
    pub fn plan_applied(&self, revision: u64, took: Duration) {
        self.0.plan_apply.observe(took.as_secs_f64());
        self.0.revision.store(revision, Relaxed);
    }

    /// Sets the number of rejected fields of objects.
    pub fn rejected_fields(&self, rejected: usize) {
        self.0.rejected.store(rejected as u64, Relaxed);
    }

    /// Sets whether the source of the cluster's state is stale.
    pub fn source_stale(&self, stale: bool) {
        self.0.stale.store(stale.into(), Relaxed);
    }

    /// Sets the number of pods by protection.
    pub fn pods(&self, counts: PodCounts) {
        *self.0.pods.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// Returns the readiness that the page shows (`mesh_ready`).
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.0.readiness
    }

    /// Counts records lost on the way to the flow log.
    pub(crate) fn lost(&self, records: u64) {
        self.0.lost.fetch_add(records, Relaxed);
    }

    /// Counts a task that panicked.
    pub fn panicked(&self) {
        self.0.panics.fetch_add(1, Relaxed);
    }

    /// Returns the counters of connections at `now`, without series that have been idle for long.
    #[must_use]
    pub fn connections(&self, now: Instant) -> Vec<(Labels, Totals)> {
        self.0.connections.snapshot(now)
    }

    /// Writes the page.
    #[must_use]
    pub fn page(&self, format: Format) -> String {
        page(encode::Page(self.clone()), format)
    }
}

#[cfg(test)]
mod tests;
