// SPDX-License-Identifier: Apache-2.0
//! Who of a worker's handshakes may compute next, and how many may be under way.
//!
//! A handshake costs a hundred times what a packet of an open connection does, and anybody who can
//! reach the tunnel port can ask for one. So pods take turns, one step of one handshake at a time,
//! with everything else that is ready between two steps; and a pod whose handshakes have computed
//! waits three times as long while others of the worker have something to do.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

/// While others are at work a pod's handshakes get one part in this many of the worker's time.
const PART: u32 = 4;
/// Others are at work if one of them was in this time.
const RECENT: Duration = Duration::from_millis(100);
/// A pod that has waited this long is not known as one that computed.
const FORGET: Duration = Duration::from_secs(1);

/// Who waits for a turn, and is given it.
type Waiter = oneshot::Sender<Turn>;

#[derive(Debug, Default)]
struct Pod {
    waiting: VecDeque<Waiter>,
    /// Not before this.
    after: Option<Instant>,
}

/// The turns of one worker.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    pods: RefCell<BTreeMap<Arc<str>, Pod>>,
    /// Who had the last turn: the next one in order has the next.
    last: RefCell<Option<Arc<str>>>,
    /// Somebody waits, or has had its turn.
    news: Rc<Notify>,
    /// The last pods whose tasks ran, and when: never two entries of one pod.
    ran: Cell<[Option<(u64, Instant)>; 2]>,
}

/// The right to compute one step; the next is given out when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    begun: Instant,
    took: Rc<Cell<Option<Duration>>>,
    news: Rc<Notify>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.took.set(Some(self.begun.elapsed()));
        self.news.notify_one();
    }
}

impl Turns {
    /// Waits for a turn of this pod. Cancel safe: who does not wait any more is passed over.
    pub(crate) async fn turn(&self, pod: &Arc<str>) -> Option<Turn> {
        let (sender, receiver) = oneshot::channel();
        self.pods
            .borrow_mut()
            .entry(Arc::clone(pod))
            .or_default()
            .waiting
            .push_back(sender);
        self.news.notify_one();
        receiver.await.ok()
    }

    /// Something of a pod has run: handshakes of other pods are held back for a while.
    pub(crate) fn ran(&self, pod: u64, now: Instant) {
        let [first, second] = self.ran.get();
        let mine = Some((pod, now));
        self.ran.set(match first {
            Some((other, _)) if other != pod => [mine, first],
            _ => [mine, second],
        });
    }

    /// Whether another pod than this one had something to do a moment ago.
    fn others_ran(&self, pod: u64, now: Instant) -> bool {
        let recent = |at: Instant| now.saturating_duration_since(at) < RECENT;
        let ran = self.ran.get();
        ran.iter()
            .flatten()
            .any(|(it, at)| *it != pod && recent(*at))
    }

    /// Gives out turns, for ever. Between two of them the runtime looks for packets.
    pub(crate) async fn run(&self) {
        loop {
            let now = Instant::now();
            match self.next(now) {
                Next::Pod(pod, waiter) => self.give(&pod, waiter).await,
                Next::At(time) => {
                    let time = tokio::time::Instant::from_std(time);
                    tokio::select! {
                        () = self.news.notified() => {}
                        () = tokio::time::sleep_until(time) => {}
                    }
                }
                Next::Nobody => self.news.notified().await,
            }
        }
    }

    async fn give(&self, pod: &Arc<str>, waiter: Waiter) {
        let took = Rc::new(Cell::new(None));
        let turn = Turn {
            begun: Instant::now(),
            took: Rc::clone(&took),
            news: Rc::clone(&self.news),
        };
        if waiter.send(turn).is_err() {
            return;
        }
        let took = loop {
            match took.get() {
                Some(took) => break took,
                None => self.news.notified().await,
            }
        };
        let now = Instant::now();
        if self.others_ran(number(pod), now)
            && let Some(queue) = self.pods.borrow_mut().get_mut(pod)
        {
            queue.after = Some(now + took * (PART - 1));
        }
        tokio::task::yield_now().await;
    }

    /// The next pod in order that waits and may compute.
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
            return soonest.map_or(Next::Nobody, Next::At);
        };
        let waiter = pods.get_mut(&uid).and_then(|pod| pod.waiting.pop_front());
        *self.last.borrow_mut() = Some(Arc::clone(&uid));
        match waiter {
            Some(waiter) => Next::Pod(uid, waiter),
            None => Next::Nobody,
        }
    }
}

/// Whose turns are taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Computing<'a>(Option<(&'a Turns, &'a Arc<str>)>);

impl<'a> Computing<'a> {
    /// Without turns: there is nobody else.
    #[cfg(test)]
    pub(crate) const ALONE: Self = Self(None);

    /// As this pod.
    pub(crate) const fn of(turns: &'a Turns, pod: &'a Arc<str>) -> Self {
        Self(Some((turns, pod)))
    }

    /// Waits for a turn.
    pub(crate) async fn turn(self) -> Option<Turn> {
        let (turns, pod) = self.0?;
        turns.turn(pod).await
    }
}

/// What is to be done next.
enum Next {
    Pod(Arc<str>, Waiter),
    At(Instant),
    Nobody,
}

/// A pod in few bytes: its name's place in memory, which its connections share.
pub(crate) fn number(pod: &Arc<str>) -> u64 {
    Arc::as_ptr(pod).cast::<u8>().addr() as u64
}
