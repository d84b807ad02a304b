// SPDX-License-Identifier: Apache-2.0
//! The agent's way out: what asks for it, and how open connections may end.
//!
//! Kernel programs, maps and pins stay as they are: they go on enforcing, and refuse what needs an
//! agent.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::proxy::ProxyHandle;
use mesh_config::AdminAddr;

/// Listeners accept until so long before the end of the drain.
const LAST_ACCEPT: Duration = Duration::from_millis(500);
/// How often it is looked whether a successor is there, or nothing is open.
const LOOK: Duration = Duration::from_millis(50);

/// Tells when a successor has put its admin socket over ours: it has taken over listeners and
/// links by then.
#[derive(Debug)]
pub struct Successor(Option<(PathBuf, u64)>);

impl Successor {
    /// Remembers our own socket; without one a successor is not noticed.
    #[must_use]
    pub fn of(admin: &[AdminAddr]) -> Self {
        let socket = admin.iter().find_map(|addr| match addr {
            AdminAddr::Unix(path) => Some((path.clone(), inode(path)?)),
            AdminAddr::Tcp(_) => None,
        });
        Self(socket)
    }

    /// Waits for it. Cancel safe.
    pub async fn comes(&self) {
        while !self.is_there() {
            sleep(LOOK).await;
        }
    }

    /// Whether it is there.
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

/// Ends the proxy: accepts until a successor is there, nothing is open, or the time is nearly over;
/// then lets open connections end; then resets them.
pub async fn drain(proxy: ProxyHandle, successor: &Successor, longest: Duration) {
    let end = Instant::now() + longest;
    let last_accept = end - LAST_ACCEPT.min(longest);
    while Instant::now() < last_accept && proxy.open() > 0 && !successor.is_there() {
        sleep(LOOK).await;
    }
    proxy.drain();
    if timeout_at(end, proxy.drained()).await.is_err() {
        tracing::warn!(
            open = proxy.open(),
            "connections are reset: the drain is over"
        );
    }
    proxy.finish().await;
}
