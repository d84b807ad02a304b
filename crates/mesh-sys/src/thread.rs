// SPDX-License-Identifier: Apache-2.0
//! Where this thread may run, and how long it had to wait for that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

/// A set of CPUs.
#[derive(Clone, Copy, Debug)]
pub struct Cpus(libc::cpu_set_t);

impl Cpus {
    /// One CPU alone. `None` = its number is beyond what such a set can hold (1,023).
    #[must_use]
    pub fn only(cpu: u32) -> Option<Self> {
        let cpu = usize::try_from(cpu).ok()?;
        if cpu >= libc::CPU_SETSIZE.try_into().ok()? {
            return None;
        }
        // SAFETY: all zeros is the empty set, and `cpu` is within it.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            Some(Self(set))
        }
    }

    /// Where this thread may run.
    ///
    /// # Errors
    /// When the machine has more CPUs than such a set can hold.
    pub fn allowed() -> io::Result<Self> {
        // SAFETY: `set` is a valid place for the kernel to write to.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            match libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) {
                0 => Ok(Self(set)),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Whether a CPU is among them.
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        let Ok(cpu) = usize::try_from(cpu) else {
            return false;
        };
        // SAFETY: reads the set within its bounds.
        cpu < libc::CPU_SETSIZE.unsigned_abs() as usize && unsafe { libc::CPU_ISSET(cpu, &self.0) }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        // SAFETY: reads the set.
        usize::try_from(unsafe { libc::CPU_COUNT(&self.0) }).unwrap_or(0)
    }

    /// Lets this thread run on these alone.
    ///
    /// # Errors
    /// When none of them is there, or the thread's cpuset forbids it.
    pub fn apply(&self) -> io::Result<()> {
        // SAFETY: the set is valid, and read only.
        match unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &raw const self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// How long a thread has been ready to run, and was not (`/proc/thread-self/schedstat`).
#[derive(Debug)]
pub struct RunDelay(File);

impl RunDelay {
    /// Of the thread that calls this.
    ///
    /// # Errors
    /// Where the kernel keeps no such account (CONFIG_SCHED_INFO).
    pub fn own() -> io::Result<Self> {
        File::open("/proc/thread-self/schedstat").map(Self)
    }

    /// Since the thread began.
    ///
    /// # Errors
    /// When the kernel says something else than numbers.
    pub fn total(&self) -> io::Result<Duration> {
        let mut text = [0; 64];
        let length = self.0.read_at(&mut text, 0)?;
        // Time on a CPU, time in a queue (ns each), turns: proc(5).
        let text = std::str::from_utf8(&text[..length]).map_err(io::Error::other)?;
        let waited = text.split_ascii_whitespace().nth(1).unwrap_or_default();
        let waited = waited.parse().map_err(io::Error::other)?;
        Ok(Duration::from_nanos(waited))
    }
}

#[cfg(test)]
mod tests {
    use super::{Cpus, RunDelay};

    #[test]
    fn a_thread_runs_where_it_may() {
        let free = Cpus::allowed().unwrap();
        let cpu = (0..1024).find(|cpu| free.contains(*cpu)).unwrap();
        let only = Cpus::only(cpu).unwrap();
        only.apply().unwrap();
        let now = Cpus::allowed().unwrap();
        assert!(now.count() == 1 && now.contains(cpu));
        free.apply().unwrap();
        assert_eq!(Cpus::allowed().unwrap().count(), free.count());
        assert!(Cpus::only(1024).is_none() && !free.contains(u32::MAX));
    }

    #[test]
    fn who_waits_for_a_cpu_is_told_how_long() {
        let free = Cpus::allowed().unwrap();
        let cpu = (0..1024).find(|cpu| free.contains(*cpu)).unwrap();
        let only = Cpus::only(cpu).unwrap();
        // Two threads on one CPU: each waits for the other.
        let waited = || {
            only.apply().unwrap();
            let delay = RunDelay::own().unwrap();
            let before = delay.total().unwrap();
            let begun = std::time::Instant::now();
            while begun.elapsed() < std::time::Duration::from_millis(100) {
                std::hint::spin_loop();
            }
            delay.total().unwrap() - before
        };
        let both: std::time::Duration = std::thread::scope(|scope| {
            let threads = [scope.spawn(waited), scope.spawn(waited)];
            threads.map(|it| it.join().unwrap()).into_iter().sum()
        });
        assert!(both >= std::time::Duration::from_millis(50), "{both:?}");
    }
}
