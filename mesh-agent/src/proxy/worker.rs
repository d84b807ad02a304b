// SPDX-License-Identifier: Apache-2.0
//! One worker thread, and the state that its connections share. A connection never changes its
//! thread, so nothing here is locked.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mesh_common::{Addr, Endpoint, Port, Reason};
use mesh_datapath::pods::{PodHandle, PodTable};
use mesh_identity::{Epoch, Identities, SpiffeId};
use mesh_log::{log_limited, warn_limited};
use mesh_plan::Index;
use mesh_telemetry::metrics::{Metrics, Usage};
use mesh_telemetry::record::Recorder;
use mesh_tunnel::buffers::{BufferAccount, BufferPool, BufferUsage};
use mesh_tunnel::{Carrier as _, Socket, Tunnel};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_local;
use tokio::time::MissedTickBehavior;

use super::admission::{Admission, Total};
use super::connection_registry::ConnectionRegistry;
use super::fair_scheduler::FairScheduler;
use super::handshake_scheduler::{self, HandshakeScheduler};
use super::listener::{self, Listening};
use super::pod_sockets::PodSockets;
use super::pool::{Key, Pool};
use super::{Phase, Timing};
use crate::control::InForce;

/// The interval at which idle tunnels are swept.
const SWEEP: Duration = Duration::from_secs(1);

/// The time for which a peer is reached on the tunnel port after its network removed the TCP option.
const UNMARKED: Duration = Duration::from_secs(60);

/// The use of the agent by one pod, over all workers.
#[derive(Debug)]
pub(crate) struct PodResources {
    /// The pod.
    pub(crate) uid: Arc<str>,
    /// Number of open captured connections.
    pub(crate) captured: AtomicUsize,
    /// Number of open accepted tunnels.
    pub(crate) tunnels: AtomicUsize,
    /// Number of refused connections that are held open in silence.
    pub(crate) silent: AtomicUsize,
    /// Bounds of handshakes.
    pub(crate) admission: Admission,
    /// CPU time and buffers of the pod's workload.
    pub(crate) usage: Arc<Usage>,
}

/// One slot of a bounded count; returned when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    resources: Arc<PodResources>,
    count: fn(&PodResources) -> &AtomicUsize,
}

impl Slot {
    /// Takes a slot, unless `most` are taken.
    pub(crate) fn take(
        resources: &Arc<PodResources>,
        count: fn(&PodResources) -> &AtomicUsize,
        most: usize,
    ) -> Option<Self> {
        let slot = Self {
            resources: Arc::clone(resources),
            count,
        };
        // Taken first, so that no two take the last slot.
        (count(resources).fetch_add(1, Relaxed) < most).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        (self.count)(&self.resources).fetch_sub(1, Relaxed);
    }
}

/// An accepted connection for a worker.
#[derive(Debug)]
pub(crate) struct Job {
    /// Kind of connection.
    pub(crate) kind: JobKind,
    /// The pod that it belongs to.
    pub(crate) resources: Arc<PodResources>,
    /// The slot among the pod's connections.
    pub(crate) slot: Slot,
}

/// A connection on its way to another worker; its socket is registered with no runtime.
pub(crate) type PassedJob = (Job, std::net::TcpStream);

/// Kind of an accepted connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobKind {
    /// A captured connection of an application.
    Captured,
    /// A tunnel of another agent.
    Tunnel,
}

/// All workers; each worker has a copy.
#[derive(Clone, Debug)]
pub(crate) struct WorkerPool {
    /// The queue of each worker.
    pub(crate) jobs: Arc<[mpsc::Sender<PassedJob>]>,
    /// The number of connections that each worker carries.
    pub(crate) loads: Arc<[AtomicUsize]>,
    /// Handshakes of all workers.
    pub(crate) handshakes: Total,
}

impl WorkerPool {
    /// Chooses the worker of the next connection: `own`, unless another carries fewer. A connection
    /// that stays saves a wake-up of another thread.
    pub(crate) fn choose(&self, own: usize) -> usize {
        let load = |worker: usize| self.loads[worker].load(Relaxed);
        let least = (0..self.loads.len()).min_by_key(|worker| load(*worker));
        least.filter(|it| load(*it) < load(own)).unwrap_or(own)
    }
}

