// SPDX-License-Identifier: Apache-2.0
//! The proxy: relays captured connections through tunnels to other nodes' agents, and from tunnels to
//! applications.
//!
//! ```text
//! application -> listener -> outbound -> (pool | dial) -> tunnel ~~~> listener -> inbound -> application
//!                                \-------- relay --------/                 \-------- relay --------/
//! ```
//! Worker threads have a runtime each; a connection never changes its thread. This module asks policy
//! and identity, and makes neither. It never sends a byte in plaintext to another node, and reads no
//! configuration but its arguments. The protocol itself is the crate `mesh-tunnel`.

use std::cell::{Cell, RefCell};
use std::io;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mesh_common::Port;
use mesh_common::settings::TUNNEL_PORT;
use mesh_datapath::Handles;
use mesh_identity::Identities;
use mesh_telemetry::record::Recorder;
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use self::fair_scheduler::FairScheduler;
use self::handshake_scheduler::HandshakeScheduler;
use self::pod_sockets::{NamespaceSockets, PodSockets};
use self::worker::{PassedJob, Worker, WorkerPool};
use crate::control::InForce;

pub mod admission;
mod connection_registry;
mod cpu_affinity;
mod fair_scheduler;
mod handshake_scheduler;
mod inbound;
mod listener;
mod outbound;
mod pod_sockets;
mod pool;
mod traffic;
mod worker;

/// The most connections that wait to be taken over by one worker.
const JOBS: usize = 1024;

/// Configuration of the proxy.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number of worker threads.
    pub workers: NonZeroUsize,
    /// The port on which agents accept tunnels.
    pub tunnel_port: Port,
    /// Whether agents are tried on the application's own port first.
    pub real_ports: bool,
    /// Time limits and bounds.
    pub timing: Timing,
}

impl Config {
    /// Makes a configuration with the defaults for everything else.
    #[must_use]
    pub fn new(workers: NonZeroUsize) -> Self {
        Self {
            workers,
            tunnel_port: TUNNEL_PORT,
            real_ports: false,
            timing: Timing::default(),
        }
    }
}

/// Time limits and bounds.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Maximum number of captured connections of one pod.
    pub captured_per_pod: usize,
    /// Maximum number of accepted tunnels of one pod.
    pub tunnels_per_pod: usize,
    /// Bounds of concurrent handshakes.
    pub handshakes: admission::Bounds,
    /// Time limit of a TLS handshake, on either side.
    pub handshake: Duration,
    /// Time limit of a TLS handshake on an application's own port, where the application may answer.
    pub handshake_first: Duration,
    /// Time limit of connecting to another node's agent or to an application.
    pub connect: Duration,
    /// Time limit of connecting to an agent while another endpoint of the service can be tried.
    pub connect_first: Duration,
    /// The time during which a connect to a peer that refuses TCP is retried.
    pub retry: Duration,
    /// The first pause between two attempts, before jitter; it doubles.
    pub first_retry: Duration,
    /// The time for which a captured connection waits for its pod's certificate.
    pub certificate: Duration,
    /// The time for which a connection of an unknown pod waits for the plan.
    pub unknown_peer: Duration,
    /// The time for which an accepted tunnel may be idle: longer than any opener keeps one.
    pub tunnel_idle: Duration,
    /// The time for which a refused connection is held open in silence.
    pub silence: Duration,
    /// Maximum number of connections of one pod that are held open in silence.
    pub silent_per_pod: usize,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            captured_per_pod: 16_384,
            tunnels_per_pod: 16_384,
            handshakes: admission::Bounds::default(),
            handshake: Duration::from_secs(5),
            handshake_first: Duration::from_secs(2),
            connect: Duration::from_secs(10),
            connect_first: Duration::from_secs(2),
            retry: Duration::from_secs(2),
            first_retry: Duration::from_millis(20),
            certificate: Duration::from_secs(2),
            unknown_peer: Duration::from_secs(2),
            tunnel_idle: Duration::from_secs(900),
            // As long as connect() takes to give up, with the kernel's own tcp_syn_retries of 6.
            silence: Duration::from_secs(127),
            silent_per_pod: 1024,
        }
    }
}

/// The dependencies of the proxy on other modules.
#[derive(Clone, Debug)]
pub struct Dependencies {
    /// The policy in force and the pods of this node.
    pub in_force: watch::Receiver<Arc<InForce>>,
    /// Certificates.
    pub identities: Identities,
    /// Records and metrics.
    pub recorder: Recorder,
}

