// SPDX-License-Identifier: Apache-2.0
//! Brings a worker to the CPU of the application that it carries for.
//!
//! A request and its answer are several hand-overs from thread to thread. One that wakes an idle CPU
//! costs an interrupt and that CPU's way out of idleness, tens of microseconds in a virtual machine;
//! one that stays on its CPU costs two. The scheduler prefers the idle CPU. So a worker that has
//! little to do, all of it for applications on one CPU, asks to run there alone; and wherever the
//! scheduler likes as soon as it is busy, has applications on several CPUs, has to wait for the CPU, or
//! has nothing to do.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mesh_sys::socket;
use mesh_sys::thread::{Cpus, RunDelay};

/// How often a worker judges its place.
const WINDOW: Duration = Duration::from_millis(5);
/// Without news for this long a worker goes free.
const QUIET: Duration = Duration::from_millis(100);
/// One read in this many is looked at: a look is a system call.
const READS: u32 = 8;
/// Fewer looks say nothing.
const LOOKS: u32 = 2;
/// Windows of one mind before a worker moves.
const SURE: u32 = 2;
/// The part of a window that a worker may be busy, and follow: beyond it two CPUs do more than one.
const BUSY: u32 = 2;
/// The part of a window that it may wait for the CPU.
const CROWDED: u32 = 8;
/// How long it stays free after a CPU was crowded.
const REST: Duration = Duration::from_millis(200);

/// A time of a worker's life.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// How long it was.
    took: Duration,
    /// For how much of it there was something to do.
    busy: Duration,
    /// For how much of that the worker could run, and did not.
    delayed: Duration,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Run on this CPU alone.
    To(u32),
    /// Run anywhere.
    Free,
}

/// Where the applications are, as far as they were looked at.
#[derive(Clone, Copy, Debug, Default)]
enum Seen {
    #[default]
    Nothing,
    One(u32),
    Several,
}

/// Decides where a worker is to run.
#[derive(Debug, Default)]
struct Judge {
    looks: u32,
    seen: Seen,
    /// Windows in a row that asked for the same CPU.
    agreed: (u32, u32),
    at: Option<u32>,
    rest: Duration,
}

impl Judge {
    /// An application's bytes came from this CPU.
    fn look(&mut self, cpu: u32) {
        self.looks += 1;
        self.seen = match self.seen {
            Seen::Nothing => Seen::One(cpu),
            Seen::One(before) if before == cpu => self.seen,
            Seen::One(_) | Seen::Several => Seen::Several,
        };
    }

    /// A window has ended.
    fn judge(&mut self, window: Window) -> Option<Step> {
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
            return self.free();
        }
        if self.at.is_some() && delayed > took / CROWDED {
            self.rest = REST;
            return self.free();
        }
        if busy > took / BUSY {
            return self.free();
        }
        if self.looks < LOOKS {
            return None;
        }
        self.looks = 0;
        match (std::mem::take(&mut self.seen), self.at) {
            (Seen::One(cpu), Some(at)) if cpu == at => None,
            (Seen::One(cpu), None) => {
                let (before, times) = self.agreed;
                let times = if before == cpu { times + 1 } else { 1 };
                self.agreed = (cpu, times);
                if times < SURE || !self.rest.is_zero() {
                    return None;
                }
                self.at = Some(cpu);
                Some(Step::To(cpu))
            }
            (Seen::Nothing | Seen::One(_) | Seen::Several, _) => self.free(),
        }
    }

    fn free(&mut self) -> Option<Step> {
        self.agreed = (0, 0);
        self.at.take().map(|_| Step::Free)
    }
}

/// A worker that may follow.
#[derive(Debug)]
struct Follower {
    judge: Judge,
    /// Where it may run at all.
    allowed: Cpus,
    delay: RunDelay,
    began: Instant,
    idle: Duration,
    delayed: Duration,
}

impl Follower {
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
        let Some(step) = self.judge.judge(window) else {
            return;
        };
        let cpus = match step {
            Step::To(cpu) => Cpus::only(cpu).filter(|_| self.allowed.contains(cpu)),
            Step::Free => Some(self.allowed),
        };
        // A CPU that was taken away meanwhile: the worker stays where it is.
        if let Some(Err(error)) = cpus.map(|cpus| cpus.apply()) {
            tracing::debug!(%error, ?step, "a worker cannot move");
        }
    }
}

