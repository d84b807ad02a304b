// SPDX-License-Identifier: Apache-2.0
//! Reports changes of rules, routes or links in a pod's namespace. It does not repair them.
//!
//! A [`Watch`] keeps the namespace alive until it is dropped.

use std::io;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Error, WithAction as _};
use mesh_sys::netns::NetNs;
use mesh_sys::route::RoutingWatch;

/// A running watch, which stops when it is dropped.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts to send the pod's UID after each change. A full queue loses nothing: the receiver reads the whole
/// state, at least once a second.
///
/// # Errors
/// The namespace cannot be entered.
pub fn start(netns: &NetNs, uid: String, changed: mpsc::Sender<String>) -> Result<Watch, Error> {
    let watch = netns
        .run(RoutingWatch::open)
        .with_action("enter")?
        .with_action("watch the rules and routes")?;
    Ok(Watch(tokio::spawn(async move {
        if let Err(error) = forward(watch, &uid, &changed).await {
            tracing::warn!(uid, %error, "watch of a pod's rules and routes failed; they are still checked every second");
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
