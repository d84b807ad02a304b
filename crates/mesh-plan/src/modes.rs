// SPDX-License-Identifier: Apache-2.0
//! The effect of enrollment and MeshAuthentication on a connection, without policy: whether it is
//! tunneled, and what is refused as plaintext. Decided by [`mesh_common::path`] with the set that
//! allows everything.

use mesh_common::path::{self, Arrival, Origin, Outbound};
use mesh_common::pod::PodView;
use mesh_common::policy::PolicySetId;
use mesh_common::verdict::Reason;
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::index::Index;

/// Whether a connection or datagram that a pod sends goes through a tunnel.
///
/// # Errors
/// The reason, if it is refused.
pub fn outbound(
    index: &Index,
    pod: &PodView,
    to: Endpoint,
    protocol: Protocol,
) -> Result<bool, Reason> {
    let path = path::outbound(index, pod, PolicySetId::NONE, to, protocol);
    match path.action {
        Outbound::Refuse => Err(path.verdict.reason),
        Outbound::Tunnel => Ok(true),
        Outbound::Direct => Ok(false),
    }
}

/// Whether a pod accepts a connection or datagram that arrives as plaintext.
///
/// # Errors
/// The reason, if it is refused.
pub fn inbound(
    index: &Index,
    pod: &PodView,
    from: &Addr,
    protocol: Protocol,
    port: Port,
) -> Result<(), Reason> {
    let arrival = Arrival {
        from,
        origin: Origin::Address,
        protocol,
        port,
    };
    let path = path::inbound(index, pod, PolicySetId::NONE, arrival);
    match path.action {
        Outbound::Refuse => Err(path.verdict.reason),
        Outbound::Tunnel | Outbound::Direct => Ok(()),
    }
}
