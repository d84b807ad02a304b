// SPDX-License-Identifier: Apache-2.0
//! Schedules a worker's time fairly between the open connections of pods.
//!
//! A pod that has used more than its share of the worker's time while other pods are busy waits between
//! two steps until the worker has polled for packets; in each such round, one step of all waiting
//! connections is taken. So a pod's share does not depend on the number of its connections. A pod that
//! is alone never waits, and a worker never idles because of this.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// The window in which use is counted, and for which a pod that ran counts as busy: longer than many
/// connections take for a step each.
const WINDOW: Duration = Duration::from_millis(100);
/// The time of each window that every pod may use freely.
const FREE: Duration = Duration::from_micros(500);
/// The number of accounts beyond which those of idle pods are removed.
const MAX_ACCOUNTS: usize = 256;

/// The time that a pod has used of a window.
#[derive(Clone, Copy, Debug)]
struct Account {
    window: u64,
    used: Duration,
}

/// One window, and the number of busy pods in it and in the one before.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    number: u64,
    total: Duration,
    pods: u32,
    pods_before: u32,
}

/// Schedules the time of one worker.
#[derive(Debug)]
pub(crate) struct FairScheduler {
    epoch: Instant,
    window: Cell<Window>,
    accounts: RefCell<BTreeMap<u64, Account>>,
    /// A connection of a pod over its share has taken its step in this round.
    stepped: Cell<bool>,
    waiting: Notify,
}

impl FairScheduler {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            window: Cell::default(),
            accounts: RefCell::default(),
            stepped: Cell::new(false),
            waiting: Notify::new(),
        }
    }

    /// Counts time that a pod has used.
    pub(crate) fn used(&self, pod: u64, took: Duration, now: Instant) {
        let mut window = self.window_at(now);
        let mut accounts = self.accounts.borrow_mut();
        let account = accounts.entry(pod).or_insert(Account {
            window: u64::MAX,
            used: Duration::ZERO,
        });
        if account.window != window.number {
            *account = Account {
                window: window.number,
                used: Duration::ZERO,
            };
            window.pods += 1;
        }
        account.used += took;
        window.total += took;
        self.window.set(window);
        if accounts.len() > MAX_ACCOUNTS {
            accounts.retain(|_, account| account.window.abs_diff(window.number) <= 1);
        }
    }

    fn window_at(&self, now: Instant) -> Window {
        let since = now.saturating_duration_since(self.epoch);
        let number = u64::try_from(since.as_micros() / WINDOW.as_micros()).unwrap_or(u64::MAX);
        let last = self.window.get();
        if last.number == number {
            return last;
        }
        let window = Window {
            number,
            pods_before: if number == last.number + 1 {
                last.pods
            } else {
                0
            },
            ..Window::default()
        };
        self.window.set(window);
        window
    }

    /// Whether a pod has used more than its share of this window.
    fn is_over_share(&self, pod: u64, now: Instant) -> bool {
        let window = self.window_at(now);
        let pods = window.pods.max(window.pods_before);
        if pods < 2 {
            return false;
        }
        let accounts = self.accounts.borrow();
        let used = accounts.get(&pod).filter(|a| a.window == window.number);
        used.is_some_and(|account| account.used > FREE && account.used * pods > window.total)
    }

    /// Whether a connection of this pod may take a step now. Otherwise it is woken in the next round.
    fn may_step(&self, pod: u64, now: Instant) -> bool {
        if !self.is_over_share(pod, now) {
            return true;
        }
        let first = !self.stepped.replace(true);
        if first {
            self.waiting.notify_one();
        }
        first
    }

    /// Polls an open connection of a pod within the pod's share. As cancel safe as `connection`.
    pub(crate) async fn carry<F: Future>(&self, pod: u64, connection: F) -> F::Output {
        let mut connection = pin!(connection);
        std::future::poll_fn(|cx| {
            if self.may_step(pod, Instant::now()) {
                connection.as_mut().poll(cx)
            } else {
                next_round(cx)
            }
        })
        .await
    }

    /// Starts rounds, for ever.
    pub(crate) async fn run(&self) {
        loop {
            self.waiting.notified().await;
            tokio::task::yield_now().await;
            self.stepped.set(false);
        }
    }
}

