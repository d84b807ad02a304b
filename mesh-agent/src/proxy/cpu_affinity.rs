// SPDX-License-Identifier: Apache-2.0
//! Pins a worker to the CPU of the application whose connections it relays.
//!
//! A request and its answer wake several threads in turn. Waking a thread on an idle CPU costs an
//! interrupt and that CPU's exit from idle, tens of microseconds in a virtual machine; waking one on the
//! same CPU costs two. The scheduler prefers the idle CPU. So a worker that is mostly idle, and all of
//! whose applications run on one CPU, pins itself to that CPU. It unpins itself as soon as it is busy,
//! relays for applications on several CPUs, has to wait for the CPU, or has no traffic.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mesh_sys::socket;
use mesh_sys::thread::{Cpus, RunDelay};

/// The interval of decisions.
const WINDOW: Duration = Duration::from_millis(5);
/// A worker without traffic for this long is unpinned.
const QUIET: Duration = Duration::from_millis(100);
/// One read in this many is sampled: a sample is a system call.
const READS: u32 = 8;
/// The fewest samples of a window that are enough for a decision.
const SAMPLES: u32 = 2;
/// The number of windows in a row that must agree before a worker is pinned.
const AGREEING: u32 = 2;
/// The part (one in this many) of a window that a pinned worker may be busy: beyond it, two CPUs do more
/// than one.
const BUSY: u32 = 2;
/// The part (one in this many) of a window that a pinned worker may wait for the CPU.
const CROWDED: u32 = 8;
/// The time for which a worker stays unpinned after other threads had its CPU.
const REST: Duration = Duration::from_millis(200);

/// Measurements of one window.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// Length of the window.
    took: Duration,
    /// Time in which the worker had something to do.
    busy: Duration,
    /// Time in which the worker waited for a CPU.
    delayed: Duration,
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// Run on this CPU alone.
    Pin(u32),
    /// Run on any CPU.
    Unpin,
}

/// The CPUs of applications in the samples of a window.
#[derive(Clone, Copy, Debug, Default)]
enum Sampled {
    #[default]
    Nothing,
    One(u32),
    Several,
}

/// Decides on which CPUs a worker runs.
#[derive(Debug, Default)]
struct Policy {
    samples: u32,
    seen: Sampled,
    /// The CPU of the last windows, and the number of windows in a row that had it.
    agreed: (u32, u32),
    at: Option<u32>,
    rest: Duration,
}

impl Policy {
    /// Adds a sample: an application's bytes came from this CPU.
    fn sample(&mut self, cpu: u32) {
        self.samples += 1;
        self.seen = match self.seen {
            Sampled::Nothing => Sampled::One(cpu),
            Sampled::One(before) if before == cpu => self.seen,
            Sampled::One(_) | Sampled::Several => Sampled::Several,
        };
    }

    /// Decides at the end of a window.
    fn decide(&mut self, window: Window) -> Option<Decision> {
        let Window {
            took,
            busy,
            delayed,
        } = window;
        self.rest = self.rest.saturating_sub(took);
        if took >= QUIET {
            *self = Self {
                at: self.at,
                ..Self::default()
            };
            return self.unpin();
        }
        if self.at.is_some() && delayed > took / CROWDED {
            self.rest = REST;
            return self.unpin();
        }
        if busy > took / BUSY {
            return self.unpin();
        }
        if self.samples < SAMPLES {
            return None;
        }
        self.samples = 0;
        match (std::mem::take(&mut self.seen), self.at) {
            (Sampled::One(cpu), Some(at)) if cpu == at => None,
            (Sampled::One(cpu), None) => {
                let (before, times) = self.agreed;
                let times = if before == cpu { times + 1 } else { 1 };
                self.agreed = (cpu, times);
                if times < AGREEING || !self.rest.is_zero() {
                    return None;
                }
                self.at = Some(cpu);
                Some(Decision::Pin(cpu))
            }
            (Sampled::Nothing | Sampled::One(_) | Sampled::Several, _) => self.unpin(),
        }
    }

    fn unpin(&mut self) -> Option<Decision> {
        self.agreed = (0, 0);
        self.at.take().map(|_| Decision::Unpin)
    }
}

/// The state of a worker's thread.
#[derive(Debug)]
struct Affinity {
    policy: Policy,
    /// The CPUs on which the thread may run at all.
    allowed: Cpus,
    delay: RunDelay,
    began: Instant,
    idle: Duration,
    delayed: Duration,
}