/// One connection's part of [`WorkerPool::loads`]; returned when dropped, if not before.
#[derive(Debug)]
pub(crate) struct Load {
    loads: Arc<[AtomicUsize]>,
    worker: usize,
    counts: Cell<bool>,
}

impl Load {
    pub(crate) fn new(workers: &WorkerPool, worker: usize) -> Self {
        workers.loads[worker].fetch_add(1, Relaxed);
        Self {
            loads: Arc::clone(&workers.loads),
            worker,
            counts: Cell::new(true),
        }
    }

    /// Stops counting a connection that is about to end. A client that closes one connection and opens
    /// the next at once stays with its worker that way, and with that worker's tunnels.
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

/// The state of one worker thread.
pub(crate) struct Worker {
    /// Number of this worker.
    pub(crate) number: usize,
    /// All workers.
    pub(crate) workers: WorkerPool,
    /// The policy in force and the pods of this node.
    pub(crate) in_force: watch::Receiver<Arc<InForce>>,
    /// Certificates.
    pub(crate) identities: Identities,
    /// Records.
    pub(crate) recorder: Recorder,
    /// Makes sockets in pods.
    pub(crate) sockets: Box<dyn PodSockets>,
    /// The port on which agents accept tunnels.
    pub(crate) tunnel_port: Port,
    /// Whether agents are tried on the application's own port first.
    pub(crate) real_ports: bool,
    /// Peers on the way to which the mark of tunnels was lost, and when that was noticed.
    pub(crate) unmarked: RefCell<BTreeMap<Addr, Instant>>,
    /// Bounds in time and number.
    pub(crate) timing: Timing,
    /// Relay buffers.
    pub(crate) buffers: Rc<BufferPool>,
    /// Schedules handshakes.
    pub(crate) handshakes: HandshakeScheduler,
    /// Schedules open connections.
    pub(crate) fair: FairScheduler,
    /// Idle tunnels.
    pub(crate) pool: Pool,
    /// Open connections.
    pub(crate) connections: Rc<ConnectionRegistry>,
    /// Whether no new connections are accepted.
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

    /// The port on which the agent of a destination is tried first.
    pub(crate) fn port_of(&self, to: &Endpoint) -> Port {
        let found = self.unmarked.borrow().get(&to.addr).copied();
        let lost = found.is_some_and(|at| at.elapsed() < UNMARKED);
        if self.real_ports && !lost {
            to.port
        } else {
            self.tunnel_port
        }
    }

    /// Reaches a peer on the tunnel port for a while, because the mark of tunnels was lost on the way.
    pub(crate) fn mark_lost(&self, peer: Addr) {
        log_limited!(warn, peer, %peer, "the network removes the TCP option of tunnels: using the tunnel port for this peer");
        let mut unmarked = self.unmarked.borrow_mut();
        unmarked.retain(|_, at| at.elapsed() < UNMARKED);
        unmarked.insert(peer, Instant::now());
        self.metrics().mark_lost();
    }

    /// The counters of a pod's workload.
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
    pub(crate) fn buffer_account(&self, resources: &PodResources) -> BufferAccount {
        let usage = WorkloadBuffers(Arc::clone(&resources.usage));
        BufferAccount::new(Rc::clone(&self.buffers), Arc::new(usage))
    }

    /// The SPIFFE ID of a workload of the trust domain.
    pub(crate) fn identity(&self, namespace: &str, service_account: &str) -> Option<SpiffeId> {
        SpiffeId::new(self.identities.trust_domain(), namespace, service_account).ok()
    }

    /// The identity of a pod of this node.
    pub(crate) fn own_identity(&self, uid: &str) -> Option<SpiffeId> {
        let plan = self.plan();
        let local = plan.pods.get(uid)?;
        self.identity(&local.name.namespace, &local.service_account)
    }

