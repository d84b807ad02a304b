// SPDX-License-Identifier: Apache-2.0
//! One thread that carries connections, and all that its connections share. A connection never
//! changes its thread, so nothing here is locked.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mesh_common::{Addr, Endpoint, Port, Reason};
use mesh_plan::Index;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_local;
use tokio::time::MissedTickBehavior;

use super::admission::{Admission, Total};
use super::buffers::{Buffers, Lender};
use super::dial::Dial;
use super::fair::Fair;
use super::listener::{self, Listening};
use super::live::Live;
use super::pool::{Key, Pool};
use super::socket::Socket;
use super::tunnel::Tunnel;
use super::turns::{self, Turns};
use super::{Phase, Timing};
use mesh_identity::{Epoch, Identities, SpiffeId};
use mesh_telemetry::metrics::{Metrics, Usage};
use mesh_telemetry::record::Recorder;

use crate::control::InForce;
use mesh_datapath::pods::{PodHandle, PodTable};

/// How often idle tunnels are looked after.
const SWEEP: Duration = Duration::from_secs(1);

/// How long a peer is not asked on applications' ports after the mark was lost.
const UNMARKED: Duration = Duration::from_secs(60);

/// A pod's share of the agent, over all workers.
#[derive(Debug)]
pub(crate) struct Share {
    /// The pod.
    pub(crate) uid: Arc<str>,
    /// Captured connections that are open.
    pub(crate) captured: AtomicUsize,
    /// Tunnels that were accepted and are open.
    pub(crate) tunnels: AtomicUsize,
    /// Refused connections that are held in silence.
    pub(crate) silent: AtomicUsize,
    /// Places for handshakes.
    pub(crate) admission: Admission,
    /// What its connections use.
    pub(crate) usage: Arc<Usage>,
}

/// A place in a bounded count; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    share: Arc<Share>,
    count: fn(&Share) -> &AtomicUsize,
}

impl Place {
    /// Takes a place, unless `most` are taken.
    pub(crate) fn take(
        share: &Arc<Share>,
        count: fn(&Share) -> &AtomicUsize,
        most: usize,
    ) -> Option<Self> {
        let place = Self {
            share: Arc::clone(share),
            count,
        };
        // Taken first: so no two can have the last one.
        (count(share).fetch_add(1, Relaxed) < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        (self.count)(&self.share).fetch_sub(1, Relaxed);
    }
}

/// A connection to be carried.
#[derive(Debug)]
pub(crate) struct Job {
    /// What it is.
    pub(crate) kind: JobKind,
    /// The pod it belongs to.
    pub(crate) share: Arc<Share>,
    /// Its place among the pod's connections.
    pub(crate) place: Place,
}

/// A connection on its way to another worker; its socket is registered with no runtime.
pub(crate) type Moved = (Job, std::net::TcpStream);

/// What was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobKind {
    /// An application's connection, captured on its way out.
    Captured,
    /// Another agent's tunnel.
    Tunnel,
}

/// The other workers, as one that accepts sees them.
#[derive(Clone, Debug)]
pub(crate) struct Crew {
    /// Where each takes jobs.
    pub(crate) jobs: Arc<[mpsc::Sender<Moved>]>,
    /// How many each carries.
    pub(crate) loads: Arc<[AtomicUsize]>,
    /// Places for handshakes of all.
    pub(crate) handshakes: Total,
}

impl Crew {
    /// Who is to carry the next connection: `own`, unless another carries fewer. A connection that
    /// stays saves a wake-up of another thread.
    pub(crate) fn choose(&self, own: usize) -> usize {
        let load = |worker: usize| self.loads[worker].load(Relaxed);
        let least = (0..self.loads.len()).min_by_key(|worker| load(*worker));
        least.filter(|it| load(*it) < load(own)).unwrap_or(own)
    }
}

/// One worker's part of [`Crew::loads`]; given back when dropped, if not before.
#[derive(Debug)]
pub(crate) struct Load {
    loads: Arc<[AtomicUsize]>,
    worker: usize,
    counts: Cell<bool>,
}

impl Load {
    pub(crate) fn new(crew: &Crew, worker: usize) -> Self {
        crew.loads[worker].fetch_add(1, Relaxed);
        Self {
            loads: Arc::clone(&crew.loads),
            worker,
            counts: Cell::new(true),
        }
    }

