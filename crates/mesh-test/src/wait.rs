// SPDX-License-Identifier: Apache-2.0
//! Polling for a condition until a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const PAUSE: Duration = Duration::from_millis(5);

/// Calls `probe` until it returns a value: at least once, and once more after the deadline.
///
/// # Errors
/// `probe` returned no value within `deadline`; the error contains `what`.
pub fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T> {
    let until = Instant::now() + deadline;
    loop {
        let last = Instant::now() >= until;
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        if last {
            bail!("waited {deadline:?} in vain for {what}");
        }
        std::thread::sleep(PAUSE);
    }
}
