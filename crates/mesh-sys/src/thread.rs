// SPDX-License-Identifier: Apache-2.0
//! The CPU affinity and the scheduling delay of a thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

/// A set of CPUs.
#[derive(Clone, Copy, Debug)]
pub struct Cpus(libc::cpu_set_t);

impl Cpus {
    /// Returns a set with one CPU; `None` = the number exceeds the limit of the set (1,023).
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

    /// Returns the CPU affinity of this thread.
    ///
    /// # Errors
    /// The machine has more CPUs than the set can hold.
    pub fn allowed() -> io::Result<Self> {
        // SAFETY: `set` is valid for writes.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            match libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) {
                0 => Ok(Self(set)),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Returns whether the set contains a CPU.
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        let Ok(cpu) = usize::try_from(cpu) else {
            return false;
        };
        // SAFETY: reads the set within its bounds.
        cpu < libc::CPU_SETSIZE.unsigned_abs() as usize && unsafe { libc::CPU_ISSET(cpu, &self.0) }
    }

    /// Returns the number of CPUs in the set.
    #[must_use]
    pub fn count(&self) -> usize {
        // SAFETY: reads the set.
        usize::try_from(unsafe { libc::CPU_COUNT(&self.0) }).unwrap_or(0)
    }

    /// Sets the CPU affinity of this thread.
    ///
    /// # Errors
    /// None of the CPUs is available, or the thread's cpuset does not allow them.
    pub fn apply(&self) -> io::Result<()> {
        // SAFETY: the set is valid and only read.
        match unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &raw const self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The time that a thread was runnable but waited for a CPU (`/proc/thread-self/schedstat`).
#[derive(Debug)]
pub struct RunDelay(File);

impl RunDelay {
    /// Opens the statistics of the calling thread.
    ///
    /// # Errors
    /// The kernel has no such statistics (CONFIG_SCHED_INFO).
    pub fn own() -> io::Result<Self> {
        File::open("/proc/thread-self/schedstat").map(Self)
    }

    /// Returns the total since the thread started.
    ///
    /// # Errors
    /// The file cannot be read or parsed.
    pub fn total(&self) -> io::Result<Duration> {
        let mut text = [0; 64];
        let length = self.0.read_at(&mut text, 0)?;
        // Fields: time on a CPU, time in the run queue (ns each), number of time slices: proc(5).
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
    fn thread_runs_on_its_affinity_set() {
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
    fn wait_time_for_a_cpu_is_measured() {
        let free = Cpus::allowed().unwrap();
        let cpu = (0..1024).find(|cpu| free.contains(*cpu)).unwrap();
        let only = Cpus::only(cpu).unwrap();
        // Two threads on one CPU wait for each other.
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
