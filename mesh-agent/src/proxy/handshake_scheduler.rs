// SPDX-License-Identifier: Apache-2.0
//! Schedules the CPU time of TLS handshakes fairly between the pods of a worker.
//!
//! A handshake costs a hundred times as much as a packet of an open connection, and any client that can
//! reach the tunnel port can request one. So permits rotate between pods, one permit for one step of one
//! handshake, and all other ready tasks run between two steps. A pod whose handshake has
//! computed then waits three times as long as that took while other pods of the worker are busy.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_tunnel::tls::CpuScheduler;
use tokio::sync::{Notify, oneshot};

/// While other pods are busy, a pod's handshakes get one part in this many of the worker's time.
const SHARE: u32 = 4;
/// A pod counts as busy for this long after it ran.
const RECENT: Duration = Duration::from_millis(100);
/// A pod's last computation is forgotten after this time.
const FORGET: Duration = Duration::from_secs(1);

/// A handshake that waits for a permit.
type Waiter = oneshot::Sender<Permit>;

#[derive(Debug, Default)]
struct Pod {
    waiting: VecDeque<Waiter>,
    /// The earliest time of the next permit.
    after: Option<Instant>,
}

/// Schedules the handshakes of one worker.
#[derive(Debug, Default)]
pub(crate) struct HandshakeScheduler {
    pods: RefCell<BTreeMap<Arc<str>, Pod>>,
    /// The pod that had the last permit: the next one in order gets the next.
    last: RefCell<Option<Arc<str>>>,
    /// A handshake waits, or a permit was returned.
    changed: Rc<Notify>,
    /// The two pods that ran last, and when.
    ran: Cell<[Option<(u64, Instant)>; 2]>,
}

/// The right to compute one step. The next permit is granted when this one is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    begun: Instant,
    took: Rc<Cell<Option<Duration>>>,
    changed: Rc<Notify>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.took.set(Some(self.begun.elapsed()));
        self.changed.notify_one();
    }
}

impl HandshakeScheduler {
    /// Waits for a permit of this pod. Cancel safe: a handshake that no longer waits is left out.
    pub(crate) async fn permit(&self, pod: &Arc<str>) -> Option<Permit> {
        let (sender, receiver) = oneshot::channel();
        self.pods
            .borrow_mut()
            .entry(Arc::clone(pod))
            .or_default()
            .waiting
            .push_back(sender);
        self.changed.notify_one();
        receiver.await.ok()
    }

    /// Records that a task of a pod ran: handshakes of other pods are held back for a while.
    pub(crate) fn ran(&self, pod: u64, now: Instant) {
        let [first, second] = self.ran.get();
        let mine = Some((pod, now));
        self.ran.set(match first {
            Some((other, _)) if other != pod => [mine, first],
            _ => [mine, second],
        });
    }

    /// Whether another pod was busy a moment ago.
    fn others_ran(&self, pod: u64, now: Instant) -> bool {
        let recent = |at: Instant| now.saturating_duration_since(at) < RECENT;
        let ran = self.ran.get();
        ran.iter()
            .flatten()
            .any(|(it, at)| *it != pod && recent(*at))
    }

    /// Grants permits, for ever. Between two of them the runtime polls for packets.
    pub(crate) async fn run(&self) {
        loop {
            let now = Instant::now();
            match self.next(now) {
                Next::Pod(pod, waiter) => self.grant(&pod, waiter).await,
                Next::At(time) => {
                    let time = tokio::time::Instant::from_std(time);
                    tokio::select! {
                        () = self.changed.notified() => {}
                        () = tokio::time::sleep_until(time) => {}
                    }
                }
                Next::Nothing => self.changed.notified().await,
            }
        }
    }

    async fn grant(&self, pod: &Arc<str>, waiter: Waiter) {
        let took = Rc::new(Cell::new(None));
        let permit = Permit {
            begun: Instant::now(),
            took: Rc::clone(&took),
            changed: Rc::clone(&self.changed),
        };
        if waiter.send(permit).is_err() {
            return;
        }
        let took = loop {
            match took.get() {
                Some(took) => break took,
                None => self.changed.notified().await,
            }
        };
        let now = Instant::now();
        if self.others_ran(number(pod), now)
            && let Some(queue) = self.pods.borrow_mut().get_mut(pod)
        {
            queue.after = Some(now + took * (SHARE - 1));
        }
        tokio::task::yield_now().await;
    }

    /// The next pod in order that waits for a permit and may have one.
    fn next(&self, now: Instant) -> Next {
        let mut pods = self.pods.borrow_mut();
        pods.retain(|_, pod| {
            pod.waiting.retain(|waiter| !waiter.is_closed());
            !pod.waiting.is_empty() || pod.after.is_some_and(|after| now < after + FORGET)
        });
        let last = self.last.borrow().clone();
        let behind = |uid: &Arc<str>| last.as_ref().is_some_and(|last| uid > last);
        let may = |pod: &Pod| pod.after.is_none_or(|after| after <= now);
        let waiting = || pods.iter().filter(|(_, pod)| !pod.waiting.is_empty());
        let next = waiting()
            .filter(|(_, pod)| may(pod))
            .min_by_key(|(uid, _)| !behind(uid))
            .map(|(uid, _)| Arc::clone(uid));
        let soonest = waiting().filter_map(|(_, pod)| pod.after).min();
        let Some(uid) = next else {
            return soonest.map_or(Next::Nothing, Next::At);
        };
        let waiter = pods.get_mut(&uid).and_then(|pod| pod.waiting.pop_front());
        *self.last.borrow_mut() = Some(Arc::clone(&uid));
        match waiter {
            Some(waiter) => Next::Pod(uid, waiter),
            None => Next::Nothing,
        }
    }
}

/// The handshakes of one pod, as the TLS code asks for their permits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PodHandshakes<'a> {
    scheduler: &'a HandshakeScheduler,
    pod: &'a Arc<str>,
}

impl<'a> PodHandshakes<'a> {
    /// Creates the scheduler of one pod's handshakes.
    pub(crate) const fn new(scheduler: &'a HandshakeScheduler, pod: &'a Arc<str>) -> Self {
        Self { scheduler, pod }
    }
}

impl CpuScheduler for PodHandshakes<'_> {
    type Permit = Option<Permit>;

    async fn permit(&self) -> Option<Permit> {
        self.scheduler.permit(self.pod).await
    }
}

/// The next permit.
enum Next {
    Pod(Arc<str>, Waiter),
    At(Instant),
    Nothing,
}

/// Identifies a pod in few bytes: by the address of its UID in memory, which its connections share.
pub(crate) fn number(pod: &Arc<str>) -> u64 {
    Arc::as_ptr(pod).cast::<u8>().addr() as u64
}
