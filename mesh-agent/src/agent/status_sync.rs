// SPDX-License-Identifier: Apache-2.0
//! Copies the state of the node to metrics, readiness and the admin interface.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use mesh_plan::Rejection;
use mesh_telemetry::metrics::{CertificateInUse, Metrics, PodCounts};
use mesh_telemetry::readiness::{Readiness, ReadyTask};
use tokio::sync::watch;

use crate::control::{InForce, Status};
use crate::source::Report;
use mesh_identity::{Identities, Snapshot, SpiffeId, TrustDomain};

/// Interval of reading values that are not announced.
const INTERVAL: Duration = Duration::from_secs(10);

/// The conditions of readiness that are set here.
pub(super) struct Conditions {
    /// The first plan was applied.
    pub(super) applied: ReadyTask,
    /// Every identity of this node has a certificate.
    pub(super) certified: ReadyTask,
    /// Readiness, for the conditions that the newest plan is in force and that no certificate is revoked.
    pub(super) readiness: Readiness,
}

/// Starts copying, until `control` ends. Returns the fields that the source and the compiler reject.
pub(super) fn start(
    in_force: &watch::Receiver<Arc<InForce>>,
    report: watch::Receiver<Arc<Report>>,
    identities: &Identities,
    metrics: &Metrics,
    conditions: Conditions,
) -> watch::Receiver<Arc<Vec<Rejection>>> {
    let (rejections, rejected) = watch::channel(Arc::new(Vec::new()));
    tokio::spawn(statuses(
        in_force.clone(),
        report,
        metrics.clone(),
        rejections,
        (conditions.applied, conditions.readiness.clone()),
    ));
    tokio::spawn(certificates(
        identities.clone(),
        in_force.clone(),
        metrics.clone(),
        (conditions.certified, conditions.readiness),
    ));
    rejected
}

/// Waits until the first plan was applied or has failed, or until the timeout.
pub(super) async fn first_plan(mut in_force: watch::Receiver<Arc<InForce>>, timeout: Duration) {
    let tried = in_force.wait_for(|now| now.status.applied > 0 || now.status.error.is_some());
    // The agent answers from now on in any case.
    drop(tokio::time::timeout(timeout, tried).await);
}

/// Derives the identities that need certificates, until `control` ends.
pub(super) fn identities(
    mut in_force: watch::Receiver<Arc<InForce>>,
    trust_domain: TrustDomain,
) -> watch::Receiver<BTreeSet<SpiffeId>> {
    let (sender, wanted) = watch::channel(BTreeSet::new());
    tokio::spawn(async move {
        loop {
            let (pods, identities) = {
                let now = in_force.borrow_and_update();
                (Arc::downgrade(&now.pods), now.identities(&trust_domain))
            };
            sender.send_if_modified(|old| {
                let changed = *old != identities;
                *old = identities;
                changed
            });
            // A pod gets listeners or loses them with a new table.
            let is_newer =
                |now: &Arc<InForce>| !std::ptr::eq(Arc::as_ptr(&now.pods), pods.as_ptr());
            if in_force.wait_for(is_newer).await.is_err() {
                return;
            }
        }
    });
    wanted
}

async fn statuses(
    mut in_force: watch::Receiver<Arc<InForce>>,
    mut report: watch::Receiver<Arc<Report>>,
    metrics: Metrics,
    rejections: watch::Sender<Arc<Vec<Rejection>>>,
    (applied, readiness): (ReadyTask, Readiness),
) {
    let mut applied = Some(applied);
    let mut revision = 0;
    loop {
        let now = Arc::clone(&in_force.borrow_and_update().status);
        let said = Arc::clone(&report.borrow_and_update());
        metrics.source_stale(said.stale.is_some());
        readiness.set("newest plan in force", now.error.is_none());
        let all = rejected(&now, &said);
        if now.applied > revision {
            revision = now.applied;
            metrics.plan_applied(revision, now.took);
        }
        // A rejected object does not make a new plan.
        metrics.rejected_fields(all.len());
        metrics.pods(counts(&now));
        rejections.send_if_modified(|old| {
            let changed = **old != all;
            *old = Arc::new(all);
            changed
        });
        if revision > 0
            && let Some(task) = applied.take()
        {
            task.done();
        }
        tokio::select! {
            news = in_force.changed() => if news.is_err() { return },
            news = report.changed() => if news.is_err() { return },
        }
    }
}

fn rejected(status: &Status, report: &Report) -> Vec<Rejection> {
    let all: BTreeSet<&Rejection> = status.rejections.iter().chain(&report.rejections).collect();
    all.into_iter().cloned().collect()
}

fn counts(status: &Status) -> PodCounts {
    let mut counts = PodCounts::default();
    for pod in status.pods.values() {
        counts.isolated += u64::from(pod.isolated);
        if !pod.gated {
            counts.not_protected += 1;
        } else if pod.enrolled {
            counts.enrolled += 1;
        } else {
            counts.not_enrolled += 1;
        }
    }
    counts
}

async fn certificates(
    identities: Identities,
    mut in_force: watch::Receiver<Arc<InForce>>,
    metrics: Metrics,
    (certified, readiness): (ReadyTask, Readiness),
) {
    let mut snapshots = identities.subscribe();
    let mut certified = Some(certified);
    let mut shown: BTreeSet<SpiffeId> = BTreeSet::new();
    loop {
        let mut now = BTreeSet::new();
        let mut valid = true;
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        metrics.revocation_lists(next_updates(&snapshot));
        for certificate in snapshot.certificates() {
            let id = certificate.id();
            let expires = certificate.not_after().duration_since(UNIX_EPOCH);
            let expires = expires.unwrap_or_default().as_secs();
            let revoked = snapshot.is_revoked(certificate);
            valid &= !revoked;
            let in_use = CertificateInUse { expires, revoked };
            metrics.certificate(id.namespace(), id.service_account(), Some(in_use));
            now.insert(id.clone());
        }
        for gone in shown.difference(&now) {
            metrics.certificate(gone.namespace(), gone.service_account(), None);
        }
        shown = now;
        readiness.set("certificates not revoked", valid);
        let is_covered = {
            let now = in_force.borrow_and_update();
            let wanted = now.identities(identities.trust_domain());
            now.status.applied > 0 && wanted.iter().all(|id| shown.contains(id))
        };
        if is_covered && let Some(task) = certified.take() {
            task.done();
        }
        tokio::select! {
            news = snapshots.changed() => if news.is_err() { return },
            news = in_force.changed() => if news.is_err() { return },
            () = tokio::time::sleep(INTERVAL) => {}
        }
        metrics.clock_skew(identities.clock_skew());
    }
}

fn next_updates(snapshot: &Snapshot) -> BTreeMap<String, u64> {
    let lists = snapshot.bundle().revocation_lists();
    let lists = lists.map(|(file, at)| {
        let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        (file.display().to_string(), at.as_secs())
    });
    lists.collect()
}
