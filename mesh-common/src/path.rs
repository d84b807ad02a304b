// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The whole decision about a connection or datagram: enrolment and authentication modes around the
//! policy decision.
//!
//! The connect and sendmsg hooks, the gate and the agent (for captured connections) call
//! [`outbound`]; sk_lookup and the gate call [`inbound`] for plaintext; the agent calls [`tunnelled`]
//! for a connection that arrives through a tunnel. All are pure functions.

use crate::addr::{Addr, Endpoint, Protocol};
use crate::identity::{Evidence, IdentityId, Peer};
use crate::pod::{ListenerSlot, ModeKey, PodState, PodView, port_mode};
use crate::policy::{Direction, Policies, PolicySetId, Question};
use crate::settings::TUNNEL_PORT;
use crate::verdict::{Reason, Verdict};

/// Looks up addresses and port modes.
pub trait Peers {
    /// The cluster's entry for an address.
    fn peer(&self, addr: &Addr) -> Option<Peer>;
    /// The pod of this node that has the address, as this node itself knows it.
    fn local(&self, addr: &Addr) -> Option<PodView>;
    /// Whether the address is inside a pod CIDR.
    fn in_pod_cidr(&self, addr: &Addr) -> bool;
    /// The mode of a port, if it differs from the pod's.
    fn port_mode(&self, key: &ModeKey) -> Option<u8>;
}

/// The peer behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// The identity.
    pub id: IdentityId,
    /// The evidence for the identity.
    pub evidence: Evidence,
    /// Whether it is a pod of this node.
    pub local: bool,
    /// [`Peer`] flags; those of a local pod are derived from its own state.
    pub flags: u32,
}

impl Who {
    /// A peer outside the cluster.
    pub const WORLD: Self = Self {
        id: IdentityId::WORLD,
        evidence: Evidence::None,
        local: false,
        flags: 0,
    };

    /// Whether all bits of a [`Peer`] flag are set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }
}

/// The action for an outgoing connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// Sends it directly, as plaintext, for the reason [`Path::clear`].
    Direct,
    /// Hands it to the agent, which tunnels it.
    Tunnel,
    /// Refuses it.
    Refuse,
}

/// A decision with its reasons.
#[must_use = "a decision must be acted on"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The action.
    pub action: Outbound,
    /// The verdict and its rule.
    pub verdict: Verdict,
    /// The reason for plaintext, if the connection is plaintext.
    pub clear: Reason,
    /// The identity of the peer.
    pub peer: IdentityId,
}

impl Path {
    #[inline(always)]
    const fn refuse(verdict: Verdict, peer: IdentityId) -> Self {
        Self {
            action: Outbound::Refuse,
            verdict,
            clear: verdict.reason,
            peer,
        }
    }

    #[inline(always)]
    const fn direct(verdict: Verdict, clear: Reason, peer: IdentityId) -> Self {
        Self {
            action: Outbound::Direct,
            verdict,
            clear,
            peer,
        }
    }
}

/// Identifies a peer by its address alone. A local pod is known by its own state, never by the API.
#[inline(always)]
pub fn who(peers: &impl Peers, addr: &Addr) -> Who {
    if let Some(pod) = peers.local(addr) {
        let mut flags = Peer::POD;
        if pod.has(PodState::ENROLLED) {
            flags |= Peer::ENROLLED | Peer::READY;
        }
        return Who {
            id: pod.id,
            evidence: Evidence::Node,
            local: true,
            flags,
        };
    }
    if let Some(peer) = peers.peer(addr) {
        let evidence = if peer.id.is_workload() {
            Evidence::Address
        } else {
            Evidence::None
        };
        return Who {
            id: peer.id,
            evidence,
            local: false,
            flags: peer.flags,
        };
    }
    let id = if peers.in_pod_cidr(addr) {
        IdentityId::UNKNOWN
    } else {
        IdentityId::WORLD
    };
    Who {
        id,
        evidence: Evidence::None,
        local: false,
        flags: 0,
    }
}

/// Whether TCP from a pod to a peer goes through a tunnel, if policy allows it.
#[inline(always)]
#[must_use]
pub const fn tunnels(pod: &PodView, peer: &Who) -> bool {
    pod.has(PodState::ENROLLED) && !peer.local && peer.has(Peer::ENROLLED | Peer::READY)
}

