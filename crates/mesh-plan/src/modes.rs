// SPDX-License-Identifier: Apache-2.0
//! What enrolment and MeshAuthentication say about a connection, whatever policy says: whether it
//! is tunnelled, and what is refused in clear. Asked offline; the rules are those of
//! [`mesh_common::path`], over a policy that allows everything.

use mesh_common::identity::Peer;
use mesh_common::path::{self, Origin, Outbound, Peers};
use mesh_common::pod::{ModeKey, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, Policies, PolicySetId, PortKey, Question, SelectKey, SetHead,
};
use mesh_common::verdict::{Reason, Verdict};
use mesh_common::{Addr, Endpoint, Port, Protocol};

/// Whether a connection or datagram that a pod sends goes through a tunnel.
///
/// # Errors
/// It is refused.
pub fn outbound(
    peers: &impl Peers,
    pod: &PodView,
    to: Endpoint,
    protocol: Protocol,
) -> Result<bool, Reason> {
    let path = path::outbound(&Open(peers), pod, to, protocol);
    match path.action {
        Outbound::Refuse => Err(path.verdict.reason),
        Outbound::Tunnel => Ok(true),
        Outbound::Direct => Ok(false),
    }
}

/// Whether a pod takes what arrives in clear.
///
/// # Errors
/// It is refused.
pub fn inbound(
    peers: &impl Peers,
    pod: &PodView,
    from: &Addr,
    protocol: Protocol,
    port: Port,
) -> Result<(), Reason> {
    let path = path::inbound(&Open(peers), pod, from, Origin::Address, protocol, port);
    match path.action {
        Outbound::Refuse => Err(path.verdict.reason),
        Outbound::Tunnel | Outbound::Direct => Ok(()),
    }
}

/// Peers as they are, and no policy.
struct Open<'a, P>(&'a P);

impl<P: Peers> Peers for Open<'_, P> {
    fn peer(&self, addr: &Addr) -> Option<Peer> {
        self.0.peer(addr)
    }

    fn local(&self, addr: &Addr) -> Option<PodView> {
        self.0.local(addr)
    }

    fn in_pod_cidr(&self, addr: &Addr) -> bool {
        self.0.in_pod_cidr(addr)
    }

    fn port_mode(&self, key: &ModeKey) -> Option<u8> {
        self.0.port_mode(key)
    }
}

impl<P> Policies for Open<'_, P> {
    fn head(&self, _set: PolicySetId) -> Option<SetHead> {
        None
    }

    fn select(&self, _key: &SelectKey) -> Option<Lists> {
        None
    }

    fn cidr(&self, _key: &CidrKey) -> Option<ListId> {
        None
    }

    fn answer(&self, _key: &PortKey) -> Option<&Answer> {
        None
    }

    fn decide(&self, _question: &Question) -> Verdict {
        Verdict::pass(Reason::NoPolicy)
    }
}
