// SPDX-License-Identifier: Apache-2.0
//! Makes the node what the facts say: newest cluster, compiled, compared with what the kernel
//! holds, applied in order; pods adopted and let go on the way.
//!
//! One task owns the datapath and the pods' namespaces. Restart, resync and retry are one path,
//! [`reconcile`]. Before the first facts nothing is touched: what an earlier agent pinned goes on.
//! After [`run`] was told to stop, nothing is written any more, so that a successor has no rival.

mod adopted;
pub mod connections;
#[cfg(test)]
mod fake;
pub mod kernel;
pub mod own_addresses;
mod reconcile;
mod sockets;
mod status;
#[cfg(test)]
mod tests;
mod undecided;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::pod::PodIndex;
use mesh_plan::cluster::{Cluster, Rejection};
use mesh_plan::{Compiler, Index, Plan};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::record::Ended;
use adopted::{Adopted, Leaving, Retry};
use mesh_datapath::pods::find::Find;
use mesh_datapath::pods::{PodTable, made};
use mesh_identity::{SpiffeId, TrustDomain};
use mesh_log::Chain;

pub use kernel::Kernel;
use own_addresses::OwnAddresses;
pub use status::{PodStatus, Status};
use undecided::Undecided;

/// How often namespaces are looked at: one that is gone is let go within twice this time.
const TICK: Duration = Duration::from_millis(250);
/// How often what was made in the pods is checked without being told.
const CHECK: Duration = Duration::from_secs(1);
/// How often UDP flows that have expired are swept out.
const SWEEP: Duration = Duration::from_secs(10);
/// Changes in pods that wait to be looked at; more are found by the check.
const CHANGES: usize = 256;

/// Per cent of what a plan may have in a map, from which on it is said.
const FORESEEN: usize = 80;

/// Why `control` cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody sends facts any more.
    #[error("the source of the cluster's state ended")]
    SourceEnded,
    /// The kernel refused.
    #[error(transparent)]
    Datapath(#[from] mesh_datapath::datapath::Error),
    /// The agent's own interfaces cannot be read.
    #[error("cannot read this node's interfaces")]
    Links(#[source] io::Error),
}

/// What `control` needs to know beside facts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name of this node.
    pub node: String,
    /// The trust domain of identities.
    pub trust_domain: TrustDomain,
    /// Refused packets vanish instead of being answered, where the pod's namespace says nothing.
    pub silent: bool,
    /// Where is noted what is ended at the socket, for its record.
    pub ended: Ended,
    /// Reads the addresses of this node's interfaces.
    pub own_addresses: own_addresses::Read,
}

/// Where `control` publishes.
#[derive(Debug)]
pub struct Outputs {
    plan: watch::Sender<Arc<Index>>,
    pods: watch::Sender<Arc<PodTable>>,
    wanted: watch::Sender<BTreeSet<SpiffeId>>,
    status: watch::Sender<Arc<Status>>,
}

/// What other rooms read.
#[derive(Clone, Debug)]
pub struct Views {
    /// The plan in force, with pods as they are, not as they are wished.
    pub plan: watch::Receiver<Arc<Index>>,
    /// The adopted pods.
    pub pods: watch::Receiver<Arc<PodTable>>,
    /// The identities of this node's enrolled pods.
    pub wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    /// How it goes.
    pub status: watch::Receiver<Arc<Status>>,
}

/// Both ends of what `control` publishes; empty at first.
#[must_use]
pub fn outputs() -> (Outputs, Views) {
    let (plan, plan_view) = watch::channel(Arc::new(Index::default()));
    let (pods, pods_view) = watch::channel(Arc::new(PodTable::new()));
    let (wanted, wanted_view) = watch::channel(BTreeSet::new());
    let (status, status_view) = watch::channel(Arc::new(Status::default()));
    (
        Outputs {
            plan,
            pods,
            wanted,
            status,
        },
        Views {
            plan: plan_view,
            pods: pods_view,
            wanted: wanted_view,
            status: status_view,
        },
    )
}