/// Decides a connection or datagram that a pod sends, by the policy of `set`: the pod's own, or the
/// one to evaluate instead. The destination is a real endpoint: services are already resolved.
#[inline(always)]
pub fn outbound<T: Peers + Policies>(
    tables: &T,
    pod: &PodView,
    set: PolicySetId,
    to: Endpoint,
    protocol: Protocol,
) -> Path {
    if pod.owns(&to.addr) || to.addr.is_loopback() || to.addr.is_unspecified() {
        return Path::direct(
            Verdict::pass(Reason::OwnAddress),
            Reason::OwnAddress,
            pod.id,
        );
    }
    let enrolled = pod.has(PodState::ENROLLED);
    if enrolled && to.addr.is_v6_link_local() && has_ports(protocol) {
        return Path::refuse(Verdict::refuse(Reason::LinkLocal), IdentityId::WORLD);
    }
    let peer = who(tables, &to.addr);
    if protocol == Protocol::TCP && to.port == TUNNEL_PORT && peer.has(Peer::ENROLLED) {
        return Path::refuse(Verdict::refuse(Reason::TunnelPort), peer.id);
    }
    // A tunnel proves the peer's identity before any byte is sent, so it counts as proof here.
    let tunnel = protocol == Protocol::TCP && tunnels(pod, &peer);
    let evidence = if tunnel { Evidence::Tls } else { peer.evidence };
    let verdict = tables.decide(&Question {
        set,
        direction: Direction::Egress,
        peer: peer.id,
        addr: to.addr,
        evidence,
        protocol,
        port: to.port,
    });
    if !verdict.allowed {
        return Path::refuse(verdict, peer.id);
    }
    if tunnel {
        return Path {
            action: Outbound::Tunnel,
            verdict,
            clear: Reason::NoPolicy,
            peer: peer.id,
        };
    }
    if peer.local {
        let required = enrolled && protocol == Protocol::TCP && pod.has(PodState::REQUIRED);
        return if required && !peer.has(Peer::ENROLLED) {
            Path::refuse(Verdict::refuse(Reason::PeerNotEnrolled), peer.id)
        } else if udp_refused(pod, protocol, &peer) {
            Path::refuse(Verdict::refuse(Reason::UdpMode), peer.id)
        } else {
            Path::direct(verdict, Reason::SameNode, peer.id)
        };
    }
    if !enrolled {
        return Path::direct(verdict, Reason::OptedOut, peer.id);
    }
    in_clear(pod, protocol, &peer, verdict)
}

/// Decides traffic of an enrolled pod to another node that is not tunnelled.
#[inline(always)]
fn in_clear(pod: &PodView, protocol: Protocol, peer: &Who, verdict: Verdict) -> Path {
    if protocol != Protocol::TCP {
        return if udp_refused(pod, protocol, peer) {
            Path::refuse(Verdict::refuse(Reason::UdpMode), peer.id)
        } else if peer.has(Peer::POD) {
            Path::direct(verdict, Reason::Udp, peer.id)
        } else {
            Path::direct(verdict, Reason::NotAWorkload, peer.id)
        };
    }
    let required = pod.has(PodState::REQUIRED);
    let (reason, refuse) = if peer.has(Peer::ENROLLED) {
        (Reason::PeerNotReady, required || peer.has(Peer::STRICT))
    } else if peer.has(Peer::POD) {
        (Reason::PeerNotEnrolled, required)
    } else if peer.id == IdentityId::UNKNOWN {
        (Reason::UnknownPeer, required)
    } else {
        (Reason::NotAWorkload, false)
    };
    if refuse {
        Path::refuse(Verdict::refuse(reason), peer.id)
    } else {
        Path::direct(verdict, reason, peer.id)
    }
}

/// Whether `udp` of MeshAuthentication refuses it. The field is about UDP between workloads only.
#[inline(always)]
fn udp_refused(pod: &PodView, protocol: Protocol, peer: &Who) -> bool {
    if protocol != Protocol::UDP || !(peer.has(Peer::POD) || peer.id == IdentityId::UNKNOWN) {
        return false;
    }
    pod.has(PodState::UDP_DENY) || (pod.has(PodState::UDP_SAME_NODE) && !peer.local)
}

/// The provenance of a packet, as far as the hook can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The source address is trusted: the gate enforces source addresses.
    Address,
    /// The source address was translated: it is a node's, the sender is not that node.
    Translated,
    /// The pod has no gate that enforces source addresses: a local pod's address is no proof, and a
    /// node's address proves nothing.
    Ungated,
}

impl Origin {
    /// The origin of a packet to a pod whose source address was not translated.
    #[inline(always)]
    #[must_use]
    pub const fn of(pod: &PodView) -> Self {
        if pod.has(PodState::GATED) {
            Self::Address
        } else {
            Self::Ungated
        }
    }
}

