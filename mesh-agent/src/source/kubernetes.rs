// SPDX-License-Identifier: Apache-2.0
//! The Kubernetes API.
//!
//! One thread owns everything here: a task for each kind follows it ([`stream`]), and the room
//! keeps of every object only what it says ([`mesh_api::Facts`]). Nothing is published before every
//! kind is complete; later, changes that come together are published together. While the server is
//! away the last facts stay, and the report says so.

mod kinds;
mod lean;
pub(super) mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kube::Client;
use mesh_api::{Facts, Object, Options};
use mesh_plan::cluster::{Cluster, ObjectRef};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};

use super::state::{Keeper, State, Written};
use super::{Error, Report, Settings, Watched, announce, replace};
use kinds::{KINDS, Kind};
use stream::News;

/// From a change to its publication: what belongs together often comes together.
const TOGETHER: Duration = Duration::from_millis(3);
/// Between two publications, at least. A longer one is followed by twice its time: changes that never
/// end must not take all of a CPU.
const REST: Duration = Duration::from_millis(15);
/// While a kind is listed again, changes wait this long for its end.
const LIST: Duration = Duration::from_secs(2);
/// Objects on their way to the room.
const QUEUE: usize = 128;

const CLUSTER: Options = Options { standalone: false };

/// Starts the thread. The facts are empty until they are complete.
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
                // Who waits learns it by the end of the channel or the message.
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
    let (mut room, watched) = Room::open(settings, client);
    if started.send(Ok(watched)).is_ok() {
        room.run().await;
    }
}

/// How it goes with a kind.
#[derive(Debug, Default)]
struct Progress {
    /// Everything was listed once, or the kind is known to be absent.
    complete: bool,
    /// What the list that runs has named so far.
    listing: Option<BTreeSet<ObjectRef>>,
    absent: bool,
    /// Why it cannot be followed.
    trouble: Option<String>,
}

struct Room {
    settings: Settings,
    client: Client,
    facts: Facts,
    keeper: Keeper,
    /// What is being written to the disk.
    writing: Option<JoinHandle<Written>>,
    progress: BTreeMap<&'static str, Progress>,
    /// Since when there is something to publish.
    changed: Option<Instant>,
    /// No publication before.
    rested: Option<Instant>,
    cluster: watch::Sender<Arc<Cluster>>,
    report: watch::Sender<Arc<Report>>,
    complete: watch::Sender<bool>,
}

impl Room {
    fn open(settings: Settings, client: Client) -> (Self, Watched) {
        let (keeper, kept) = Keeper::open(&settings.state_dir);
        let (cluster, clusters) = watch::channel(Arc::default());
        let (report, reports) = watch::channel(Arc::default());
        let (complete, is_complete) = watch::channel(false);
        let room = Self {
            facts: Facts::new(kept.last_good, CLUSTER),
            settings,
            client,
            keeper,
            writing: None,
            progress: KINDS
                .iter()
                .map(|k| (k.name, Progress::default()))
                .collect(),
            changed: None,
            rested: None,
            cluster,
            report,
            complete,
        };
        room.say();
        let watched = Watched {
            cluster: clusters,
            report: reports,
            complete: is_complete,
        };
        (room, watched)
    }

    async fn run(&mut self) {
        let (to, mut news) = mpsc::channel(QUEUE);
        for kind in &KINDS {
            tokio::spawn(stream::follow(self.client.clone(), kind, to.clone()));
        }
        drop(to);
        let mut batch = Vec::with_capacity(QUEUE);
        let unwanted = self.cluster.clone();
        loop {
            let due = self.publish_at();
            let save = self.keeper.due().filter(|_| self.writing.is_none());
            tokio::select! {
                count = news.recv_many(&mut batch, QUEUE) => {
                    if count == 0 {
                        return;
                    }
                    for (kind, news) in batch.drain(..) {
                        self.learn(kind, news);
                    }
                }
                () = at(due) => self.publish(),
                () = at(save) => self.save(),
                written = end(&mut self.writing) => {
                    self.writing = None;
                    self.keeper.saved(written, &self.report);
                }
                // The tasks end with the runtime.
                () = unwanted.closed() => return,
            }
        }
    }

