// SPDX-License-Identifier: Apache-2.0
//! The data path in user space: what the kernel hands to the agent goes through a tunnel to the
//! agent of the other node, and from there to the application.
//!
//! ```text
//! application -> listener -> outbound -> (pool | dial, tls) -> tunnel ~~~> listener -> inbound -> application
//!                                \------------- relay -------------/            \------ relay ------/
//! ```
//! Worker threads, each with a runtime of its own; a connection never changes its thread. This
//! room asks policy and identity, and makes neither; it never sends a byte in clear to another
//! node, and reads no configuration from anywhere but its arguments.

use std::cell::{Cell, RefCell};
use std::io;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use mesh_common::Port;
use mesh_common::settings::TUNNEL_PORT;
use mesh_telemetry::record::{Bytes, Recorder};
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use self::dial::{Dial, InPod};
use self::worker::{Crew, Load, Moved, Worker};
use crate::control::InForce;
use mesh_datapath::datapath::Handles;
use mesh_identity::Identities;

pub mod admission;
mod buffers;
mod dial;
mod fair;
mod follow;
mod inbound;
mod listener;
mod live;
mod outbound;
mod pool;
mod relay;
mod socket;
#[cfg(test)]
mod testing;
mod tls;
pub mod tunnel;
mod turns;
mod worker;

#[cfg(any(test, fuzzing))]
pub use self::{tls::records::fuzz::records, tunnel::frame::fuzz::frames};

/// The tunnel protocol `mesh/1`, as ALPN (RFC 7301) names it.
pub const ALPN: &[u8] = b"mesh/1";

/// Connections that wait to be taken over by another worker.
const JOBS: usize = 1024;

/// What the proxy is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Threads that carry connections.
    pub workers: NonZeroUsize,
    /// The port on which other nodes' agents are reached, and this one is.
    pub tunnel_port: Port,
    /// Whether other nodes' agents are tried on the application's own port first.
    pub real_ports: bool,
    /// Bounds in time and number.
    pub timing: Timing,
}

impl Config {
    /// With so many workers, and the defaults for all else.
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

/// Bounds in time and number.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Captured connections of one pod.
    pub captured_per_pod: usize,
    /// Accepted tunnels of one pod.
    pub tunnels_per_pod: usize,
    /// Handshakes.
    pub handshakes: admission::Bounds,
    /// For a TLS handshake, either side.
    pub handshake: Duration,
    /// The same on an application's own port: who answers there may be the application.
    pub handshake_first: Duration,
    /// To reach another node's agent, or an application.
    pub connect: Duration,
    /// The same, where another endpoint of the service can be tried.
    pub connect_first: Duration,
    /// How long a peer that refuses connections may be just starting.
    pub retry: Duration,
    /// The first pause between two attempts; it doubles.
    pub first_retry: Duration,
    /// How long a captured connection waits for its pod's certificate.
    pub certificate: Duration,
    /// How long the plan may be behind the node of a pod that is not known here yet.
    pub unknown_peer: Duration,
    /// How long an accepted tunnel may wait for its next connection: longer than any opener keeps
    /// one.
    pub tunnel_idle: Duration,
    /// How long a refused connection is held that is to meet silence.
    pub silence: Duration,
    /// How many of these a pod may have.
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

/// What other rooms provide.
#[derive(Clone, Debug)]
pub struct Doors {
    /// The policy in force and the pods of this node.
    pub in_force: watch::Receiver<Arc<InForce>>,
    /// Certificates.
    pub identities: Identities,
    /// Records and metrics.
    pub recorder: Recorder,
}

/// How far the agent is on its way out.
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
    gone: mpsc::Receiver<()>,
}