/// A connection or datagram that arrives at a pod as plaintext.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// The source address.
    pub from: &'a Addr,
    /// The provenance of the source address.
    pub origin: Origin,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination port.
    pub port: crate::Port,
}

/// The agent's listener for captured connections, by the address family on the wire.
#[inline(always)]
#[must_use]
pub const fn outbound_listener(destination: &Addr) -> ListenerSlot {
    if destination.is_v4() {
        ListenerSlot::Outbound4
    } else {
        ListenerSlot::Outbound6
    }
}

/// The agent's listener for tunnels, by the address family on the wire.
#[inline(always)]
#[must_use]
pub const fn tunnel_listener(destination: &Addr) -> ListenerSlot {
    if destination.is_v4() {
        ListenerSlot::Tunnel4
    } else {
        ListenerSlot::Tunnel6
    }
}

/// Whether a port of a pod accepts tunnels only.
#[inline(always)]
pub fn strict(peers: &impl Peers, pod: &PodView, port: crate::Port) -> bool {
    if pod.modes != 0 {
        match peers.port_mode(&ModeKey::new(pod.modes, port)) {
            Some(port_mode::PERMISSIVE) => return false,
            Some(_) => return true,
            None => {}
        }
    }
    pod.has(PodState::STRICT)
}

/// Decides a connection or datagram that arrives at a pod as plaintext, by the policy of `set`: the
/// pod's own, or the one to evaluate instead. The action is `Direct` or `Refuse`.
#[inline(always)]
pub fn inbound<T: Peers + Policies>(
    tables: &T,
    pod: &PodView,
    set: PolicySetId,
    arrival: Arrival<'_>,
) -> Path {
    let Arrival {
        from,
        origin,
        protocol,
        port,
    } = arrival;
    if pod.owns(from) || from.is_loopback() {
        return Path::direct(
            Verdict::pass(Reason::OwnAddress),
            Reason::OwnAddress,
            pod.id,
        );
    }
    let enrolled = pod.has(PodState::ENROLLED);
    if enrolled && from.is_v6_link_local() && has_ports(protocol) {
        return Path::refuse(Verdict::refuse(Reason::LinkLocal), IdentityId::WORLD);
    }
    let mut peer = who(tables, from);
    match origin {
        Origin::Address => {}
        Origin::Translated => peer = Who::WORLD,
        Origin::Ungated if peer.id.is_host() => peer = Who::WORLD,
        Origin::Ungated => {
            peer.local = false;
            if peer.evidence.is_proof() {
                peer.evidence = Evidence::Address;
            }
        }
    }
    if enrolled && protocol == Protocol::TCP && strict(tables, pod, port) {
        let trusted = peer.id.is_host() || (peer.local && peer.has(Peer::ENROLLED));
        if !trusted {
            let reason = if peer.id == IdentityId::UNKNOWN {
                Reason::UnknownPeer
            } else {
                Reason::PlaintextRefused
            };
            return Path::refuse(Verdict::refuse(reason), peer.id);
        }
    }
    let verdict = tables.decide(&Question {
        set,
        direction: Direction::Ingress,
        peer: peer.id,
        addr: *from,
        evidence: peer.evidence,
        protocol,
        port,
    });
    if !verdict.allowed {
        return Path::refuse(verdict, peer.id);
    }
    if enrolled && udp_refused(pod, protocol, &peer) {
        return Path::refuse(Verdict::refuse(Reason::UdpMode), peer.id);
    }
    let clear = if peer.local {
        Reason::SameNode
    } else if !enrolled {
        Reason::OptedOut
    } else if protocol != Protocol::TCP {
        Reason::Udp
    } else if peer.has(Peer::POD) {
        Reason::PermissivePlaintext
    } else {
        Reason::NotAWorkload
    };
    Path::direct(verdict, clear, peer.id)
}

/// Decides a connection that arrives through a tunnel whose certificate proves `peer`, by the policy
/// of `set`.
#[inline(always)]
pub fn tunnelled(
    policies: &impl Policies,
    set: PolicySetId,
    peer: IdentityId,
    from: &Addr,
    port: crate::Port,
) -> Verdict {
    policies.decide(&Question {
        set,
        direction: Direction::Ingress,
        peer,
        addr: *from,
        evidence: Evidence::Tls,
        protocol: Protocol::TCP,
        port,
    })
}

#[inline(always)]
const fn has_ports(protocol: Protocol) -> bool {
    protocol.0 == Protocol::TCP.0 || protocol.0 == Protocol::UDP.0
}
