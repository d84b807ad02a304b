// SPDX-License-Identifier: Apache-2.0
//! Accepts what the kernel steers to the agent's listeners in pods, and hands it to a worker.
//!
//! Each pod is accepted by one worker, which keeps a connection itself unless another carries
//! fewer. Here connections are only counted against the pod's bounds; nothing is read from them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use mesh_common::Reason;
use mesh_common::pod::ListenerSlot;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::{JoinHandle, spawn_local};

use super::admission::Admission;
use super::dial::KEEPALIVE;
use super::socket::Socket;
use super::worker::{Job, JobKind, Place, Share, Worker};
use mesh_datapath::pods::{Listeners, PodHandle, PodTable};
use mesh_identity::Refusal;
use mesh_telemetry::metrics::Role;

/// Pause after accept() failed for want of descriptors or memory.
const BREATH: Duration = Duration::from_millis(50);

/// The pods that this worker accepts for.
#[derive(Debug, Default)]
pub(crate) struct Listening(BTreeMap<String, Accepting>);

#[derive(Debug)]
struct Accepting {
    listeners: Arc<Listeners>,
    share: Arc<Share>,
    tasks: Vec<JoinHandle<()>>,
}

impl Listening {
    /// Accepts nothing more. The listeners themselves belong to the pods' room.
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
    let workers = worker.crew.jobs.len();
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
                tracing::error!(uid, %error, "cannot accept connections for a pod; they are refused");
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
        share: Arc::new(Share {
            uid: pod.uid.as_str().into(),
            captured: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            silent: AtomicUsize::new(0),
            admission: Admission::new(bounds, worker.crew.handshakes.clone()),
            usage: worker.usage(pod),
        }),
        tasks: Vec::new(),
    };
    for (slot, listener) in listeners.iter() {
        let kind = match slot {
            ListenerSlot::Outbound4 | ListenerSlot::Outbound6 => JobKind::Captured,
            ListenerSlot::Tunnel4 | ListenerSlot::Tunnel6 => JobKind::Tunnel,
        };
        // Accepted sockets inherit these: no system call for each.
        socket2::SockRef::from(listener).set_tcp_nodelay(true)?;
        if kind == JobKind::Tunnel {
            socket2::SockRef::from(listener).set_tcp_keepalive(&KEEPALIVE)?;
        }
        let listener = TcpListener::from_std(listener.try_clone()?)?;
        let worker = Rc::clone(worker);
        let share = Arc::clone(&accepting.share);
        let task = spawn_local(async move { accept(&worker, &listener, kind, &share).await });
        accepting.tasks.push(task);
    }
    Ok(accepting)
}

async fn accept(worker: &Rc<Worker>, listener: &TcpListener, kind: JobKind, share: &Arc<Share>) {
    loop {
        match listener.accept().await {
            Ok((stream, _from)) => hand_over(worker, kind, share, stream),
            // A connection that went away before it was accepted.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                tracing::warn!(uid = %share.uid, %error, "cannot accept connections for a pod");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

/// Counts a connection against its pod's bound and gives it to the worker that is to carry it.
fn hand_over(worker: &Rc<Worker>, kind: JobKind, share: &Arc<Share>, stream: TcpStream) {
    let timing = &worker.timing;
    let place = match kind {
        JobKind::Captured => Place::take(share, |s| &s.captured, timing.captured_per_pod),
        JobKind::Tunnel => Place::take(share, |s| &s.tunnels, timing.tunnels_per_pod),
    };
    let Some(place) = place else {
        refuse(worker, kind, &stream);
        return;
    };
    let share = Arc::clone(share);
    let job = Job { kind, share, place };
    let to = worker.crew.choose(worker.number);
    if to == worker.number {
        worker.carry(job, Socket::from_tokio(stream));
        return;
    }
    // From here on the socket is registered with no runtime, until the other worker does it.
    let moved = stream.into_std().map(|stream| {
        match worker.crew.jobs[to].try_send((job, stream)) {
            Ok(()) => {}
            // It has fallen behind: better here than nowhere.
            Err(TrySendError::Full(back) | TrySendError::Closed(back)) => worker.adopt(back),
        }
    });
    if let Err(error) = moved {
        tracing::warn!(%error, "cannot hand a connection to another worker");
    }
}

/// Refuses a connection beyond a bound: the other end sees a reset.
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