    /// The connection is about to end. Who closes one and opens the next at once must not find its
    /// worker loaded with the first, and be carried by a colder one.
    pub(crate) fn give_back(&self) {
        if self.counts.replace(false) {
            self.loads[self.worker].fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// What the connections of one thread share.
pub(crate) struct Worker {
    /// Which one this is.
    pub(crate) number: usize,
    /// All of them.
    pub(crate) crew: Crew,
    /// The policy in force and the pods of this node.
    pub(crate) in_force: watch::Receiver<Arc<InForce>>,
    /// Certificates.
    pub(crate) identities: Identities,
    /// Records.
    pub(crate) recorder: Recorder,
    /// How sockets are made.
    pub(crate) dial: Box<dyn Dial>,
    /// Where tunnels are accepted.
    pub(crate) tunnel_port: Port,
    /// Whether the application's own port is tried first.
    pub(crate) real_ports: bool,
    /// Peers on the way to which the mark of tunnels was lost, and when that was found.
    pub(crate) unmarked: RefCell<BTreeMap<Addr, Instant>>,
    /// Bounds in time and number.
    pub(crate) timing: Timing,
    /// Buffers.
    pub(crate) buffers: Rc<Buffers>,
    /// Whose handshakes may compute.
    pub(crate) turns: Turns,
    /// Whose open connections are carried on.
    pub(crate) fair: Fair,
    /// Idle tunnels.
    pub(crate) pool: Pool,
    /// Open connections.
    pub(crate) live: Rc<Live>,
    /// Whether open connections may only come to their end.
    pub(crate) draining: Cell<bool>,
}

impl Worker {
    /// The plan in force.
    pub(crate) fn plan(&self) -> Arc<Index> {
        Arc::clone(&self.in_force.borrow().plan)
    }

    /// A pod of this node.
    pub(crate) fn pod(&self, uid: &str) -> Option<Arc<PodHandle>> {
        self.in_force.borrow().pods.get(uid).cloned()
    }

    /// Metrics.
    pub(crate) fn metrics(&self) -> &Metrics {
        self.recorder.metrics()
    }

    /// On which port the agent of a destination is asked for.
    pub(crate) fn port_of(&self, to: &Endpoint) -> Port {
        let found = self.unmarked.borrow().get(&to.addr).copied();
        let lost = found.is_some_and(|at| at.elapsed() < UNMARKED);
        if self.real_ports && !lost {
            to.port
        } else {
            self.tunnel_port
        }
    }

    /// The mark was lost on the way to a peer: it is asked on the tunnel port for a while.
    pub(crate) fn mark_lost(&self, peer: Addr) {
        tracing::warn!(%peer, "the network takes the mark of tunnels away: the peer is reached on the tunnel port");
        let mut unmarked = self.unmarked.borrow_mut();
        unmarked.retain(|_, at| at.elapsed() < UNMARKED);
        unmarked.insert(peer, Instant::now());
        self.metrics().mark_lost();
    }

    /// Where is counted what a pod of this node uses.
    pub(crate) fn usage(&self, pod: &PodHandle) -> Arc<Usage> {
        let plan = self.plan();
        let Some(local) = plan.pods.get(&pod.uid) else {
            // The pod is about to leave the table too.
            return Arc::default();
        };
        let workload = [local.view.v4, local.view.v6]
            .iter()
            .find_map(|addr| plan.names.workloads.get(addr))
            .map_or(local.name.name.as_str(), |pod| &pod.workload.1);
        self.metrics().usage(&local.name.namespace, workload)
    }

    /// Buffers for a pod's connections.
    pub(crate) fn lender(&self, share: &Share) -> Lender {
        Lender::new(Rc::clone(&self.buffers), Arc::clone(&share.usage))
    }

    /// The identity of a workload of the trust domain.
    pub(crate) fn identity(&self, namespace: &str, service_account: &str) -> Option<SpiffeId> {
        SpiffeId::new(self.identities.trust_domain(), namespace, service_account).ok()
    }

    /// The identity of a pod of this node.
    pub(crate) fn own_identity(&self, uid: &str) -> Option<SpiffeId> {
        let plan = self.plan();
        let local = plan.pods.get(uid)?;
        self.identity(&local.name.namespace, &local.service_account)
    }

    /// Carries a connection, here and from now on.
    pub(crate) fn carry(self: &Rc<Self>, job: Job, socket: Socket) {
        let worker = Rc::clone(self);
        let load = Load::new(&self.crew, self.number);
        let measured = (Rc::clone(self), Arc::clone(&job.share));
        let task = async move {
            let _counted = CountPanic(worker.metrics().clone());
            match job.kind {
                JobKind::Captured => super::outbound::carry(&worker, job, socket, &load).await,
                JobKind::Tunnel => super::inbound::serve(&worker, job, socket).await,
            }
        };
        let mut task = Box::pin(task);
        spawn_local(std::future::poll_fn(move |cx| {
            let (worker, share) = &measured;
            let begun = Instant::now();
            let polled = task.as_mut().poll(cx);
            let ended = Instant::now();
            let pod = turns::number(&share.uid);
            worker.turns.ran(pod, ended);
            worker.fair.used(pod, ended - begun, ended);
            share.usage.worked(ended - begun);
            polled
        }));
    }

    /// Carries a connection that another worker has accepted.
    pub(crate) fn adopt(self: &Rc<Self>, (job, stream): Moved) {
        match Socket::new(stream) {
            Ok(socket) => self.carry(job, socket),
            Err(error) => tracing::warn!(%error, "cannot take over a connection"),
        }
    }

    /// Ends tunnels, each with its last words.
    pub(crate) fn close(&self, tunnels: Vec<Tunnel>) {
        for tunnel in tunnels {
            spawn_local(tunnel.close());
        }
    }

    /// Runs until the agent ends.
    pub(crate) async fn run(
        self: Rc<Self>,
        mut jobs: mpsc::Receiver<Moved>,
        mut phase: watch::Receiver<Phase>,
    ) {
        let mut in_force = self.in_force.clone();
        let (mut plan, mut pods) = (self.plan(), Arc::default());
        let mut certificates = self.identities.subscribe();
        let mut listening = Listening::default();
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        in_force.mark_changed();
        let turns = Rc::clone(&self);
        let turns = spawn_local(async move { turns.turns.run().await });
        let rounds = Rc::clone(&self);
        let rounds = spawn_local(async move { rounds.fair.run().await });
        loop {
            tokio::select! {
                Some(moved) = jobs.recv() => self.adopt(moved),
                Ok(()) = in_force.changed() => {
                    let now = Arc::clone(&in_force.borrow_and_update());
                    if !Arc::ptr_eq(&now.pods, &pods) {
                        pods = Arc::clone(&now.pods);
                        self.pods_changed(&pods, &mut listening);
                    }
                    if !Arc::ptr_eq(&now.plan, &plan) {
                        plan = Arc::clone(&now.plan);
                        self.live.decide_again(&plan);
                        self.sweep();
                    }
                }
                Ok(()) = certificates.changed() => {
                    certificates.mark_unchanged();
                    self.live.prove_again(&self.identities);
                    self.sweep();
                }
                _ = sweep.tick() => self.sweep(),
                changed = phase.changed() => {
                    let now = *phase.borrow_and_update();
                    match now {
                        Phase::Serving if changed.is_ok() => {}
                        Phase::Draining if changed.is_ok() => self.drain(&mut listening),
                        Phase::Serving | Phase::Draining | Phase::Ended => break,
                    }
                }
            }
        }
        self.end(&mut listening).await;
        turns.abort();
        rounds.abort();
    }

    fn pods_changed(self: &Rc<Self>, table: &PodTable, listening: &mut Listening) {
        if !self.draining.get() {
            listener::reconcile(self, table, listening);
        }
        self.live.end_pods(|uid| !table.contains_key(uid));
        self.sweep();
    }

    /// Drops idle tunnels that must not be used again.
    fn sweep(&self) {
        let table = Arc::clone(&self.in_force.borrow().pods);
        let plan = self.plan();
        let keep = |key: &Key, epoch: Epoch| {
            table.contains_key(&*key.uid)
                && self.identities.epoch(&key.own) == Some(epoch)
                && plan
                    .pods
                    .get(&*key.uid)
                    .is_none_or(|pod| pod.view.set == key.set)
                && plan
                    .peers
                    .get(&key.to.addr)
                    .is_some_and(|now| now.id == key.peer)
                && plan.names.workloads.get(&key.to.addr).is_some_and(|now| {
                    *now.uid == *key.peer_uid
                        && now.name.namespace == key.expected.namespace()
                        && now.service_account == key.expected.service_account()
                })
        };
        self.close(self.pool.sweep(Instant::now(), keep));
    }

    /// No new connections; what is open may come to its end.
    fn drain(&self, listening: &mut Listening) {
        self.draining.set(true);
        listening.stop();
        self.live.end_idle(Reason::AgentShutdown);
        self.close(self.pool.drain());
    }

    /// Resets what is still open, and waits until that is said.
    async fn end(&self, listening: &mut Listening) {
        self.drain(listening);
        self.live.end_all(Reason::AgentShutdown);
        let said = async {
            while self.live.len() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(2), said)
            .await
            .is_err()
        {
            tracing::warn!(left = self.live.len(), "connections did not end in time");
        }
    }
}

/// Counts a task that panics.
struct CountPanic(Metrics);

impl Drop for CountPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked();
        }
    }
}
