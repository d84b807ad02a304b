// SPDX-License-Identifier: Apache-2.0
//! What the kernel knows of this process, from /proc. What cannot be read is left out.

use std::fs;

/// Ticks of `/proc/self/stat` in a second: `USER_HZ`, 100 on every architecture Rust knows of.
const TICKS: f64 = 100.0;

/// Facts about this process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) cpu_seconds: Option<f64>,
    pub(super) resident_bytes: Option<u64>,
    pub(super) open_fds: Option<u64>,
    pub(super) max_fds: Option<u64>,
    pub(super) start_seconds: Option<f64>,
}

impl Usage {
    pub(super) fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).ok();
        let stat = text("/proc/self/stat").unwrap_or_default();
        // The second field is the program's name in parentheses, and may hold blanks.
        let fields: Vec<&str> = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').collect())
            .unwrap_or_default();
        // Counted from field 3 of proc_pid_stat(5): utime is 14, stime 15, starttime 22.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let boot = text("/proc/stat").and_then(|text| find_number(&text, "btime "));
        let status = text("/proc/self/status").unwrap_or_default();
        Self {
            cpu_seconds: field(14).zip(field(15)).map(|(u, s)| (u + s) / TICKS),
            resident_bytes: find_number(&status, "VmRSS:").map(|kib| kib * 1024),
            open_fds: fs::read_dir("/proc/self/fd")
                .ok()
                // The directory itself is open while it is read.
                .map(|entries| entries.count().saturating_sub(1) as u64),
            max_fds: text("/proc/self/limits").and_then(|t| find_number(&t, "Max open files")),
            start_seconds: boot
                .zip(field(22))
                .map(|(boot, start)| boot as f64 + start / TICKS),
        }
    }
}

/// The number that follows a word at the beginning of a line.
fn find_number(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_known() {
        let usage = Usage::read();
        assert!(usage.cpu_seconds.is_some_and(|seconds| seconds >= 0.0));
        assert!(usage.resident_bytes.is_some_and(|bytes| bytes > 1 << 16));
        assert!(usage.open_fds.is_some_and(|fds| fds >= 3));
        assert!(usage.max_fds >= usage.open_fds);
        // After 2020, and not in the future by more than an hour.
        let now = fs::metadata("/proc/self").unwrap().modified().unwrap();
        let now = now
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        assert!(
            usage
                .start_seconds
                .is_some_and(|at| at > 1.6e9 && at < now + 3600.0)
        );
    }
}
