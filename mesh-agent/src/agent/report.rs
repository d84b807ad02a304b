// SPDX-License-Identifier: Apache-2.0
//! What this node reports about itself in its MeshNode, of what the rooms say.
//!
//! Others send a pod tunnels once its node reported it, so nothing is reported before it is true:
//! a namespace when every pod of it here accepts tunnels, and while one does not, the pods that
//! do. What was reported stays reported: pods come and go without a write, and whoever connects to
//! one that is just starting tries again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use mesh_api::crd::{MeshNodeStatus, ReportedField, ReportedObject, UnprotectedPod};
use mesh_plan::cluster::{Cluster, ObjectRef, Rejection, Version};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use crate::control::{PodStatus, Status};
use crate::source::Report;
use mesh_datapath::Host;
use mesh_datapath::check;

/// A pod that starts is not protected for a moment; only what lasts longer is reported.
const LASTING: Duration = Duration::from_secs(3);

/// Changes that come together are reported together.
const FOLD: Duration = Duration::from_millis(100);

/// At most as many rejections are reported, and as many warnings: an object has a bound of 1.5 MiB.
const MOST: usize = 1000;

/// What a report is made of.
pub(super) struct Sources {
    /// How it goes with the node.
    pub(super) status: watch::Receiver<Arc<Status>>,
    /// How it goes with the objects.
    pub(super) source: watch::Receiver<Arc<Report>>,
    /// What of the machine is probed.
    pub(super) host: Host,
    /// Turns true when another agent reports.
    pub(super) quiet: watch::Receiver<bool>,
    /// The time of day.
    pub(super) now: fn() -> SystemTime,
}

/// Reports from the first plan on, until another agent does.
pub(super) async fn run(mut from: Sources, to: watch::Sender<Option<Arc<MeshNodeStatus>>>) {
    let first = from
        .status
        .wait_for(|status| status.revision > 0)
        .await
        .is_ok();
    let mut probed = probe(from.host);
    let mut is_probed = false;
    let mut reporter = Reporter::default();
    while first && !*from.quiet.borrow() {
        let status = Arc::clone(&from.status.borrow_and_update());
        let source = Arc::clone(&from.source.borrow_and_update());
        let (report, soon) = reporter.report(&status, &source, (from.now)());
        to.send_if_modified(|old| {
            let changed = old.as_deref() != Some(&report);
            *old = Some(Arc::new(report));
            changed
        });
        sleep(FOLD).await;
        tokio::select! {
            news = from.status.changed() => if news.is_err() { return },
            news = from.source.changed() => if news.is_err() { return },
            found = &mut probed, if !is_probed => {
                is_probed = true;
                reporter.features = found.map(|found| features(&found)).unwrap_or_default();
            }
            () = sleep(LASTING / 3), if soon => {}
            _ = from.quiet.changed() => {}
        }
    }
}

/// Probes the machine, which takes seconds, on a thread of its own.
fn probe(host: Host) -> oneshot::Receiver<check::Report> {
    let (to, found) = oneshot::channel();
    let thread = std::thread::Builder::new().name("mesh-probe".to_owned());
    // Without it nothing is reported of the kernel's features.
    drop(thread.spawn(move || drop(to.send(check::run(&host)))));
    found
}

/// Makes one report after the other.
#[derive(Debug, Default)]
struct Reporter {
    /// The kernel's features: used, missing.
    features: (Vec<String>, Vec<String>),
    /// UIDs of namespaces and pods that were reported to accept tunnels.
    reported: BTreeSet<String>,
    /// Pods that are not protected, by UID: why and since when.
    unprotected: BTreeMap<String, (String, SystemTime)>,
}