// The runtime's hooks run on the worker's thread and are told nothing.
thread_local! {
    static FOLLOWER: RefCell<Option<Follower>> = const { RefCell::new(None) };
    static PARKED: Cell<Option<Instant>> = const { Cell::new(None) };
    static READ: Cell<u32> = const { Cell::new(0) };
}

/// Lets the thread that calls this follow, if there is more than one CPU for it.
///
/// # Errors
/// Where the kernel does not tell how long a thread waits for a CPU: it then stays free.
pub(crate) fn begin() -> io::Result<()> {
    let allowed = Cpus::allowed()?;
    let delay = RunDelay::own()?;
    let follower = Follower {
        judge: Judge::default(),
        delayed: delay.total()?,
        allowed,
        delay,
        began: Instant::now(),
        idle: Duration::ZERO,
    };
    if allowed.count() > 1 {
        FOLLOWER.set(Some(follower));
    }
    Ok(())
}

/// The worker has nothing to do.
pub(crate) fn park() {
    PARKED.set(Some(Instant::now()));
}

/// The worker has something to do again.
pub(crate) fn unpark() {
    let Some(parked) = PARKED.take() else { return };
    FOLLOWER.with_borrow_mut(|follower| {
        let Some(follower) = follower else { return };
        let now = Instant::now();
        follower.idle += now - parked;
        follower.window(now);
    });
}

/// Bytes of an application were read.
pub(crate) fn read(from: &impl AsFd) {
    let count = READ.get().wrapping_add(1);
    READ.set(count);
    if !count.is_multiple_of(READS) {
        return;
    }
    FOLLOWER.with_borrow_mut(|follower| {
        if let Some(follower) = follower
            && let Ok(cpu) = socket::incoming_cpu(from.as_fd())
        {
            follower.judge.look(cpu);
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

    fn judge(judge: &mut Judge, cpus: &[u32], window: Window) -> Option<Step> {
        cpus.iter().for_each(|cpu| judge.look(*cpu));
        judge.judge(window)
    }

    fn following(cpu: u32) -> Judge {
        let mut it = Judge::default();
        assert_eq!(judge(&mut it, &[cpu; 2], CALM), None);
        assert_eq!(judge(&mut it, &[cpu; 2], CALM), Some(Step::To(cpu)));
        it
    }

    #[test]
    fn it_goes_where_the_application_is_and_stays() {
        let mut it = following(3);
        for looks in [0, 1, 2, 6] {
            assert_eq!(judge(&mut it, &vec![3; looks], CALM), None);
        }
    }

    #[test]
    fn applications_on_several_cpus_are_not_followed() {
        let mut it = Judge::default();
        for _ in 0..10 {
            assert_eq!(judge(&mut it, &[0, 1], CALM), None);
        }
        // Nor one that moves all the time.
        for cpu in [0, 1, 0, 1, 0, 1] {
            assert_eq!(judge(&mut it, &[cpu; 3], CALM), None);
        }
        assert_eq!(judge(&mut following(3), &[3, 4], CALM), Some(Step::Free));
        assert_eq!(judge(&mut following(3), &[4, 4], CALM), Some(Step::Free));
    }

    #[test]
    fn who_is_busy_or_idle_is_free() {
        let busy = Window {
            busy: WINDOW,
            ..CALM
        };
        assert_eq!(judge(&mut following(3), &[3; 4], busy), Some(Step::Free));
        assert_eq!(judge(&mut Judge::default(), &[3; 4], busy), None);
        let quiet = Window {
            took: QUIET,
            ..CALM
        };
        assert_eq!(judge(&mut following(3), &[], quiet), Some(Step::Free));
    }

    #[test]
    fn a_crowded_cpu_is_left_for_a_while() {
        let crowded = Window {
            delayed: MS,
            ..CALM
        };
        let mut it = following(3);
        assert_eq!(judge(&mut it, &[3; 4], crowded), Some(Step::Free));
        let mut windows = 0;
        while judge(&mut it, &[3; 4], CALM).is_none() {
            windows += 1;
        }
        assert_eq!(WINDOW * windows, REST - WINDOW);
    }
}