/// Keeps the node as the facts say, until `stop` turns true; then it only lets go of pods that
/// are gone, until it is dropped.
///
/// # Errors
/// When facts end. A plan that cannot be applied is no end: it is tried again.
pub async fn run(
    settings: Settings,
    kernel: impl Kernel,
    finder: impl Find,
    mut facts: watch::Receiver<Arc<Cluster>>,
    outputs: Outputs,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    let (changed, mut changes) = mpsc::channel(CHANGES);
    let mut control = Control::new(settings, kernel, finder, outputs, changed);
    control.own_addresses.refresh();
    control.learn(&facts.borrow_and_update());
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !*stop.borrow() {
        control.pass_if_due();
        control.decide_one();
        tokio::select! {
            biased;
            _ = stop.changed() => {}
            news = facts.changed() => {
                if news.is_err() {
                    return Err(Error::SourceEnded);
                }
                control.learn(&facts.borrow_and_update());
            }
            Some(uid) = changes.recv() => control.repair(&uid),
            _ = tick.tick() => control.look(),
            () = std::future::ready(()), if control.undecided.is_waiting() => {}
        }
    }
    loop {
        tick.tick().await;
        control.let_go();
    }
}

/// The one owner of the datapath and of the pods.
struct Control<K, F> {
    settings: Settings,
    kernel: K,
    finder: F,
    outputs: Outputs,
    /// Where pods' watches report.
    changed: mpsc::Sender<String>,
    compiler: Compiler,
    own_addresses: OwnAddresses,
    /// What the facts say, compiled.
    desired: Plan,
    rejections: Vec<Rejection>,
    /// Maps that `desired` nearly fills.
    nearly_full: BTreeSet<&'static str>,
    /// What `desired` is of.
    facts: Arc<Cluster>,
    /// What was `facts` at the last pass that succeeded.
    in_force: Arc<Cluster>,
    /// What the kernel holds; `None` = not known, to be read.
    base: Option<Arc<Index>>,
    pods: BTreeMap<String, Adopted>,
    /// Pods that cannot be adopted yet, by UID.
    waiting: BTreeMap<String, Retry>,
    /// Pods that were let go, whose last sockets are still to end.
    leaving: Vec<Leaving>,
    /// Slots that an earlier agent left and nobody has claimed; `None` = not read yet.
    inherited: Option<BTreeSet<PodIndex>>,
    /// Pods whose open connections are to be decided again.
    undecided: Undecided,
    /// Something changed since the last pass.
    dirty: bool,
    /// The last pass failed.
    failed: Option<Retry>,
    checked: Instant,
    swept: Instant,
    revision: u64,
    tampered: u64,
    ended: u64,
    took: Duration,
}

impl<K: Kernel, F: Find> Control<K, F> {
    fn new(
        settings: Settings,
        kernel: K,
        finder: F,
        outputs: Outputs,
        changed: mpsc::Sender<String>,
    ) -> Self {
        Self {
            compiler: Compiler::new(&*settings.node),
            own_addresses: OwnAddresses::new(settings.own_addresses),
            settings,
            kernel,
            finder,
            outputs,
            changed,
            desired: Plan::default(),
            rejections: Vec::new(),
            nearly_full: BTreeSet::new(),
            facts: Arc::default(),
            in_force: Arc::default(),
            base: None,
            pods: BTreeMap::new(),
            waiting: BTreeMap::new(),
            leaving: Vec::new(),
            inherited: None,
            undecided: Undecided::default(),
            dirty: false,
            failed: None,
            checked: Instant::now(),
            swept: Instant::now(),
            revision: 0,
            tampered: 0,
            ended: 0,
            took: Duration::ZERO,
        }
    }

