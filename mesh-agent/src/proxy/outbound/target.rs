// SPDX-License-Identifier: Apache-2.0
//! Chooses the destinations of a captured connection: the endpoint that it was captured for, and other
//! endpoints of its service. Each is decided as if the connection had been captured for it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_common::path::{Outbound, Path, outbound};
use mesh_common::pod::PodState;
use mesh_common::service::{ServiceKey, Services as _};
use mesh_common::{Endpoint, Protocol, Reason, Verdict};
use mesh_datapath::pods::PodHandle;
use mesh_plan::Index;
use mesh_tunnel::frame::Open;

use crate::proxy::pool::Key;
use crate::proxy::worker::Worker;

/// The most endpoints of a service that are considered as alternatives.
const MAX_CANDIDATES: u32 = 64;

/// A destination that is decided, and how its agent is reached.
pub(super) struct Target {
    /// The key of tunnels that may be used.
    pub(super) key: Key,
    /// The request to the peer's agent.
    pub(super) request: Open,
    /// The pod's own address, any port.
    pub(super) from: SocketAddr,
    /// The peer's agent.
    pub(super) to: SocketAddr,
    /// The decision.
    pub(super) verdict: Verdict,
}

/// Decides the connection again: the mark that brought it here proves nothing.
pub(super) fn decide(
    worker: &Worker,
    plan: &Index,
    pod: &PodHandle,
    request: Open,
) -> Result<Target, Verdict> {
    let refused = Err(Verdict::refuse(Reason::NotTunnelled));
    let Some(local) = plan.pods.get(&pod.uid) else {
        return Err(Verdict::refuse(Reason::PodDeleted));
    };
    let mut view = local.view;
    if pod.listeners.is_some() {
        // Captured right before the pod left the mesh: relayed all the same.
        view.flags |= PodState::ENROLLED;
    }
    let Path {
        action,
        verdict,
        peer: id,
        ..
    } = outbound(plan, &view, view.set, request.destination, Protocol::TCP);
    match action {
        Outbound::Tunnel => {}
        Outbound::Refuse => return Err(verdict),
        Outbound::Direct => return refused,
    }
    if !local.view.owns(&request.source.addr) {
        return refused;
    }
    let Some(peer) = plan.names.workloads.get(&request.destination.addr) else {
        return Err(Verdict::refuse(Reason::UnknownPeer));
    };
    let (Some(own), Some(expected)) = (
        worker.identity(&local.name.namespace, &local.service_account),
        worker.identity(&peer.name.namespace, &peer.service_account),
    ) else {
        return Err(Verdict::refuse(Reason::IdentityRefused));
    };
    let key = Key {
        to: Endpoint::new(
            request.destination.addr,
            worker.port_of(&request.destination),
        ),
        from: request.source.addr,
        uid: pod.uid.as_str().into(),
        peer_uid: Arc::clone(&peer.uid),
        set: local.view.set,
        peer: id,
        own,
        expected,
    };
    Ok(Target {
        request,
        from: SocketAddr::new(IpAddr::from(request.source.addr), 0),
        to: SocketAddr::from(key.to),
        key,
        verdict,
    })
}

/// Another endpoint of the service that is reached through a tunnel and was not tried yet.
pub(super) fn another(
    worker: &Worker,
    pod: &PodHandle,
    request: Open,
    tried: &[Endpoint],
) -> Option<Target> {
    let plan = worker.plan();
    let service = plan.service(&ServiceKey::new(request.service?, Protocol::TCP))?;
    // Clients that lose the same endpoint do not all choose the same alternative.
    let first = u32::from(request.source.port.get()) % service.count.max(1);
    (0..service.count.min(MAX_CANDIDATES)).find_map(|step| {
        let destination = plan.backend(&service.choose(first + step)?)?;
        if tried.contains(&destination) {
            return None;
        }
        let request = Open {
            destination,
            ..request
        };
        decide(worker, &plan, pod, request).ok()
    })
}
