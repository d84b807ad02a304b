// SPDX-License-Identifier: Apache-2.0
//! Detects NetworkPolicies by which the node's CNI plugin would drop tunnels, and logs them.

use std::sync::Arc;
use std::time::Duration;

use mesh_common::Port;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::control::InForce;
use mesh_datapath::cni::{BALANCERS, CniConflicts, CniPlugin, Enforces, blocked};

/// The shortest time between two checks of the policies.
const INTERVAL: Duration = Duration::from_secs(5);

/// The node's CNI plugin, and load balancers in eBPF that may bypass the mesh.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) cni: Option<CniPlugin>,
    pub(super) balancers: Vec<String>,
}

/// Checks the policies in force as they change, until `control` ends. `port` is the tunnel port; `None` =
/// tunnels have the ports of the connections in them, which need no rule of their own.
pub(super) async fn run(
    found: Found,
    port: Option<Port>,
    mut in_force: watch::Receiver<Arc<InForce>>,
    to: watch::Sender<Arc<CniConflicts>>,
) {
    let Found { cni, balancers } = found;
    for program in &balancers {
        tracing::warn!(program, "{BALANCERS}");
    }
    if let Some(cni) = &cni {
        tracing::info!(%cni, "CNI plugin detected");
    }
    let enforces = cni.as_ref().is_some_and(|cni| cni.enforces != Enforces::No);
    to.send_replace(Arc::new(CniConflicts {
        cni: cni.clone(),
        blocks: Vec::new(),
        balancers,
    }));
    let Some(port) = port.filter(|_| enforces) else {
        return;
    };
    loop {
        let snapshot = Arc::clone(&in_force.borrow_and_update().snapshot);
        let blocks = blocked(&snapshot, port.get());
        for new in blocks
            .iter()
            .filter(|one| !to.borrow().blocks.contains(one))
        {
            tracing::warn!(rule = %new, "NetworkPolicy makes the CNI plugin drop tunnels");
        }
        to.send_if_modified(|old| {
            let changed = old.blocks != blocks;
            Arc::make_mut(old).blocks = blocks;
            changed
        });
        sleep(INTERVAL).await;
        let is_newer = |now: &Arc<InForce>| !Arc::ptr_eq(&now.snapshot, &snapshot);
        if in_force.wait_for(is_newer).await.is_err() {
            return;
        }
    }
}
