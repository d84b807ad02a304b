// SPDX-License-Identifier: Apache-2.0
//! Brings the node to the state that the cluster requests: compiles the newest snapshot, compares the
//! plan with the kernel's, applies the difference in order, and attaches and detaches pods.
//!
//! One task owns the datapath and the pods' network namespaces. Restart, resync and retry are one path,
//! [`reconcile`]. Nothing is changed before the first snapshot: the pinned state of an earlier agent
//! stays in force. While several agents of a node run, the newest writes, and the others only detach removed
//! pods; after [`run`] was told to stop, it does not write again. Readers get one value, [`InForce`].

pub mod connections;
mod desired;
mod enrollment;
#[cfg(test)]
mod fake;
mod in_force;
pub mod kernel;
mod managed;
mod open_connections;
pub mod own_addresses;
mod recheck_queue;
mod reconcile;
mod sockets;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::PodState;
use mesh_common::pod::PodIndex;
use mesh_common::policy::PolicySetId;
use mesh_plan::cluster::ClusterSnapshot;
use mesh_plan::{Index, Plan};
use mesh_telemetry::record::CloseReporter;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use desired::Desired;
use managed::{Detached, ManagedPod, Retry};
use mesh_datapath::pods::find::Find;
use mesh_datapath::pods::{PodTable, netns_config};
use mesh_log::{Chain, log_limited, warn_limited};
use recheck_queue::RecheckQueue;

pub use in_force::{InForce, Publisher, channel};
pub use kernel::Kernel;
pub use status::{PodStatus, Status};

/// Interval of checking for removed namespaces; a removed one is detached within twice this time.
const TICK: Duration = Duration::from_millis(250);
/// Interval of checking for a successor, or for the predecessor to stop writing.
const ELECTION: Duration = Duration::from_millis(50);
/// Interval of checking the pods' network configuration without a notification.
const CHECK: Duration = Duration::from_secs(1);
/// Interval of removing expired UDP flows: a pod's flows are bounded, but 64 pods at their bound would fill
/// the map of the node.
const SWEEP: Duration = Duration::from_secs(10);
/// Notifications of changes in pods that wait; further ones are left to the check.
const CHANGES: usize = 256;