impl ProxyHandle {
    /// Connections and tunnels that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.loads.iter().map(|load| load.load(Relaxed)).sum()
    }

    /// Accepts nothing more and closes idle tunnels; open connections go on.
    pub fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    /// Waits until no connection is open. Cancel safe.
    pub async fn drained(&self) {
        while self.open() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Resets what is still open (`agent_shutdown`) and waits for the workers to end.
    pub async fn finish(mut self) {
        self.phase.send_replace(Phase::Ended);
        while self.gone.recv().await.is_some() {}
    }

    /// Waits for a worker to end although nobody wanted it to. Cancel safe.
    pub async fn failed(&mut self) {
        if self.gone.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Starts the workers. Pods in the table get their connections accepted; the connections of a pod
/// that leaves it are ended.
///
/// # Errors
/// When threads or runtimes cannot be made.
pub fn start(config: Config, doors: Doors, datapath: Handles) -> io::Result<ProxyHandle> {
    start_with(config, doors, move || Box::new(InPod(datapath.clone())))
}

fn start_with(
    config: Config,
    doors: Doors,
    dial: impl Fn() -> Box<dyn Dial> + Clone + Send + 'static,
) -> io::Result<ProxyHandle> {
    let workers = config.workers.get();
    let (phase, phases) = watch::channel(Phase::Serving);
    let (going, gone) = mpsc::channel(workers);
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..workers).map(|_| mpsc::channel::<Moved>(JOBS)).unzip();
    let loads: Arc<[AtomicUsize]> = (0..workers).map(|_| AtomicUsize::new(0)).collect();
    let crew = Crew {
        jobs: senders.into(),
        loads: Arc::clone(&loads),
        handshakes: admission::Total::new(&config.timing.handshakes),
    };
    for (number, jobs) in receivers.into_iter().enumerate() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_park(follow::park)
            .on_thread_unpark(follow::unpark)
            .build()?;
        let (config, doors, crew) = (config.clone(), doors.clone(), crew.clone());
        let (phases, going, dial) = (phases.clone(), going.clone(), dial.clone());
        std::thread::Builder::new()
            .name(format!("mesh-worker-{number}"))
            .spawn(move || {
                let _going = Going(going);
                if let Err(error) = follow::begin() {
                    tracing::debug!(%error, "a worker runs where the scheduler likes");
                }
                let pooled = doors.recorder.metrics().clone();
                let worker = Rc::new(Worker {
                    number,
                    crew,
                    in_force: doors.in_force,
                    identities: doors.identities,
                    recorder: doors.recorder,
                    dial: dial(),
                    tunnel_port: config.tunnel_port,
                    real_ports: config.real_ports,
                    unmarked: RefCell::default(),
                    timing: config.timing,
                    buffers: Rc::default(),
                    turns: turns::Turns::default(),
                    fair: fair::Fair::new(std::time::Instant::now()),
                    pool: pool::Pool::new(pool::Bounds::default(), pooled),
                    live: Rc::default(),
                    draining: Cell::new(false),
                });
                LocalSet::new().block_on(&runtime, worker.run(jobs, phases));
            })?;
    }
    Ok(ProxyHandle { phase, loads, gone })
}

/// Says that a worker ended, however it did.
struct Going(mpsc::Sender<()>);

impl Drop for Going {
    fn drop(&mut self) {
        // Full = somebody else has said so already.
        if let Err(error) = self.0.try_send(()) {
            tracing::debug!(%error, "nobody waits for a worker's end");
        }
    }
}

/// Counts a relay's bytes as seen from who opened the connection.
struct Counted<'a> {
    bytes: &'a Bytes,
    /// At the end that opened it: its part of its worker's load.
    source: Option<&'a Load>,
}

impl<'a> Counted<'a> {
    /// At the end that opened it.
    const fn source(bytes: &'a Bytes, load: &'a Load) -> Self {
        Self {
            bytes,
            source: Some(load),
        }
    }

    /// At the end that was reached.
    const fn destination(bytes: &'a Bytes) -> Self {
        Self {
            bytes,
            source: None,
        }
    }
}

impl relay::Count for Counted<'_> {
    fn taken(&self, bytes: u64) {
        if self.source.is_some() {
            self.bytes.add_sent(bytes);
        } else {
            self.bytes.add_received(bytes);
        }
    }

    fn given(&self, bytes: u64) {
        if self.source.is_some() {
            self.bytes.add_received(bytes);
        } else {
            self.bytes.add_sent(bytes);
        }
    }

    fn finished(&self) {
        if let Some(load) = self.source {
            load.give_back();
        }
    }
}

#[cfg(test)]
mod tests;
