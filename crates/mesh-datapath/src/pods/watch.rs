// SPDX-License-Identifier: Apache-2.0
//! Tells when somebody changes rules, routes or links in a pod's namespace. It repairs nothing.
//!
//! A watch keeps the namespace alive: it ends with the [`Watch`] value.

use std::io;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Error, Tried as _};
use mesh_sys::netns::NetNs;
use mesh_sys::route::RoutingWatch;

/// A running watch; dropping it ends it.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts to send the pod's UID whenever something changes. A full queue loses nothing: who reads
/// it looks at the state, and does so every second anyhow.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn start(netns: &NetNs, uid: String, changed: mpsc::Sender<String>) -> Result<Watch, Error> {
    let watch = netns
        .run(RoutingWatch::open)
        .tried("enter")?
        .tried("watch the rules and routes")?;
    Ok(Watch(tokio::spawn(async move {
        if let Err(error) = forward(watch, &uid, &changed).await {
            tracing::warn!(uid, %error, "the watch of a pod's rules ended; they are still checked every second");
        }
    })))
}

async fn forward(
    mut watch: RoutingWatch,
    uid: &str,
    changed: &mpsc::Sender<String>,
) -> io::Result<()> {
    loop {
        watch.changed().await?;
        if let Err(mpsc::error::TrySendError::Closed(_)) = changed.try_send(uid.to_owned()) {
            return Ok(());
        }
    }
}
