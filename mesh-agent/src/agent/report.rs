// SPDX-License-Identifier: Apache-2.0
//! The report of this node in its MeshNode object.
//!
//! Other nodes send tunnels to a pod once its node has reported it, so nothing is reported too early: a
//! namespace is reported when all its pods on this node accept tunnels; until then, the single pods that
//! do. Reports are not retracted: pods come and go without a write, and a client of a pod that is just
//! starting retries.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use mesh_api::crd::{MeshNodeStatus, ReportedField, ReportedObject, UnprotectedPod};
use mesh_plan::cluster::{ClusterSnapshot, ObjectRef, Rejection, Version};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use crate::control::{InForce, PodStatus};
use crate::source::Report;
use mesh_datapath::Host;
use mesh_datapath::check;

/// Time after which an unprotected pod is reported: a starting pod is unprotected for a moment.
const LASTING: Duration = Duration::from_secs(3);

/// Time in which changes are combined into one report.
const BATCH: Duration = Duration::from_millis(100);

/// Maximum number of reported rejections, and of warnings: the size of an object is bounded to 1.5 MiB.
const MOST: usize = 1000;

/// The inputs of a report.
pub(super) struct Sources {
    /// Name of this node.
    pub(super) node: String,
    /// The state of the node.
    pub(super) in_force: watch::Receiver<Arc<InForce>>,
    /// The state of the objects.
    pub(super) source: watch::Receiver<Arc<Report>>,
    /// The host that is probed.
    pub(super) host: Host,
    /// Turns true when a successor reports.
    pub(super) replaced: watch::Receiver<bool>,
    /// Clock of the time of day.
    pub(super) now: fn() -> SystemTime,
}

/// Reports from the first applied plan on, until a successor reports.
pub(super) async fn run(mut from: Sources, to: watch::Sender<Option<Arc<MeshNodeStatus>>>) {
    let first = from
        .in_force
        .wait_for(|now| now.status.applied > 0)
        .await
        .is_ok();
    let mut probed = probe(from.host);
    let mut is_probed = false;
    let mut reporter = Reporter {
        node: from.node,
        ..Reporter::default()
    };
    while first && !*from.replaced.borrow() {
        let node = Arc::clone(&from.in_force.borrow_and_update());
        let source = Arc::clone(&from.source.borrow_and_update());
        let (report, soon) = reporter.report(&node, &source, (from.now)());
        drop(node);
        to.send_if_modified(|old| {
            let changed = old.as_deref() != Some(&report);
            *old = Some(Arc::new(report));
            changed
        });
        sleep(BATCH).await;
        tokio::select! {
            news = from.in_force.changed() => if news.is_err() { return },
            news = from.source.changed() => if news.is_err() { return },
            found = &mut probed, if !is_probed => {
                is_probed = true;
                reporter.features = found.map(|found| features(&found)).unwrap_or_default();
            }
            () = sleep(LASTING / 3), if soon => {}
            _ = from.replaced.changed() => {}
        }
    }
}

/// Probes the host on a thread of its own, which takes seconds.
fn probe(host: Host) -> oneshot::Receiver<check::Report> {
    let (to, found) = oneshot::channel();
    let thread = std::thread::Builder::new().name("mesh-probe".to_owned());
    // Without the thread, the kernel's features are not reported.
    drop(thread.spawn(move || drop(to.send(check::run(&host)))));
    found
}

/// Makes reports; each depends on the reports before it.
#[derive(Debug, Default)]
struct Reporter {
    /// Name of this node.
    node: String,
    /// The kernel's features: used, missing.
    features: (Vec<String>, Vec<String>),
    /// UIDs of namespaces and pods that were reported to accept tunnels.
    reported: BTreeSet<String>,
    /// Pods that are not protected, by UID: why and since when.
    unprotected: BTreeMap<String, (String, SystemTime)>,
}