impl Reporter {
    /// The report of this state, and whether time alone changes it.
    fn report(
        &mut self,
        status: &Status,
        source: &Report,
        now: SystemTime,
    ) -> (MeshNodeStatus, bool) {
        let (enrolled_namespaces, enrolled_pods) = self.enrolled(status);
        let (unprotected, soon) = self.unprotected(status, now);
        let report = MeshNodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            observed_at: None,
            features: self.features.0.clone(),
            missing_features: self.features.1.clone(),
            enrolled_namespaces,
            enrolled_pods,
            in_force: in_force(&status.facts),
            rejections: rejections(status, source),
            warnings: warnings(status, source),
            unprotected,
        };
        (report, soon)
    }

    fn enrolled(&mut self, status: &Status) -> (Vec<String>, Vec<String>) {
        let facts = &status.facts;
        let was_ready = |uid: &str| {
            facts
                .ready
                .as_ref()
                .is_some_and(|ready| ready.contains(uid))
        };
        let mut namespaces = BTreeSet::new();
        let mut pods = BTreeSet::new();
        for (name, namespace) in &facts.namespaces {
            let mine = status
                .pods
                .iter()
                .filter(|(_, pod)| pod.name.namespace == *name);
            let wanted: Vec<(&String, &PodStatus)> = mine.filter(|(_, pod)| pod.wanted).collect();
            let enrols =
                mesh_plan::authentication::enrols(facts, name) && !namespace.uid.is_empty();
            // An earlier agent may have reported it, and others rely on that.
            let accepted = wanted.iter().all(|(_, pod)| pod.enrolled)
                || self.reported.contains(&namespace.uid)
                || wanted.iter().all(|(uid, _)| was_ready(uid));
            if enrols && accepted {
                namespaces.insert(namespace.uid.clone());
                continue;
            }
            let accept = |(uid, pod): &(&String, &PodStatus)| {
                pod.enrolled || self.reported.contains(*uid) || was_ready(uid)
            };
            pods.extend(
                wanted
                    .into_iter()
                    .filter(accept)
                    .map(|(uid, _)| uid.clone()),
            );
        }
        self.reported = namespaces.union(&pods).cloned().collect();
        (namespaces.into_iter().collect(), pods.into_iter().collect())
    }

    fn unprotected(&mut self, status: &Status, now: SystemTime) -> (Vec<UnprotectedPod>, bool) {
        let mut all = BTreeMap::new();
        let mut listed = Vec::new();
        for (uid, pod) in &status.pods {
            let Some(reason) = why_not(pod) else {
                continue;
            };
            let since = self.unprotected.get(uid).map_or(now, |(_, since)| *since);
            all.insert(uid.clone(), (reason.clone(), since));
            if now.duration_since(since).unwrap_or_default() < LASTING {
                continue;
            }
            listed.push(UnprotectedPod {
                namespace: pod.name.namespace.clone(),
                name: pod.name.name.clone(),
                uid: uid.clone(),
                reason,
                since: time(since),
            });
        }
        let soon = all.len() > listed.len();
        self.unprotected = all;
        (listed, soon)
    }
}

/// Why a pod is not as protected as it is to be.
fn why_not(pod: &PodStatus) -> Option<String> {
    let known = || pod.trouble.clone();
    if pod.wanted && !pod.enrolled {
        return Some(known().unwrap_or_else(|| "not enrolled yet".to_owned()));
    }
    if !pod.gated {
        return Some(known().unwrap_or_else(|| "no gate holds its packets".to_owned()));
    }
    None
}

fn in_force(facts: &Cluster) -> Vec<ReportedObject> {
    let accepted = facts
        .versions
        .iter()
        .filter(|(_, version)| version.generation > 0);
    accepted
        .map(|(object, version)| named(object, &version.uid, version.generation))
        .collect()
}

/// Those of the objects' newest versions, and those of what is in force that cannot be compiled.
fn rejections(status: &Status, source: &Report) -> Vec<ReportedField> {
    let of_objects = source.rejections.iter().map(|one| (one, &source.rejected));
    let of_plan = status
        .rejections
        .iter()
        .map(|one| (one, &*status.facts.versions));
    let reported: BTreeSet<ReportedField> = of_objects
        .chain(of_plan)
        .map(|(rejection, versions)| reported(rejection, versions))
        .collect();
    reported.into_iter().take(MOST).collect()
}

fn warnings(status: &Status, source: &Report) -> Vec<ReportedField> {
    let all = source.warnings.iter().take(MOST).map(|warning| {
        let version = status.facts.versions.get(&warning.object);
        let version = version.cloned().unwrap_or_default();
        ReportedField {
            object: named(&warning.object, &version.uid, version.newest),
            field: warning.field.clone(),
            message: warning.what.clone(),
        }
    });
    all.collect()
}

fn reported(rejection: &Rejection, versions: &BTreeMap<ObjectRef, Version>) -> ReportedField {
    let version = versions.get(&rejection.object).cloned().unwrap_or_default();
    ReportedField {
        object: named(&rejection.object, &version.uid, version.newest),
        field: rejection.field.clone(),
        message: format!("{}; {}", rejection.why, rejection.consequence),
    }
}

fn named(object: &ObjectRef, uid: &str, generation: i64) -> ReportedObject {
    ReportedObject {
        kind: object.kind.clone(),
        namespace: object.namespace.clone(),
        name: object.name.clone(),
        uid: uid.to_owned(),
        generation,
    }
}

/// In whole seconds, as Kubernetes writes times.
fn time(at: SystemTime) -> Option<Time> {
    let exact = Timestamp::try_from(at).ok()?;
    Timestamp::from_second(exact.as_second()).ok().map(Time)
}

/// What probing found: what is there, and what is missing.
fn features(found: &check::Report) -> (Vec<String>, Vec<String>) {
    let (present, missing): (Vec<_>, Vec<_>) = found
        .0
        .iter()
        .partition(|finding| matches!(finding.outcome, check::Outcome::Present(_)));
    let names = |all: Vec<&check::Finding>| all.iter().map(|one| one.what.to_owned()).collect();
    (names(present), names(missing))
}

#[cfg(test)]
mod tests;
