// SPDX-License-Identifier: Apache-2.0
//! Where a captured connection may go: the endpoint that it was captured for, and the others of
//! the service that it asked for. Each is decided as if it had been captured for it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_common::path::{Outbound, Path, outbound};
use mesh_common::pod::PodState;
use mesh_common::service::{ServiceKey, Services as _};
use mesh_common::{Endpoint, Protocol, Reason, Verdict};
use mesh_plan::Index;

use crate::proxy::pool::Key;
use crate::proxy::tunnel::frame::Open;
use crate::proxy::worker::Worker;
use mesh_datapath::pods::PodHandle;

/// Endpoints of a service that are looked at for one that may be tried instead.
const LOOKS: u32 = 64;

/// Who may be behind a tunnel's other end, and how it is reached.
pub(super) struct Target {
    /// What a tunnel must have been made for.
    pub(super) key: Key,
    /// What the peer's agent is asked for.
    pub(super) open: Open,
    /// The pod's own address, any port.
    pub(super) from: SocketAddr,
    /// The other agent.
    pub(super) to: SocketAddr,
    /// The decision.
    pub(super) verdict: Verdict,
}

/// Decides: the mark that brought a connection here is no proof of anything.
pub(super) fn decide(
    worker: &Worker,
    plan: &Index,
    pod: &PodHandle,
    open: Open,
) -> Result<Target, Verdict> {
    let refused = Err(Verdict::refuse(Reason::NotTunnelled));
    let Some(local) = plan.pods.get(&pod.uid) else {
        return Err(Verdict::refuse(Reason::PodDeleted));
    };
    let mut view = local.view;
    if pod.listeners.is_some() {
        // Captured right before the pod left the mesh: carried as it was meant.
        view.flags |= PodState::ENROLLED;
    }
    let Path {
        action,
        verdict,
        peer: id,
        ..
    } = outbound(plan, &view, view.set, open.destination, Protocol::TCP);
    match action {
        Outbound::Tunnel => {}
        Outbound::Refuse => return Err(verdict),
        Outbound::Direct => return refused,
    }
    if !local.view.owns(&open.source.addr) {
        return refused;
    }
    let Some(peer) = plan.names.workloads.get(&open.destination.addr) else {
        return Err(Verdict::refuse(Reason::UnknownPeer));
    };
    let (Some(own), Some(expected)) = (
        worker.identity(&local.name.namespace, &local.service_account),
        worker.identity(&peer.name.namespace, &peer.service_account),
    ) else {
        return Err(Verdict::refuse(Reason::IdentityRefused));
    };
    let key = Key {
        to: Endpoint::new(open.destination.addr, worker.port_of(&open.destination)),
        from: open.source.addr,
        uid: pod.uid.as_str().into(),
        peer_uid: Arc::clone(&peer.uid),
        set: local.view.set,
        peer: id,
        own,
        expected,
    };
    Ok(Target {
        open,
        from: SocketAddr::new(IpAddr::from(open.source.addr), 0),
        to: SocketAddr::from(key.to),
        key,
        verdict,
    })
}

/// Another endpoint of the service, that is also to be tunnelled to and was not tried yet.
pub(super) fn another(
    worker: &Worker,
    pod: &PodHandle,
    open: Open,
    tried: &[Endpoint],
) -> Option<Target> {
    let plan = worker.plan();
    let service = plan.service(&ServiceKey::new(open.service?, Protocol::TCP))?;
    // Clients that lose the same endpoint do not all turn to the same other one.
    let first = u32::from(open.source.port.get()) % service.count.max(1);
    (0..service.count.min(LOOKS)).find_map(|step| {
        let destination = plan.backend(&service.choose(first + step)?)?;
        if tried.contains(&destination) {
            return None;
        }
        let open = Open {
            destination,
            ..open
        };
        decide(worker, &plan, pod, open).ok()
    })
}