    fn learn(&mut self, kind: &'static Kind, news: News) {
        let Some(progress) = self.progress.get_mut(kind.name) else {
            return;
        };
        let before = self.facts.changes();
        match news {
            News::Listing => {
                progress.listing = Some(BTreeSet::new());
                return;
            }
            News::Is(value) => {
                let object = Object {
                    origin: String::new(),
                    value,
                };
                let name = self.facts.apply(&object);
                if let (Some(listing), Some(name)) = (&mut progress.listing, name) {
                    listing.insert(name);
                }
                if self.facts.changes() == before {
                    return;
                }
            }
            News::Gone(value) => self.facts.remove(&name_of(kind, &value)),
            News::Listed => {
                self.facts
                    .retain(kind.name, &progress.listing.take().unwrap_or_default());
                progress.complete = true;
                progress.absent = false;
            }
            News::Absent => {
                self.facts.retain(kind.name, &BTreeSet::new());
                progress.listing = None;
                progress.complete = true;
                progress.trouble = None;
                if !progress.absent {
                    tracing::info!(kind = kind.name, "not installed; looked for again");
                }
                progress.absent = true;
            }
            News::Health(trouble) => {
                if progress.trouble != trouble {
                    progress.trouble = trouble;
                    self.say();
                }
                return;
            }
        }
        self.changed.get_or_insert_with(Instant::now);
    }

    fn publish_at(&self) -> Option<Instant> {
        let since = self.changed?;
        if self.progress.values().any(|p| !p.complete) {
            return None;
        }
        let is_listing = self.progress.values().any(|p| p.listing.is_some());
        let pause = if is_listing { LIST } else { TOGETHER };
        let due = since + pause;
        Some(self.rested.map_or(due, |rested| rested.max(due)))
    }

    fn publish(&mut self) {
        let start = Instant::now();
        self.changed = None;
        let mut outcome = self.facts.outcome();
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
        announce(&self.report.borrow(), &report);
        replace(&self.report, report);
        self.keeper.mark();
        replace(&self.cluster, outcome.cluster);
        self.rested = Some(Instant::now() + REST.max(start.elapsed() * 2));
        if !self.complete.send_replace(true) {
            tracing::info!(
                objects = self.facts.len(),
                "the cluster's state is complete"
            );
        }
    }

    fn save(&mut self) {
        let state = State {
            last_good: self.facts.last_good(),
            ..State::default()
        };
        // The disk may take longer than a change of policy should.
        let draft = self.keeper.draft(state);
        self.writing = draft.map(|draft| spawn_blocking(|| draft.write()));
    }

    /// Puts what is known about the server into the report.
    fn say(&self) {
        let now = self.state();
        let is_away = self.progress.values().any(|p| p.trouble.is_some());
        self.report.send_if_modified(|report| {
            if report.stale == now.stale && report.absent == now.absent {
                return false;
            }
            match (&report.stale, &now.stale) {
                (_, Some(why)) if is_away => {
                    tracing::warn!(
                        why,
                        "the API server cannot be followed; what is known stays in force"
                    );
                }
                (Some(_), None) => tracing::info!("the API server is followed"),
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
        // One server, one cause: the same for many kinds is said once.
        let mut troubles: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (kind, progress) in &self.progress {
            if let Some(why) = &progress.trouble {
                troubles.entry(why).or_default().push(kind);
            } else if waiting && !progress.complete {
                let why = "the first list is not complete";
                troubles.entry(why).or_default().push(kind);
            }
        }
        let one = |(why, kinds): (&&str, &Vec<&str>)| format!("{}: {why}", kinds.join(", "));
        let all: Vec<String> = troubles.iter().map(one).collect();
        let absent = self.progress.iter().filter(|(_, p)| p.absent);
        Report {
            stale: (!all.is_empty()).then(|| all.join("; ")),
            absent: absent.map(|(kind, _)| (*kind).to_owned()).collect(),
            ..Report::default()
        }
    }
}

async fn end<T>(task: &mut Option<JoinHandle<T>>) -> T {
    let Some(task) = task else {
        return std::future::pending().await;
    };
    match task.await {
        Ok(value) => value,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends.
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

fn name_of(kind: &Kind, value: &Value) -> ObjectRef {
    let text = |field: &str| {
        let text = value.get("metadata").and_then(|m| m.get(field));
        text.and_then(Value::as_str).unwrap_or_default()
    };
    ObjectRef::new(kind.name, text("namespace"), text("name"))
}