/// A failure that ends `control`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source of snapshots has ended.
    #[error("the source of the cluster's state ended")]
    SourceEnded,
    /// The kernel refused an operation.
    #[error(transparent)]
    Datapath(#[from] mesh_datapath::Error),
    /// The kernel refused services; policy is in force.
    #[error("cannot apply services; policy, addresses and pods are applied")]
    Services(#[source] mesh_datapath::Error),
    /// The node's interfaces cannot be read.
    #[error("cannot read this node's interfaces")]
    Links(#[source] io::Error),
}

/// The settings of `control`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Drops refused packets silently instead of answering them, unless the pod's namespace says otherwise.
    pub silent: bool,
    /// Receives the reasons of connections that are closed at the socket, for their records.
    pub close_reporter: CloseReporter,
    /// Reads the addresses of this node's interfaces.
    pub own_addresses: own_addresses::Read,
}

/// Keeps the node in the state of the newest snapshot until `stop` turns true; from then on it only
/// detaches removed pods, until it is dropped.
///
/// # Errors
/// When the source ends. A plan that cannot be applied is retried.
pub async fn run(
    settings: Settings,
    kernel: impl Kernel,
    finder: impl Find,
    mut snapshots: watch::Receiver<Arc<ClusterSnapshot>>,
    publisher: Publisher,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    let (changed, mut changes) = mpsc::channel(CHANGES);
    let mut control = Control::new(settings, kernel, Pods::new(finder, changed), publisher);
    control.set_snapshot(&snapshots.borrow_and_update());
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut election = interval(ELECTION);
    election.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !*stop.borrow() {
        let writes = control.is_writer();
        if writes {
            control.reconcile_if_due();
            control.recheck_one();
        }
        tokio::select! {
            biased;
            _ = stop.changed() => {}
            news = snapshots.changed() => {
                if news.is_err() {
                    return Err(Error::SourceEnded);
                }
                control.set_snapshot(&snapshots.borrow_and_update());
            }
            Some(uid) = changes.recv(), if writes => control.repair(&uid),
            _ = tick.tick() => if writes { control.check() } else { control.detach_removed() },
            _ = election.tick() => {}
            () = std::future::ready(()), if writes && control.pods.recheck.is_pending() => {}
        }
    }
    control.kernel.api.stop_writing();
    loop {
        tick.tick().await;
        control.detach_removed();
    }
}

/// The kernel's state, as far as it is known.
struct KernelState<K> {
    api: K,
    /// This agent wrote last; another one may have written since.
    is_writer: bool,
    /// The plan that the kernel holds; `None` = unknown, to be read.
    plan: Option<Arc<Index>>,
    /// Slots of an earlier agent that no pod has claimed yet; `None` = not read yet.
    inherited: Option<BTreeSet<PodIndex>>,
    /// Time of the last sweep of expired UDP flows.
    swept: Instant,
}

/// The pods of this node.
struct Pods<F> {
    finder: F,
    /// Sender of the watches in the pods' namespaces.
    changed: mpsc::Sender<String>,
    /// Pods that the datapath has, by UID.
    managed: BTreeMap<String, ManagedPod>,
    /// Pods that could not be attached yet, by UID.
    waiting: BTreeMap<String, Retry>,
    /// Detached pods whose last sockets are still to be closed.
    detached: Vec<Detached>,
    /// Pods whose open connections are to be checked against policy again.
    recheck: RecheckQueue,
    /// Time of the last check of the pods' network configuration.
    checked: Instant,
}

impl<F> Pods<F> {
    fn new(finder: F, changed: mpsc::Sender<String>) -> Self {
        Self {
            finder,
            changed,
            managed: BTreeMap::new(),
            waiting: BTreeMap::new(),
            detached: Vec::new(),
            recheck: RecheckQueue::default(),
            checked: Instant::now(),
        }
    }

    fn table(&self) -> Arc<PodTable> {
        let handles = self.managed.iter();
        let handles = handles.map(|(uid, pod)| (uid.clone(), Arc::clone(&pod.handle)));
        Arc::new(handles.collect())
    }

    /// Closes the sockets that detached pods have left.
    fn close_leftover_sockets(&mut self, kernel: &impl Kernel) {
        let is_tunnel = |socket: &_| kernel.is_tunnel(socket);
        self.detached
            .retain_mut(|pod| sockets::close_leftover(pod, is_tunnel));
    }

    /// The status of every pod of a plan.
    fn statuses(&self, plan: &Plan) -> BTreeMap<String, PodStatus> {
        let one = |(uid, local): (&String, &mesh_plan::plan::LocalPod)| {
            let managed = self.managed.get(uid);
            let view = managed.map(|pod| pod.local.view);
            let waiting = self.waiting.get(uid).map(|retry| retry.why.clone());
            let status = PodStatus {
                name: local.name.clone(),
                managed: managed.is_some(),
                wanted: local.view.has(PodState::ENROLLED),
                enrolled: view.is_some_and(|v| v.has(PodState::ENROLLED)),
                gated: managed.is_some_and(|pod| pod.ungated.is_none()),
                isolated: view.is_some_and(|v| v.set == PolicySetId::ISOLATED),
                trouble: waiting.or_else(|| managed.and_then(ManagedPod::trouble)),
            };
            (uid.clone(), status)
        };
        plan.pods.iter().map(one).collect()
    }
}

/// The progress of reconciliation, and its publication.
struct Progress {
    settings: Settings,
    publisher: Publisher,
    /// Something changed since the last pass.
    is_dirty: bool,
    /// The last pass failed.
    failed: Option<Retry>,
    /// Revision of the newest plan that was applied completely.
    applied: u64,
    /// Time that it took to apply.
    took: Duration,
    /// Removed rules, routes and sysctls that were restored.
    restored: u64,
    /// Open connections that were closed.
    closed: u64,
}

/// The one owner of the datapath and of the pods.
struct Control<K, F> {
    desired: Desired,
    kernel: KernelState<K>,
    pods: Pods<F>,
    progress: Progress,
}

impl<K: Kernel, F: Find> Control<K, F> {
    fn new(settings: Settings, kernel: K, pods: Pods<F>, publisher: Publisher) -> Self {
        Self {
            desired: Desired::new(&settings.node, settings.own_addresses),
            kernel: KernelState {
                api: kernel,
                is_writer: false,
                plan: None,
                inherited: None,
                swept: Instant::now(),
            },
            pods,
            progress: Progress {
                settings,
                publisher,
                is_dirty: false,
                failed: None,
                applied: 0,
                took: Duration::ZERO,
                restored: 0,
                closed: 0,
            },
        }
    }

    /// Returns `true` if this agent is to write. When it becomes the writer, it reads the kernel's state again.
    fn is_writer(&mut self) -> bool {
        let before = std::mem::replace(&mut self.kernel.is_writer, self.kernel.api.is_writer());
        if before && !self.kernel.is_writer {
            tracing::info!("a successor writes the datapath");
        } else if !before && self.kernel.is_writer {
            self.kernel.plan = None;
            self.kernel.inherited = None;
            self.progress.is_dirty = true;
            self.claim_listeners();
        }
        self.kernel.is_writer
    }

    /// Compiles a new snapshot.
    fn set_snapshot(&mut self, snapshot: &Arc<ClusterSnapshot>) {
        self.desired.compile(snapshot);
        self.progress.is_dirty = true;
    }

    fn reconcile_if_due(&mut self) {
        let now = Instant::now();
        let retry = self.progress.failed.as_ref();
        let retry = retry.is_some_and(|failed| failed.is_due(now));
        if !self.progress.is_dirty && !retry {
            return;
        }
        self.progress.is_dirty = false;
        match self.reconcile() {
            Ok(()) => {
                self.progress.failed = None;
                let revision = self.progress.publisher.current().revision;
                if revision != self.progress.applied {
                    self.progress.applied = revision;
                    self.progress.took = now.elapsed();
                }
            }
            Err(error) => {
                // Parts of the plan may be in the kernel.
                self.kernel.plan = None;
                let why = describe(&error);
                log_limited!(error, why, error = %why, "the newest plan is not completely in force; retrying");
                let retry = Retry::after(self.progress.failed.as_ref(), why, Instant::now());
                self.progress.failed = Some(retry);
            }
        }
        self.publish_status();
    }

    /// Checks for namespaces that came or went, and now and then the pods' network configuration.
    fn check(&mut self) {
        let now = Instant::now();
        self.pods.close_leftover_sockets(&self.kernel.api);
        self.recheck_fresh();
        self.unenroll_drained();
        let pods = &self.pods;
        let gone = pods.managed.values().any(|pod| !pod.home.is_there());
        let refused = pods.managed.values().filter_map(|pod| pod.refused.as_ref());
        let due = pods.waiting.values().chain(refused).any(|r| r.is_due(now));
        self.progress.is_dirty |= gone || due;
        if now.duration_since(pods.checked) >= CHECK {
            self.pods.checked = now;
            let uids: Vec<String> = self.pods.managed.keys().cloned().collect();
            for uid in uids {
                self.repair(&uid);
            }
            self.claim_listeners();
            self.progress.is_dirty |= self.desired.refresh_own_addresses();
        }
        if now.duration_since(self.kernel.swept) >= SWEEP {
            self.kernel.swept = now;
            if let Err(error) = self.kernel.api.expire_flows() {
                let error = describe(&error);
                warn_limited!("expire_flows", error, "cannot remove expired UDP flows");
            }
        }
    }

    /// Restores what is missing of a pod's network configuration.
    fn repair(&mut self, uid: &str) {
        let Some(pod) = self.pods.managed.get_mut(uid) else {
            return;
        };
        let Some(enrollment) = &pod.enrollment else {
            return;
        };
        let name = &pod.local.name;
        let trouble = match netns_config::ensure(&pod.home.netns, &enrollment.list) {
            Ok(restored) => {
                for what in &restored {
                    log_limited!(warn, name, pod = %name, %what, "restored network configuration that was removed from the pod");
                }
                self.progress.restored += restored.len() as u64;
                if restored.is_empty() && pod.trouble.is_none() {
                    return;
                }
                None
            }
            Err(_) if !pod.home.is_there() => return,
            Err(error) => Some(describe(&error)),
        };
        if trouble != pod.trouble
            && let Some(why) = &trouble
        {
            log_limited!(warn, name, pod = %name, error = %why, "cannot restore the pod's network configuration");
        }
        pod.trouble = trouble;
        self.publish_status();
    }

    /// Puts the agent's listeners into their slots again: a successor that has ended may have replaced them, or
    /// a predecessor of a version that does not stop writing by itself.
    fn claim_listeners(&mut self) {
        for pod in self.pods.managed.values() {
            for (slot, listener) in pod.enrollment.iter().flat_map(|e| e.listeners.iter()) {
                let api = &mut self.kernel.api;
                if let Err(error) = api.set_listener(pod.index, slot, listener.as_fd()) {
                    let error = describe(&error);
                    log_limited!(warn, pod.local.name, pod = %pod.local.name, error, "cannot set a listener of the pod");
                }
            }
        }
    }

    /// Detaches pods whose namespace is gone, and does nothing else.
    fn detach_removed(&mut self) {
        self.pods.close_leftover_sockets(&self.kernel.api);
        let gone = |pod: &mut ManagedPod| !pod.home.is_there();
        let gone: Vec<ManagedPod> = self
            .pods
            .managed
            .extract_if(.., |_, pod| gone(pod))
            .map(|(_, pod)| pod)
            .collect();
        if !gone.is_empty() {
            let gone = gone.into_iter().map(Detached::from);
            self.pods.detached.extend(gone);
            self.publish_pods();
        }
    }

    fn publish_pods(&self) {
        let pods = self.pods.table();
        self.progress.publisher.update(|next| next.pods = pods);
    }

    fn publish_status(&self) {
        let progress = &self.progress;
        let status = Arc::new(Status {
            applied: progress.applied,
            took: progress.took,
            error: progress.failed.as_ref().map(|failed| failed.why.clone()),
            rejections: self.desired.rejections.clone(),
            pods: self.pods.statuses(&self.desired.plan),
            restored: progress.restored,
            closed: progress.closed,
        });
        let is_applied = progress.failed.is_none() && progress.applied > 0 && !progress.is_dirty;
        progress.publisher.update(|next| {
            if is_applied {
                next.snapshot = Arc::clone(&self.desired.snapshot);
            }
            next.status = status;
        });
    }
}

/// An error with its causes, in one line.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    Chain(error).to_string()
}
