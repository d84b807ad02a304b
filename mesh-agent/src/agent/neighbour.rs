// SPDX-License-Identifier: Apache-2.0
//! Watches which rules the node's network plug-in would drop tunnels by, and says so.

use std::sync::Arc;
use std::time::Duration;

use mesh_common::Port;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::control::Status;
use mesh_datapath::cni::{BALANCERS, Cni, Enforces, Neighbour, blocked};

/// Policies are looked at again at most this often.
const INTERVAL: Duration = Duration::from_secs(5);

/// The node's network plug-in, and who else works where the mesh does.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) cni: Option<Cni>,
    pub(super) balancers: Vec<String>,
}

/// Looks at the policies in force as they change; ends with the rooms. `None` = tunnels have the
/// ports of the connections in them, which need no rule of their own.
pub(super) async fn run(
    found: Found,
    port: Option<Port>,
    mut status: watch::Receiver<Arc<Status>>,
    to: watch::Sender<Arc<Neighbour>>,
) {
    let Found { cni, balancers } = found;
    for program in &balancers {
        tracing::warn!(program, "{BALANCERS}");
    }
    if let Some(cni) = &cni {
        tracing::info!(%cni, "network plug-in");
    }
    let enforces = cni.as_ref().is_some_and(|cni| cni.enforces != Enforces::No);
    to.send_replace(Arc::new(Neighbour {
        cni: cni.clone(),
        blocks: Vec::new(),
        balancers,
    }));
    let Some(port) = port.filter(|_| enforces) else {
        return;
    };
    loop {
        let facts = Arc::clone(&status.borrow_and_update().facts);
        let blocks = blocked(&facts, port.get());
        for new in blocks
            .iter()
            .filter(|one| !to.borrow().blocks.contains(one))
        {
            tracing::warn!(rule = %new, "the network plug-in would drop tunnels");
        }
        to.send_if_modified(|old| {
            let changed = old.blocks != blocks;
            Arc::make_mut(old).blocks = blocks;
            changed
        });
        sleep(INTERVAL).await;
        if status.changed().await.is_err() {
            return;
        }
    }
}