impl Reporter {
    /// Returns the reasons why the newest plan or state is not in force on this node, and the warnings of objects.
    fn warnings(&self, node: &InForce, source: &Report) -> Vec<ReportedField> {
        let of_node = |message: String| ReportedField {
            object: named(&ObjectRef::new("Node", "", &*self.node), "", 0),
            field: String::new(),
            message,
        };
        let error = node.status.error.as_ref();
        let error =
            error.map(|why| of_node(format!("the newest plan is not completely in force: {why}")));
        let stale = source.stale.as_ref();
        let stale = stale.map(|why| of_node(format!("the cluster's state is not current: {why}")));
        let of_objects = source.warnings.iter().map(|warning| {
            let version = node.snapshot.versions.get(&warning.object);
            let version = version.cloned().unwrap_or_default();
            ReportedField {
                object: named(&warning.object, &version.uid, version.newest),
                field: warning.field.clone(),
                message: warning.what.clone(),
            }
        });
        error
            .into_iter()
            .chain(stale)
            .chain(of_objects)
            .take(MOST)
            .collect()
    }

    /// The report of this state, and whether time alone changes it.
    fn report(
        &mut self,
        node: &InForce,
        source: &Report,
        now: SystemTime,
    ) -> (MeshNodeStatus, bool) {
        let (enrolled_namespaces, enrolled_pods) = self.enrolled(node);
        let (unprotected, soon) = self.unprotected(node, now);
        let report = MeshNodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            observed_at: None,
            features: self.features.0.clone(),
            missing_features: self.features.1.clone(),
            enrolled_namespaces,
            enrolled_pods,
            in_force: in_force(&node.snapshot),
            rejections: rejections(node, source),
            warnings: self.warnings(node, source),
            unprotected,
        };
        (report, soon)
    }

    fn enrolled(&mut self, node: &InForce) -> (Vec<String>, Vec<String>) {
        let snapshot = &node.snapshot;
        let was_ready = |uid: &str| {
            snapshot
                .ready
                .as_ref()
                .is_some_and(|ready| ready.contains(uid))
        };
        let mut namespaces = BTreeSet::new();
        let mut pods = BTreeSet::new();
        for (name, namespace) in &snapshot.namespaces {
            let mine = node
                .status
                .pods
                .iter()
                .filter(|(_, pod)| pod.name.namespace == *name);
            let wanted: Vec<(&String, &PodStatus)> = mine.filter(|(_, pod)| pod.wanted).collect();
            let enrols =
                mesh_plan::authentication::enrols(snapshot, name) && !namespace.uid.is_empty();
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

    fn unprotected(&mut self, node: &InForce, now: SystemTime) -> (Vec<UnprotectedPod>, bool) {
        let mut all = BTreeMap::new();
        let mut listed = Vec::new();
        for (uid, pod) in &node.status.pods {
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

/// Returns the reason why a pod lacks its requested protection.
fn why_not(pod: &PodStatus) -> Option<String> {
    let known = || pod.trouble.clone();
    if pod.wanted && !pod.enrolled {
        return Some(known().unwrap_or_else(|| "not enrolled yet".to_owned()));
    }
    if !pod.gated {
        return Some(known().unwrap_or_else(|| "no tc gate is attached".to_owned()));
    }
    None
}

fn in_force(snapshot: &ClusterSnapshot) -> Vec<ReportedObject> {
    let accepted = snapshot
        .versions
        .iter()
        .filter(|(_, version)| version.generation > 0);
    accepted
        .map(|(object, version)| named(object, &version.uid, version.generation))
        .collect()
}

/// Combines the rejections of the objects' newest versions with those of the compiler.
fn rejections(node: &InForce, source: &Report) -> Vec<ReportedField> {
    let of_objects = source.rejections.iter().map(|one| (one, &source.rejected));
    let of_plan = node
        .status
        .rejections
        .iter()
        .map(|one| (one, &*node.snapshot.versions));
    let reported: BTreeSet<ReportedField> = of_objects
        .chain(of_plan)
        .map(|(rejection, versions)| reported(rejection, versions))
        .collect();
    reported.into_iter().take(MOST).collect()
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

/// Formats a time in whole seconds, as Kubernetes does.
fn time(at: SystemTime) -> Option<Time> {
    let exact = Timestamp::try_from(at).ok()?;
    Timestamp::from_second(exact.as_second()).ok().map(Time)
}

/// Lists the kernel features that probing found, and the missing ones.
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