    /// Takes new facts.
    fn learn(&mut self, cluster: &Arc<Cluster>) {
        let (mut desired, rejections) = self.compiler.compile(cluster, self.own_addresses.get());
        desired.unite(&self.desired);
        for rejection in rejections.iter().filter(|it| !self.rejections.contains(it)) {
            tracing::error!(object = %rejection.object, field = rejection.field,
                why = rejection.why, consequence = rejection.consequence, "not in force as written");
        }
        (self.desired, self.rejections) = (desired, rejections);
        self.foresee();
        self.facts = Arc::clone(cluster);
        self.dirty = true;
    }

    /// Says which maps will be full soon: what does not fit then is isolated.
    fn foresee(&mut self) {
        let near: BTreeSet<&'static str> = self
            .desired
            .fill()
            .into_iter()
            .filter(|(map, used, most)| {
                let is_near = used * 100 >= most * FORESEEN;
                if is_near && !self.nearly_full.contains(map) {
                    tracing::warn!(map, entries = used, most, "a map is nearly full");
                }
                is_near
            })
            .map(|(map, ..)| map)
            .collect();
        self.nearly_full = near;
    }

    fn pass_if_due(&mut self) {
        let now = Instant::now();
        let retry = self
            .failed
            .as_ref()
            .is_some_and(|failed| failed.is_due(now));
        if !self.dirty && !retry {
            return;
        }
        self.dirty = false;
        match self.pass() {
            Ok(changed) => {
                self.failed = None;
                self.in_force = Arc::clone(&self.facts);
                if changed || self.revision == 0 {
                    self.revision += 1;
                    self.took = now.elapsed();
                }
            }
            Err(error) => {
                // What the kernel holds now is not known any more.
                self.base = None;
                let why = describe(&error);
                tracing::error!(error = %why, "the newest plan is not in force; trying again");
                self.failed = Some(Retry::after(self.failed.as_ref(), why, Instant::now()));
            }
        }
        self.publish_status();
    }

    /// Looks whether namespaces came or went, and now and then whether all is in place.
    fn look(&mut self) {
        let now = Instant::now();
        let is_tunnel = |socket: &_| self.kernel.is_tunnel(socket);
        self.leaving
            .retain_mut(|pod| sockets::end_left(pod, is_tunnel));
        self.look_at_fresh();
        self.withdraw_drained();
        let gone = self.pods.values().any(|pod| !pod.home.is_there());
        let refused = self.pods.values().filter_map(|pod| pod.refused.as_ref());
        let due = self.waiting.values().chain(refused).any(|r| r.is_due(now));
        self.dirty |= gone || due;
        if now.duration_since(self.checked) >= CHECK {
            self.checked = now;
            let uids: Vec<String> = self.pods.keys().cloned().collect();
            for uid in uids {
                self.repair(&uid);
            }
            self.claim_listeners();
            if self.own_addresses.refresh() {
                let facts = Arc::clone(&self.facts);
                self.learn(&facts);
            }
        }
        if now.duration_since(self.swept) >= SWEEP {
            self.swept = now;
            if let Err(error) = self.kernel.expire_flows() {
                let error = describe(&error);
                tracing::warn!(error, "expired UDP flows stay in the map");
            }
        }
    }