/// Wakes the task when the runtime has polled for packets.
fn next_round<T>(cx: &mut Context<'_>) -> Poll<T> {
    match pin!(tokio::task::yield_now()).poll(cx) {
        Poll::Ready(()) => cx.waker().wake_by_ref(),
        Poll::Pending => {}
    }
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use tokio::task::LocalSet;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pod_is_over_its_share_only_while_other_pods_are_busy() {
        let start = Instant::now();
        let fair = FairScheduler::new(start);
        fair.used(1, 5 * MS, start);
        assert!(!fair.is_over_share(1, start), "alone");
        fair.used(2, FREE / 2, start);
        assert!(fair.is_over_share(1, start));
        assert!(!fair.is_over_share(2, start));
        fair.used(2, 5 * MS, start);
        assert!(!fair.is_over_share(1, start), "less than half");
        assert!(fair.is_over_share(2, start));
        // Three have a third each.
        fair.used(3, 2 * MS, start);
        assert!(fair.is_over_share(1, start) && !fair.is_over_share(3, start));
        // In the next window all pods begin anew, and the others count although they have not run yet.
        let next = start + WINDOW;
        assert!(!fair.is_over_share(1, next));
        fair.used(1, FREE, next);
        assert!(!fair.is_over_share(1, next), "the free time");
        fair.used(1, FREE, next);
        assert!(fair.is_over_share(1, next));
        // After a window in which no pod ran, no other pod is busy.
        let later = next + 2 * WINDOW;
        fair.used(1, 5 * MS, later);
        assert!(!fair.is_over_share(1, later));
    }

    #[test]
    fn accounts_of_idle_pods_are_removed() {
        let start = Instant::now();
        let fair = FairScheduler::new(start);
        for pod in 0..10_000 {
            let at = start + WINDOW * u32::try_from(pod).unwrap();
            fair.used(pod, MS, at);
        }
        assert!(fair.accounts.borrow().len() <= MAX_ACCOUNTS + 1);
    }

    /// Steps of `MS` that pods take in 300 ms of their worker's time, with so many connections each.
    fn steps(connections: [usize; 2], fair: bool) -> [usize; 2] {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let taken = Rc::new([Cell::new(0), Cell::new(0)]);
        LocalSet::new().block_on(&runtime, async {
            let parts = Rc::new(FairScheduler::new(Instant::now()));
            let rounds = Rc::clone(&parts);
            tokio::task::spawn_local(async move { rounds.run().await });
            for (pod, count) in (0..).zip(connections) {
                for _ in 0..count {
                    let (parts, taken) = (Rc::clone(&parts), Rc::clone(&taken));
                    let always = {
                        let parts = Rc::clone(&parts);
                        std::future::poll_fn(move |cx| {
                            let begun = Instant::now();
                            while begun.elapsed() < MS {}
                            parts.used(pod, begun.elapsed(), Instant::now());
                            let own: &Cell<usize> = &taken[usize::try_from(pod).unwrap()];
                            own.set(own.get() + 1);
                            cx.waker().wake_by_ref();
                            Poll::<()>::Pending
                        })
                    };
                    tokio::task::spawn_local(async move {
                        match fair {
                            true => parts.carry(pod, always).await,
                            false => always.await,
                        }
                    });
                }
            }
            tokio::time::sleep(300 * MS).await;
        });
        [taken[0].get(), taken[1].get()]
    }

    #[test]
    fn twenty_connections_get_no_more_time_than_one() {
        let [many, one] = steps([20, 1], true);
        assert!(one * 3 > many, "{many} and {one}");
        let [many, one] = steps([20, 1], false);
        assert!(one * 10 < many, "the control: {many} and {one}");
    }
}
