// SPDX-License-Identifier: Apache-2.0
//! The kernel's clock, as its programs read it, and waiting for those that run.

use std::io;

/// Nanoseconds of CLOCK_MONOTONIC, which `bpf_ktime_get_ns` gives: [`std::time::Instant`] reads it
/// too, but does not tell the number.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is writable, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let whole = u64::try_from(now.tv_sec).unwrap_or(0);
    whole * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Waits until every kernel program that was running has ended: they run inside RCU read sections,
/// and this membarrier waits for a grace period, some milliseconds (membarrier(2), 4.3).
///
/// # Errors
/// A kernel with `nohz_full` refuses.
pub fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes no pointers.
    match unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::{monotonic_ns, wait_for_programs};

    #[test]
    fn the_kernel_waits_for_its_programs() {
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
