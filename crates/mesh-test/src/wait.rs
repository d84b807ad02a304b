// SPDX-License-Identifier: Apache-2.0
//! Waiting for something to become true, never longer than told.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const PAUSE: Duration = Duration::from_millis(5);

/// Asks `probe` until it answers; at least once, and at least once after the deadline has passed.
///
/// # Errors
/// `what` did not come true within `deadline`.
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
