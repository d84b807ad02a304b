// SPDX-License-Identifier: Apache-2.0
//! The `process_*` metrics, from /proc. Values that cannot be read are left out.

use std::{fmt, fs};

use prometheus_client::encoding::DescriptorEncoder;

use super::describe;
use super::exposition::family;

/// Ticks per second of `/proc/self/stat`: `USER_HZ`, 100 on every architecture that Rust supports.
const TICKS: f64 = 100.0;

/// Resource usage of this process.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    cpu_seconds: Option<f64>,
    resident_bytes: Option<u64>,
    open_fds: Option<u64>,
    max_fds: Option<u64>,
    start_seconds: Option<f64>,
}

impl Usage {
    fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).ok();
        let stat = text("/proc/self/stat").unwrap_or_default();
        // The second field is the program's name in parentheses, and may contain blanks.
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

/// Writes the `process_*` families.
///
/// # Errors
/// When the page cannot be written.
pub fn process(encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let usage = Usage::read();
    if let Some(seconds) = usage.cpu_seconds {
        family(encoder, describe::CPU)?.counter(&[], seconds)?;
    }
    for (description, value) in [
        (describe::RSS, usage.resident_bytes),
        (describe::FDS, usage.open_fds),
        (describe::MAX_FDS, usage.max_fds),
    ] {
        if let Some(value) = value {
            family(encoder, description)?.gauge(&[], value)?;
        }
    }
    match usage.start_seconds {
        Some(seconds) => family(encoder, describe::START)?.gauge(&[], seconds),
        None => Ok(()),
    }
}

/// Finds the number after a word at the beginning of a line.
fn find_number(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_this_process_is_read() {
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
