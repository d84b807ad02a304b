// SPDX-License-Identifier: Apache-2.0
//! Shows what rooms publish in metrics, readiness and the admin interface. Only copies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use mesh_plan::Rejection;
use tokio::sync::watch;

use crate::admin::{Readiness, ReadyTask};
use crate::control::{Status, Views};
use crate::metrics::{InUse, Metrics, PodCounts};
use crate::source::Report;
use mesh_identity::{Identities, Snapshot, SpiffeId};

/// How often that is looked at which nobody announces.
const LOOK: Duration = Duration::from_secs(10);

/// The conditions of readiness that are fulfilled here.
pub(super) struct Conditions {
    /// The first plan is in force.
    pub(super) in_force: ReadyTask,
    /// Every identity of this node has a certificate.
    pub(super) certified: ReadyTask,
    /// Where it is said that one of them is revoked.
    pub(super) readiness: Readiness,
}

/// Starts the copying; ends with the rooms. Returns what is rejected now, by source and compiler.
pub(super) fn start(
    views: &Views,
    report: watch::Receiver<Arc<Report>>,
    identities: &Identities,
    metrics: &Metrics,
    conditions: Conditions,
) -> watch::Receiver<Arc<Vec<Rejection>>> {
    let (rejections, rejected) = watch::channel(Arc::new(Vec::new()));
    tokio::spawn(statuses(
        views.status.clone(),
        report,
        metrics.clone(),
        rejections,
        conditions.in_force,
    ));
    tokio::spawn(certificates(
        identities.clone(),
        views.clone(),
        metrics.clone(),
        (conditions.certified, conditions.readiness),
    ));
    rejected
}

/// Waits until the first plan is in force, has failed, or the time is over.
pub(super) async fn first_plan(mut status: watch::Receiver<Arc<Status>>, longest: Duration) {
    let tried = status.wait_for(|status| status.revision > 0 || status.error.is_some());
    // Whatever came of it, the agent answers from now on.
    drop(tokio::time::timeout(longest, tried).await);
}

async fn statuses(
    mut status: watch::Receiver<Arc<Status>>,
    mut report: watch::Receiver<Arc<Report>>,
    metrics: Metrics,
    rejections: watch::Sender<Arc<Vec<Rejection>>>,
    in_force: ReadyTask,
) {
    let mut in_force = Some(in_force);
    let mut revision = 0;
    loop {
        let now = Arc::clone(&status.borrow_and_update());
        let said = Arc::clone(&report.borrow_and_update());
        metrics.source_stale(said.stale.is_some());
        let all = rejected(&now, &said);
        if now.revision > revision {
            revision = now.revision;
            metrics.plan_applied(now.took);
        }
        // What leaves the last good version in force makes no plan.
        metrics.rejected_fields(all.len());
        metrics.pods(counts(&now));
        rejections.send_if_modified(|old| {
            let changed = **old != all;
            *old = Arc::new(all);
            changed
        });
        if revision > 0
            && let Some(task) = in_force.take()
        {
            task.done();
        }
        tokio::select! {
            news = status.changed() => if news.is_err() { return },
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
        counts.isolated += u64::from(pod.cut_off);
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
    views: Views,
    metrics: Metrics,
    (certified, readiness): (ReadyTask, Readiness),
) {
    let mut snapshots = identities.subscribe();
    let mut status = views.status.clone();
    let mut certified = Some(certified);
    let mut shown: BTreeSet<SpiffeId> = BTreeSet::new();
    loop {
        let mut now = BTreeSet::new();
        let mut valid = true;
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        metrics.revocation_lists(next_updates(&snapshot));
        for certificate in snapshot.certificates() {
            let id = certificate.id();
            let ends = certificate.not_after().duration_since(UNIX_EPOCH);
            let ends = ends.unwrap_or_default().as_secs();
            let revoked = snapshot.is_revoked(certificate);
            valid &= !revoked;
            let in_use = InUse { ends, revoked };
            metrics.certificate(id.namespace(), id.service_account(), Some(in_use));
            now.insert(id.clone());
        }
        for gone in shown.difference(&now) {
            metrics.certificate(gone.namespace(), gone.service_account(), None);
        }
        shown = now;
        readiness.set("certificates not revoked", valid);
        let known = status.borrow_and_update().revision > 0;
        if known
            && views.wanted.borrow().iter().all(|id| shown.contains(id))
            && let Some(task) = certified.take()
        {
            task.done();
        }
        tokio::select! {
            news = snapshots.changed() => if news.is_err() { return },
            news = status.changed() => if news.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
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