    /// Makes again what is missing in a pod's namespace.
    fn repair(&mut self, uid: &str) {
        let Some(pod) = self.pods.get_mut(uid) else {
            return;
        };
        let Some(enrolment) = &pod.enrolment else {
            return;
        };
        let name = &pod.handle.local.name;
        let trouble = match made::ensure(&pod.home.netns, &enrolment.list) {
            Ok(repaired) => {
                for made in &repaired {
                    tracing::warn!(pod = %name, %made, "tampered: somebody removed it; it is back");
                }
                self.tampered += repaired.len() as u64;
                if repaired.is_empty() && pod.trouble.is_none() {
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
            tracing::warn!(pod = %name, error = %why, "what the mesh needs in the pod is not in place");
        }
        pod.trouble = trouble;
        self.publish_status();
    }

    /// Puts our listeners into their slots again: an agent that was replaced may have put its own
    /// there after us, for a pod that came while both ran.
    fn claim_listeners(&mut self) {
        for pod in self.pods.values() {
            for (slot, listener) in pod.enrolment.iter().flat_map(|e| e.listeners.iter()) {
                if let Err(error) = self.kernel.set_listener(pod.index, slot, listener.as_fd()) {
                    let error = describe(&error);
                    tracing::warn!(pod = %pod.handle.local.name, error, "a listener is not in place");
                }
            }
        }
    }

    /// After the stop: lets pods go whose namespace is gone, and nothing else.
    fn let_go(&mut self) {
        let is_tunnel = |socket: &_| self.kernel.is_tunnel(socket);
        self.leaving
            .retain_mut(|pod| sockets::end_left(pod, is_tunnel));
        let gone = |pod: &mut Adopted| !pod.home.is_there();
        let gone: Vec<Adopted> = self
            .pods
            .extract_if(.., |_, pod| gone(pod))
            .map(|(_, pod)| pod)
            .collect();
        if !gone.is_empty() {
            self.leaving.extend(gone.into_iter().map(Leaving::from));
            self.publish_pods();
        }
    }

    fn publish_pods(&self) {
        let table: PodTable = self
            .pods
            .iter()
            .map(|(uid, pod)| (uid.clone(), Arc::clone(&pod.handle)))
            .collect();
        self.outputs.pods.send_if_modified(|old| {
            let same = old.len() == table.len()
                && old.iter().all(|(uid, handle)| {
                    table.get(uid).is_some_and(|new| Arc::ptr_eq(handle, new))
                });
            if !same {
                *old = Arc::new(table);
            }
            !same
        });
    }

    fn publish_wanted(&self) {
        let mut wanted = BTreeSet::new();
        for pod in self.pods.values().filter(|pod| pod.enrolment.is_some()) {
            let local = &pod.handle.local;
            let domain = &self.settings.trust_domain;
            match SpiffeId::new(domain, &local.name.namespace, &local.service_account) {
                Ok(id) => drop(wanted.insert(id)),
                Err(error) => {
                    tracing::error!(pod = %local.name, %error, "the pod has no identity");
                }
            }
        }
        self.outputs.wanted.send_if_modified(|old| {
            let changed = *old != wanted;
            *old = wanted;
            changed
        });
    }

    fn publish_status(&self) {
        let status = Status {
            revision: self.revision,
            took: self.took,
            error: self.failed.as_ref().map(|failed| failed.why.clone()),
            facts: Arc::clone(&self.in_force),
            rejections: self.rejections.clone(),
            pods: self.pod_statuses(),
            tampered: self.tampered,
            ended: self.ended,
        };
        self.outputs.status.send_if_modified(|old| {
            let changed = **old != status;
            *old = Arc::new(status);
            changed
        });
    }

    fn pod_statuses(&self) -> BTreeMap<String, PodStatus> {
        let one = |(uid, local): (&String, &mesh_plan::plan::LocalPod)| {
            let adopted = self.pods.get(uid);
            let view = adopted.map(|pod| pod.handle.local.view);
            let waiting = self.waiting.get(uid).map(|retry| retry.why.clone());
            let status = PodStatus {
                name: local.name.clone(),
                adopted: adopted.is_some(),
                wanted: local.view.has(mesh_common::PodState::ENROLLED),
                enrolled: view.is_some_and(|v| v.has(mesh_common::PodState::ENROLLED)),
                gated: adopted.is_some_and(|pod| pod.ungated.is_none()),
                cut_off: view.is_some_and(|v| v.set == mesh_common::policy::PolicySetId::ISOLATED),
                trouble: waiting.or_else(|| adopted.and_then(Adopted::complaint)),
            };
            (uid.clone(), status)
        };
        self.desired.pods.iter().map(one).collect()
    }
}

/// An error with its causes, in one line.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    Chain(error).to_string()
}
