// SPDX-License-Identifier: Apache-2.0
//! Accepts the connections that the kernel steers to the agent's listeners in pods, and assigns them to
//! workers.
//!
//! One worker accepts for a pod. It keeps a connection unless another worker carries fewer. Connections
//! are only counted against the pod's bounds here; nothing is read from them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use mesh_common::Reason;
use mesh_common::pod::ListenerSlot;
use mesh_datapath::pods::{Listeners, PodHandle, PodTable};
use mesh_identity::Refusal;
use mesh_log::{log_limited, warn_limited};
use mesh_tunnel::Socket;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::{JoinHandle, spawn_local};

use super::admission::Admission;
use super::pod_sockets::KEEPALIVE;
use super::worker::{Job, JobKind, PodResources, Slot, Worker};
use mesh_telemetry::metrics::Role;

/// The pause after accept() failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The pods that this worker accepts for.
#[derive(Debug, Default)]
pub(crate) struct Listening(BTreeMap<String, Accepting>);

#[derive(Debug)]
struct Accepting {
    listeners: Arc<Listeners>,
    resources: Arc<PodResources>,
    tasks: Vec<JoinHandle<()>>,
}

impl Listening {
    /// Accepts nothing more. The listeners themselves belong to the module `pods`.
    pub(crate) fn stop(&mut self) {
        self.0.clear();
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Accepts for the pods of `table` that are this worker's, and no longer for others.
pub(crate) fn reconcile(worker: &Rc<Worker>, table: &PodTable, listening: &mut Listening) {
    let workers = worker.workers.jobs.len();
    let own = |pod: &PodHandle| pod.index.0 as usize % workers == worker.number;
    listening.0.retain(|uid, accepting| {
        table
            .get(uid)
            .and_then(|pod| pod.listeners.as_ref())
            .is_some_and(|now| Arc::ptr_eq(now, &accepting.listeners))
    });
    for (uid, pod) in table {
        let Some(listeners) = &pod.listeners else {
            continue;
        };
        if listening.0.contains_key(uid) || !own(pod) {
            continue;
        }
        match start(worker, pod, listeners) {
            Ok(accepting) => {
                listening.0.insert(uid.clone(), accepting);
            }
            Err(error) => {
                log_limited!(error, uid, uid, %error, "cannot accept connections of a pod: they are refused");
            }
        }
    }
}

fn start(
    worker: &Rc<Worker>,
    pod: &PodHandle,
    listeners: &Arc<Listeners>,
) -> io::Result<Accepting> {
    let bounds = worker.timing.handshakes;
    let mut accepting = Accepting {
        listeners: Arc::clone(listeners),
        resources: Arc::new(PodResources {
            uid: pod.uid.as_str().into(),
            captured: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            silent: AtomicUsize::new(0),
            admission: Admission::new(bounds, worker.workers.handshakes.clone()),
            usage: worker.usage(pod),
        }),
        tasks: Vec::new(),
    };
    for (slot, listener) in listeners.iter() {
        let kind = match slot {
            ListenerSlot::Outbound4 | ListenerSlot::Outbound6 => JobKind::Captured,
            ListenerSlot::Tunnel4 | ListenerSlot::Tunnel6 => JobKind::Tunnel,
        };
        // Accepted sockets inherit these options, which saves a system call for each.
        socket2::SockRef::from(listener).set_tcp_nodelay(true)?;
        if kind == JobKind::Tunnel {
            socket2::SockRef::from(listener).set_tcp_keepalive(&KEEPALIVE)?;
        }
        let listener = TcpListener::from_std(listener.try_clone()?)?;
        let worker = Rc::clone(worker);
        let resources = Arc::clone(&accepting.resources);
        let task = spawn_local(async move { accept(&worker, &listener, kind, &resources).await });
        accepting.tasks.push(task);
    }
    Ok(accepting)
}

async fn accept(
    worker: &Rc<Worker>,
    listener: &TcpListener,
    kind: JobKind,
    resources: &Arc<PodResources>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _from)) => hand_over(worker, kind, resources, stream),
            // The connection was closed before it was accepted.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                log_limited!(warn, resources.uid, uid = %resources.uid, %error, "cannot accept connections of a pod");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Counts a connection against its pod's bound, and gives it to a worker.
fn hand_over(worker: &Rc<Worker>, kind: JobKind, resources: &Arc<PodResources>, stream: TcpStream) {
    let timing = &worker.timing;
    let slot = match kind {
        JobKind::Captured => Slot::take(resources, |s| &s.captured, timing.captured_per_pod),
        JobKind::Tunnel => Slot::take(resources, |s| &s.tunnels, timing.tunnels_per_pod),
    };
    let Some(slot) = slot else {
        refuse(worker, kind, &stream);
        return;
    };
    let resources = Arc::clone(resources);
    let job = Job {
        kind,
        resources,
        slot,
    };
    let to = worker.workers.choose(worker.number);
    if to == worker.number {
        worker.spawn(job, Socket::from_tokio(stream));
        return;
    }
    // From here on the socket is registered with no runtime, until the other worker does it.
    let moved = stream.into_std().map(|stream| {
        match worker.workers.jobs[to].try_send((job, stream)) {
            Ok(()) => {}
            // The other worker has fallen behind: this one carries the connection.
            Err(TrySendError::Full(back) | TrySendError::Closed(back)) => worker.take_over(back),
        }
    });
    if let Err(error) = moved {
        warn_limited!(
            "pass_connection",
            error,
            "cannot pass a connection to another worker"
        );
    }
}

/// Refuses a connection beyond a bound: the peer sees a reset.
pub(crate) fn refuse(worker: &Worker, kind: JobKind, stream: &impl AsFd) {
    let verdict = mesh_common::Verdict::refuse(Reason::LimitReached);
    match kind {
        JobKind::Captured => {
            let direction = mesh_common::Direction::Egress;
            worker.metrics().verdict(direction, &verdict);
        }
        JobKind::Tunnel => {
            worker
                .metrics()
                .handshake(Role::Server, Err(Refusal::LimitReached.label()));
        }
    }
    let linger = Some(Duration::ZERO);
    if let Err(error) = socket2::SockRef::from(stream).set_linger(linger) {
        tracing::debug!(%error, "cannot reset a connection");
    }
}
