// SPDX-License-Identifier: Apache-2.0
//! The clock of eBPF programs, and waiting for running eBPF programs.

use std::io;

/// Returns CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` does. [`std::time::Instant`] does not expose the
/// number.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for writes, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let whole = u64::try_from(now.tv_sec).unwrap_or(0);
    whole * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Waits until all running eBPF programs have finished. They run in RCU read-side critical sections, and the
/// membarrier waits for a grace period of some milliseconds (membarrier(2), Linux 4.3).
///
/// # Errors
/// The kernel runs with `nohz_full`.
pub fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call has no pointer arguments.
    match unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::{monotonic_ns, wait_for_programs};

    #[test]
    fn membarrier_waits_for_running_programs() {
        wait_for_programs().unwrap();
    }

    #[test]
    fn it_goes_on() {
        let before = monotonic_ns();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let passed = monotonic_ns() - before;
        assert!((2_000_000..10_000_000_000).contains(&passed), "{passed} ns");
    }
}