    /// Spawns the task that carries a connection.
    pub(crate) fn spawn(self: &Rc<Self>, job: Job, socket: Socket) {
        let worker = Rc::clone(self);
        let load = Load::new(&self.workers, self.number);
        let measured = (Rc::clone(self), Arc::clone(&job.resources));
        let task = async move {
            let _counted = CountPanic(worker.metrics().clone());
            match job.kind {
                JobKind::Captured => super::outbound::carry(&worker, job, socket, &load).await,
                JobKind::Tunnel => super::inbound::serve(&worker, job, socket).await,
            }
        };
        let mut task = Box::pin(task);
        spawn_local(std::future::poll_fn(move |cx| {
            let (worker, resources) = &measured;
            let begun = Instant::now();
            let polled = task.as_mut().poll(cx);
            let ended = Instant::now();
            let pod = handshake_scheduler::number(&resources.uid);
            worker.handshakes.ran(pod, ended);
            worker.fair.used(pod, ended - begun, ended);
            resources.usage.worked(ended - begun);
            polled
        }));
    }

    /// Takes over a connection that another worker has accepted.
    pub(crate) fn take_over(self: &Rc<Self>, (job, stream): PassedJob) {
        match Socket::new(stream) {
            Ok(socket) => self.spawn(job, socket),
            Err(error) => {
                warn_limited!(
                    "register_connection",
                    error,
                    "cannot register a connection with this worker"
                );
            }
        }
    }

    /// Closes tunnels in order.
    pub(crate) fn close(&self, tunnels: Vec<Tunnel>) {
        for tunnel in tunnels {
            spawn_local(tunnel.close());
        }
    }

    /// Runs until the agent ends.
    pub(crate) async fn run(
        self: Rc<Self>,
        mut jobs: mpsc::Receiver<PassedJob>,
        mut phase: watch::Receiver<Phase>,
    ) {
        let mut in_force = self.in_force.clone();
        let (mut plan, mut pods) = (self.plan(), Arc::default());
        let mut certificates = self.identities.subscribe();
        let mut listening = Listening::default();
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        in_force.mark_changed();
        let worker = Rc::clone(&self);
        let handshakes = spawn_local(async move { worker.handshakes.run().await });
        let worker = Rc::clone(&self);
        let rounds = spawn_local(async move { worker.fair.run().await });
        loop {
            tokio::select! {
                Some(passed) = jobs.recv() => self.take_over(passed),
                Ok(()) = in_force.changed() => {
                    let now = Arc::clone(&in_force.borrow_and_update());
                    if !Arc::ptr_eq(&now.pods, &pods) {
                        pods = Arc::clone(&now.pods);
                        self.pods_changed(&pods, &mut listening);
                    }
                    if !Arc::ptr_eq(&now.plan, &plan) {
                        plan = Arc::clone(&now.plan);
                        self.connections.decide_again(&plan);
                        self.sweep();
                    }
                }
                Ok(()) = certificates.changed() => {
                    certificates.mark_unchanged();
                    self.connections.prove_again(&self.identities);
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
        handshakes.abort();
        rounds.abort();
    }

    fn pods_changed(self: &Rc<Self>, table: &PodTable, listening: &mut Listening) {
        if !self.draining.get() {
            listener::reconcile(self, table, listening);
        }
        self.connections.end_pods(|uid| !table.contains_key(uid));
        self.sweep();
    }

    /// Closes idle tunnels that must not be used again.
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

    /// Accepts nothing more and closes idle tunnels.
    fn drain(&self, listening: &mut Listening) {
        self.draining.set(true);
        listening.stop();
        self.connections.end_idle(Reason::AgentShutdown);
        self.close(self.pool.drain());
    }

    /// Resets open connections, and waits until the peers are told.
    async fn end(&self, listening: &mut Listening) {
        self.drain(listening);
        self.connections.end_all(Reason::AgentShutdown);
        let ended = async {
            while self.connections.len() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(2), ended)
            .await
            .is_err()
        {
            tracing::warn!(
                left = self.connections.len(),
                "connections did not close in time"
            );
        }
    }
}

/// Counts the buffers of a pod's connections for its workload.
#[derive(Debug)]
struct WorkloadBuffers(Arc<Usage>);

impl BufferUsage for WorkloadBuffers {
    fn lent(&self, bytes: usize) {
        self.0.lent(bytes);
    }

    fn returned(&self, bytes: usize) {
        self.0.gave_back(bytes);
    }

    fn bytes(&self) -> u64 {
        self.0.buffers()
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
