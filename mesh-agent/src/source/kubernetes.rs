// SPDX-License-Identifier: Apache-2.0
//! Reads the cluster snapshot from the Kubernetes API.
//!
//! One thread runs everything here. A task per kind lists and watches its objects ([`stream`]), and
//! [`KubernetesSource`] keeps only the parsed content of every object
//! ([`mesh_api::IncrementalConverter`]). Nothing is published before every kind is listed completely.
//! After that, changes that arrive together are published together. While the API server is
//! unavailable, the last snapshot stays in force and the report has the reason.

mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kube::Client;
use mesh_api::{IncrementalConverter, Kind, Options};
use mesh_plan::cluster::{ClusterSnapshot, ObjectRef};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};

use super::state::{LastGoodFile, State, Written};
use super::{Error, Report, Settings, Watched, log_new_messages, replace};
use stream::Event;

use mesh_backoff::Backoff;

/// The delay from a change to its publication: related changes often arrive together.
const SETTLE: Duration = Duration::from_millis(3);
/// The shortest pause between two publications. After a publication that took longer, the pause is twice
/// that time, so that continuous changes do not use a whole CPU.
const REST: Duration = Duration::from_millis(15);
/// The longest time that changes wait for a list in progress.
const LIST_WAIT: Duration = Duration::from_secs(2);
/// The capacity of the channel from the watch tasks.
const QUEUE: usize = 128;

/// The delay before a failed request to the API server is retried: agents of many nodes that lost one
/// API server do not return at the same moment.
pub(super) const RETRY: Backoff = Backoff {
    first: Duration::from_millis(400),
    longest: Duration::from_secs(20),
    jitter: 0.5..=1.0,
};

const CLUSTER: Options = Options { standalone: false };

/// Starts the thread. The snapshot is empty until it is complete.
pub(super) async fn watch(settings: Settings) -> Result<Watched, Error> {
    let (started, begun) = oneshot::channel();
    thread::Builder::new()
        .name("source-kube".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match runtime {
                Ok(runtime) => runtime.block_on(run(settings, started)),
                // The caller gets the error, or sees that the channel closed.
                Err(error) => drop(started.send(Err(Error::Thread(error)))),
            }
        })
        .map_err(Error::Thread)?;
    begun
        .await
        .map_err(|ended| Error::Thread(std::io::Error::other(ended)))?
}

async fn run(settings: Settings, started: oneshot::Sender<Result<Watched, Error>>) {
    let client = match mesh_kube::connect(settings.kubeconfig.as_deref()).await {
        Ok(client) => client,
        Err(error) => return drop(started.send(Err(error.into()))),
    };
    let (mut source, watched) = KubernetesSource::open(settings, client);
    if started.send(Ok(watched)).is_ok() {
        source.run().await;
    }
}

/// The state of the list and watch of a kind.
#[derive(Debug, Default)]
struct Progress {
    /// True after the first complete list, or after the API server was found not to serve the kind.
    complete: bool,
    /// The objects of the list in progress.
    listing: Option<BTreeSet<ObjectRef>>,
    /// True if the API server does not serve the kind and the agent knows no objects of it.
    absent: bool,
    /// The reason why the kind cannot be watched now.
    error: Option<String>,
}

struct KubernetesSource {
    settings: Settings,
    client: Client,
    converter: IncrementalConverter,
    saved: LastGoodFile,
    /// The write to the disk in progress.
    writing: Option<JoinHandle<Written>>,
    progress: BTreeMap<Kind, Progress>,
    /// The time of the first change that is not published.
    changed: Option<Instant>,
    /// The earliest time of the next publication.
    rested: Option<Instant>,
    cluster: watch::Sender<Arc<ClusterSnapshot>>,
    report: watch::Sender<Arc<Report>>,
    complete: watch::Sender<bool>,
}

impl KubernetesSource {
    fn open(settings: Settings, client: Client) -> (Self, Watched) {
        let (saved, kept) = LastGoodFile::open(&settings.state_dir);
        let (cluster, clusters) = watch::channel(Arc::default());
        let (report, reports) = watch::channel(Arc::default());
        let (complete, is_complete) = watch::channel(false);
        let source = Self {
            converter: IncrementalConverter::new(kept.last_good, CLUSTER),
            settings,
            client,
            saved,
            writing: None,
            progress: Kind::ALL
                .iter()
                .map(|kind| (*kind, Progress::default()))
                .collect(),
            changed: None,
            rested: None,
            cluster,
            report,
            complete,
        };
        source.report_state();
        let watched = Watched {
            cluster: clusters,
            report: reports,
            complete: is_complete,
        };
        (source, watched)
    }

    async fn run(&mut self) {
        let (to, mut events) = mpsc::channel(QUEUE);
        for kind in Kind::ALL {
            tokio::spawn(stream::follow(self.client.clone(), *kind, to.clone()));
        }
        drop(to);
        let mut batch = Vec::with_capacity(QUEUE);
        let unwanted = self.cluster.clone();
        loop {
            let due = self.publish_at();
            let save = self.saved.due().filter(|_| self.writing.is_none());
            tokio::select! {
                count = events.recv_many(&mut batch, QUEUE) => {
                    if count == 0 {
                        return;
                    }
                    for (kind, event) in batch.drain(..) {
                        self.handle(kind, event);
                    }
                }
                () = at(due) => self.publish(),
                () = at(save) => self.save(),
                written = finished(&mut self.writing) => {
                    self.writing = None;
                    self.saved.saved(written, &self.report);
                }
                // The tasks end with the runtime.
                () = unwanted.closed() => return,
            }
        }
    }