/// Phase of the agent's shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Serving,
    Draining,
    Ended,
}

/// The running proxy. Dropping it ends all connections.
#[derive(Debug)]
pub struct ProxyHandle {
    phase: watch::Sender<Phase>,
    loads: Arc<[AtomicUsize]>,
    exits: mpsc::Receiver<()>,
}

impl ProxyHandle {
    /// Number of open connections and tunnels.
    #[must_use]
    pub fn open(&self) -> usize {
        self.loads.iter().map(|load| load.load(Relaxed)).sum()
    }

    /// Accepts nothing more and closes idle tunnels. Open connections go on.
    pub fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    /// Waits until no connection is open. Cancel safe.
    pub async fn drained(&self) {
        while self.open() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Resets open connections (`agent_shutdown`) and waits until all workers have ended.
    pub async fn finish(mut self) {
        self.phase.send_replace(Phase::Ended);
        while self.exits.recv().await.is_some() {}
    }

    /// Waits until a worker fails. Cancel safe.
    pub async fn failed(&mut self) {
        if self.exits.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Starts the workers. They accept the connections of the pods in the table, and end those of a pod that
/// leaves it.
///
/// # Errors
/// When threads or runtimes cannot be made.
pub fn start(
    config: Config,
    dependencies: Dependencies,
    datapath: Handles,
) -> io::Result<ProxyHandle> {
    start_with(config, dependencies, move || {
        Box::new(NamespaceSockets(datapath.clone()))
    })
}

fn start_with(
    config: Config,
    dependencies: Dependencies,
    sockets: impl Fn() -> Box<dyn PodSockets> + Clone + Send + 'static,
) -> io::Result<ProxyHandle> {
    let count = config.workers.get();
    let (phase, phases) = watch::channel(Phase::Serving);
    let (exit, exits) = mpsc::channel(count);
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..count).map(|_| mpsc::channel::<PassedJob>(JOBS)).unzip();
    let loads: Arc<[AtomicUsize]> = (0..count).map(|_| AtomicUsize::new(0)).collect();
    let workers = WorkerPool {
        jobs: senders.into(),
        loads: Arc::clone(&loads),
        handshakes: admission::Total::new(&config.timing.handshakes),
    };
    for (number, jobs) in receivers.into_iter().enumerate() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_park(cpu_affinity::park)
            .on_thread_unpark(cpu_affinity::unpark)
            .build()?;
        let (config, dependencies, workers) =
            (config.clone(), dependencies.clone(), workers.clone());
        let (phases, exit, sockets) = (phases.clone(), exit.clone(), sockets.clone());
        std::thread::Builder::new()
            .name(format!("mesh-worker-{number}"))
            .spawn(move || {
                let _exit = WorkerExit(exit);
                if let Err(error) = cpu_affinity::begin() {
                    tracing::debug!(%error, "CPU affinity is not available to a worker");
                }
                let metrics = dependencies.recorder.metrics().clone();
                let worker = Rc::new(Worker {
                    number,
                    workers,
                    in_force: dependencies.in_force,
                    identities: dependencies.identities,
                    recorder: dependencies.recorder,
                    sockets: sockets(),
                    tunnel_port: config.tunnel_port,
                    real_ports: config.real_ports,
                    unmarked: RefCell::default(),
                    timing: config.timing,
                    buffers: Rc::default(),
                    handshakes: HandshakeScheduler::default(),
                    fair: FairScheduler::new(Instant::now()),
                    pool: pool::Pool::new(pool::Bounds::default(), metrics),
                    connections: Rc::default(),
                    draining: Cell::new(false),
                });
                LocalSet::new().block_on(&runtime, worker.run(jobs, phases));
            })?;
    }
    Ok(ProxyHandle {
        phase,
        loads,
        exits,
    })
}

/// Reports that a worker has ended, however it did.
struct WorkerExit(mpsc::Sender<()>);

impl Drop for WorkerExit {
    fn drop(&mut self) {
        // Full: another worker has reported its end.
        if let Err(error) = self.0.try_send(()) {
            tracing::debug!(%error, "the end of a worker was not awaited");
        }
    }
}

#[cfg(test)]
mod tests;
