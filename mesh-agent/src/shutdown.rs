// SPDX-License-Identifier: Apache-2.0
//! Shutdown of the agent: the signals that request it, and the drain of open connections.
//!
//! Kernel programs, maps and pins stay: they enforce policy, and refuse connections that need an agent.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::proxy::ProxyHandle;
use mesh_config::AdminAddr;

/// Time before the end of the drain at which listeners stop accepting.
const LAST_ACCEPT: Duration = Duration::from_millis(500);
/// Interval of checking for a successor and for open connections.
const CHECK: Duration = Duration::from_millis(50);

/// Detects a successor by its admin socket, which replaces ours once it has taken over listeners and
/// links.
#[derive(Debug)]
pub struct Successor(Option<(PathBuf, u64)>);

impl Successor {
    /// Remembers our own socket; without one a successor is not detected.
    #[must_use]
    pub fn of(admin: &[AdminAddr]) -> Self {
        let socket = admin.iter().find_map(|addr| match addr {
            AdminAddr::Unix(path) => Some((path.clone(), inode(path)?)),
            AdminAddr::Tcp(_) => None,
        });
        Self(socket)
    }

    /// Waits for the successor. Cancel safe.
    pub async fn comes(&self) {
        while !self.is_there() {
            sleep(CHECK).await;
        }
    }

    /// Tells whether there is a successor.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|(path, ours)| inode(path).is_some_and(|now| now != *ours))
    }
}

fn inode(path: &PathBuf) -> Option<u64> {
    std::fs::metadata(path).ok().map(|data| data.ino())
}

/// Stops the proxy. It accepts until there is a successor, nothing is open, or the timeout is near; then
/// open connections may close; after the timeout they are reset.
pub async fn drain(proxy: ProxyHandle, successor: &Successor, timeout: Duration) {
    let end = Instant::now() + timeout;
    let last_accept = end - LAST_ACCEPT.min(timeout);
    while Instant::now() < last_accept && proxy.open() > 0 && !successor.is_there() {
        sleep(CHECK).await;
    }
    proxy.drain();
    if timeout_at(end, proxy.drained()).await.is_err() {
        tracing::warn!(
            open = proxy.open(),
            "drain timed out; resetting open connections"
        );
    }
    proxy.finish().await;
}