    fn handle(&mut self, kind: Kind, event: Event) {
        let Some(progress) = self.progress.get_mut(&kind) else {
            return;
        };
        let before = self.converter.changes();
        match event {
            Event::Listing => {
                progress.listing = Some(BTreeSet::new());
                return;
            }
            Event::Applied(value) => {
                let name = self.converter.apply(kind, &value);
                if let Some(listing) = &mut progress.listing {
                    listing.insert(name);
                }
                if self.converter.changes() == before {
                    return;
                }
            }
            Event::Deleted(value) => self.converter.remove(&name_of(kind, &value)),
            Event::Listed => {
                self.converter
                    .retain(kind, &progress.listing.take().unwrap_or_default());
                progress.complete = true;
                progress.absent = false;
            }
            Event::Absent => {
                if !progress.complete {
                    self.converter.restore(kind);
                }
                // Only a list or an event deletes an object. A version of the API that is no longer
                // served says nothing about the objects, which another version may still serve.
                let kept = self.converter.count(kind);
                let error = (kept > 0).then(|| {
                    format!(
                        "the API server no longer serves this kind; its objects ({kept}) stay in force"
                    )
                });
                if kept == 0 && !progress.absent {
                    tracing::info!(
                        kind = kind.name(),
                        "kind is not installed; checking again later"
                    );
                }
                progress.listing = None;
                progress.complete = true;
                progress.absent = kept == 0;
                self.set_error(kind, error);
            }
            Event::Health(error) => return self.set_error(kind, error),
        }
        self.changed.get_or_insert_with(Instant::now);
    }

    /// Sets or clears the reason why a kind cannot be watched, and reports a change.
    fn set_error(&mut self, kind: Kind, error: Option<String>) {
        if let Some(progress) = self.progress.get_mut(&kind)
            && progress.error != error
        {
            progress.error = error;
            self.report_state();
        }
    }

    fn publish_at(&self) -> Option<Instant> {
        let since = self.changed?;
        if self.progress.values().any(|p| !p.complete) {
            return None;
        }
        let is_listing = self.progress.values().any(|p| p.listing.is_some());
        let pause = if is_listing { LIST_WAIT } else { SETTLE };
        let due = since + pause;
        Some(self.rested.map_or(due, |rested| rested.max(due)))
    }

    fn publish(&mut self) {
        let start = Instant::now();
        self.changed = None;
        let mut outcome = self.converter.outcome();
        let extra = self.settings.pod_cidrs.iter().copied();
        outcome.cluster.pod_cidrs.extend(extra);
        let versions = &outcome.cluster.versions;
        let objects = outcome.rejections.iter().map(|rejection| &rejection.object);
        let rejected =
            objects.filter_map(|object| Some((object.clone(), versions.get(object)?.clone())));
        let report = Report {
            rejected: rejected.collect(),
            rejections: outcome.rejections,
            warnings: outcome.warnings,
            not_kept: self.report.borrow().not_kept.clone(),
            ..self.state()
        };
        log_new_messages(&self.report.borrow(), &report);
        replace(&self.report, report);
        self.saved.mark();
        replace(&self.cluster, outcome.cluster);
        self.rested = Some(Instant::now() + REST.max(start.elapsed() * 2));
        if !self.complete.send_replace(true) {
            tracing::info!(
                objects = self.converter.len(),
                "cluster snapshot is complete"
            );
        }
    }

    fn save(&mut self) {
        let state = State {
            last_good: self.converter.last_good(),
            ..State::default()
        };
        // A slow disk must not delay a policy change.
        let draft = self.saved.draft(state);
        self.writing = draft.map(|draft| spawn_blocking(|| draft.write()));
    }

    /// Updates the report with the state of the API server.
    fn report_state(&self) {
        let now = self.state();
        let has_error = self.progress.values().any(|p| p.error.is_some());
        self.report.send_if_modified(|report| {
            if report.stale == now.stale && report.absent == now.absent {
                return false;
            }
            match (&report.stale, &now.stale) {
                (_, Some(why)) if has_error => {
                    tracing::warn!(
                        why,
                        "cannot watch the API server; the last snapshot stays in force"
                    );
                }
                (Some(_), None) => tracing::info!("watching the API server"),
                (_, Some(_)) | (None, None) => {}
            }
            let report = Arc::make_mut(report);
            report.stale = now.stale;
            report.absent = now.absent;
            true
        });
    }

    fn state(&self) -> Report {
        let waiting = !*self.complete.borrow();
        // All kinds have the same API server and often the same error: kinds are grouped by error.
        let mut errors: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (kind, progress) in &self.progress {
            if let Some(why) = &progress.error {
                errors.entry(why).or_default().push(kind.name());
            } else if waiting && !progress.complete {
                let why = "the first list is not complete";
                errors.entry(why).or_default().push(kind.name());
            }
        }
        let one = |(why, kinds): (&&str, &Vec<&str>)| format!("{}: {why}", kinds.join(", "));
        let all: Vec<String> = errors.iter().map(one).collect();
        let absent = self.progress.iter().filter(|(_, p)| p.absent);
        Report {
            stale: (!all.is_empty()).then(|| all.join("; ")),
            absent: absent.map(|(kind, _)| kind.name().to_owned()).collect(),
            ..Report::default()
        }
    }
}

async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> T {
    let Some(task) = task else {
        return std::future::pending().await;
    };
    match task.await {
        Ok(value) => value,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(_cancelled) => std::future::pending().await,
        },
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

fn name_of(kind: Kind, value: &Value) -> ObjectRef {
    let text = |field: &str| {
        let text = value.get("metadata").and_then(|m| m.get(field));
        text.and_then(Value::as_str).unwrap_or_default()
    };
    ObjectRef::new(kind.name(), text("namespace"), text("name"))
}