impl Affinity {
    fn window(&mut self, now: Instant) {
        let took = now - self.began;
        if took < WINDOW {
            return;
        }
        let total = self.delay.total().unwrap_or(self.delayed);
        let window = Window {
            took,
            busy: took.saturating_sub(self.idle),
            delayed: total.saturating_sub(self.delayed),
        };
        self.began = now;
        self.idle = Duration::ZERO;
        self.delayed = total;
        let Some(decision) = self.policy.decide(window) else {
            return;
        };
        let cpus = match decision {
            Decision::Pin(cpu) => Cpus::only(cpu).filter(|_| self.allowed.contains(cpu)),
            Decision::Unpin => Some(self.allowed),
        };
        // A CPU that was taken offline meanwhile: the worker stays where it is.
        if let Some(Err(error)) = cpus.map(|cpus| cpus.apply()) {
            tracing::debug!(%error, ?decision, "cannot set the CPU affinity of a worker");
        }
    }
}

// The runtime's hooks run on the worker's thread and have no arguments.
thread_local! {
    static AFFINITY: RefCell<Option<Affinity>> = const { RefCell::new(None) };
    static PARKED: Cell<Option<Instant>> = const { Cell::new(None) };
    static READ: Cell<u32> = const { Cell::new(0) };
}

/// Manages the affinity of the calling thread, if it may run on more than one CPU.
///
/// # Errors
/// The kernel does not report how long a thread waits for a CPU: the thread then stays unpinned.
pub(crate) fn begin() -> io::Result<()> {
    let allowed = Cpus::allowed()?;
    let delay = RunDelay::own()?;
    let affinity = Affinity {
        policy: Policy::default(),
        delayed: delay.total()?,
        allowed,
        delay,
        began: Instant::now(),
        idle: Duration::ZERO,
    };
    if allowed.count() > 1 {
        AFFINITY.set(Some(affinity));
    }
    Ok(())
}

/// Records that the worker has nothing to do.
pub(crate) fn park() {
    PARKED.set(Some(Instant::now()));
}

/// Records that the worker has something to do again.
pub(crate) fn unpark() {
    let Some(parked) = PARKED.take() else { return };
    AFFINITY.with_borrow_mut(|affinity| {
        let Some(affinity) = affinity else { return };
        let now = Instant::now();
        affinity.idle += now - parked;
        affinity.window(now);
    });
}

/// Records that bytes of an application were read.
pub(crate) fn read(from: &impl AsFd) {
    let count = READ.get().wrapping_add(1);
    READ.set(count);
    if !count.is_multiple_of(READS) {
        return;
    }
    AFFINITY.with_borrow_mut(|affinity| {
        if let Some(affinity) = affinity
            && let Ok(cpu) = socket::incoming_cpu(from.as_fd())
        {
            affinity.policy.sample(cpu);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CALM: Window = Window {
        took: WINDOW,
        busy: MS,
        delayed: Duration::ZERO,
    };

    fn window(policy: &mut Policy, cpus: &[u32], window: Window) -> Option<Decision> {
        cpus.iter().for_each(|cpu| policy.sample(*cpu));
        policy.decide(window)
    }

    fn pinned(cpu: u32) -> Policy {
        let mut it = Policy::default();
        assert_eq!(window(&mut it, &[cpu; 2], CALM), None);
        assert_eq!(window(&mut it, &[cpu; 2], CALM), Some(Decision::Pin(cpu)));
        it
    }

    #[test]
    fn worker_is_pinned_to_the_cpu_of_its_application() {
        let mut it = pinned(3);
        for samples in [0, 1, 2, 6] {
            assert_eq!(window(&mut it, &vec![3; samples], CALM), None);
        }
    }

    #[test]
    fn worker_is_not_pinned_for_applications_on_several_cpus() {
        let mut it = Policy::default();
        for _ in 0..10 {
            assert_eq!(window(&mut it, &[0, 1], CALM), None);
        }
        // Nor for an application that moves all the time.
        for cpu in [0, 1, 0, 1, 0, 1] {
            assert_eq!(window(&mut it, &[cpu; 3], CALM), None);
        }
        assert_eq!(window(&mut pinned(3), &[3, 4], CALM), Some(Decision::Unpin));
        assert_eq!(window(&mut pinned(3), &[4, 4], CALM), Some(Decision::Unpin));
    }

    #[test]
    fn busy_or_idle_worker_is_unpinned() {
        let busy = Window {
            busy: WINDOW,
            ..CALM
        };
        assert_eq!(window(&mut pinned(3), &[3; 4], busy), Some(Decision::Unpin));
        assert_eq!(window(&mut Policy::default(), &[3; 4], busy), None);
        let quiet = Window {
            took: QUIET,
            ..CALM
        };
        assert_eq!(window(&mut pinned(3), &[], quiet), Some(Decision::Unpin));
    }

    #[test]
    fn worker_leaves_a_crowded_cpu_for_a_while() {
        let crowded = Window {
            delayed: MS,
            ..CALM
        };
        let mut it = pinned(3);
        assert_eq!(window(&mut it, &[3; 4], crowded), Some(Decision::Unpin));
        let mut windows = 0;
        while window(&mut it, &[3; 4], CALM).is_none() {
            windows += 1;
        }
        assert_eq!(WINDOW * windows, REST - WINDOW);
    }
}
