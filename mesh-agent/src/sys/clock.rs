// SPDX-License-Identifier: Apache-2.0
//! The kernel's clock, as its programs read it.

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

#[cfg(test)]
mod tests {
    use super::monotonic_ns;

    #[test]
    fn it_goes_on() {
        let before = monotonic_ns();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let passed = monotonic_ns() - before;
        assert!((2_000_000..10_000_000_000).contains(&passed), "{passed} ns");
    }
}
