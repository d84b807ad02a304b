// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! What becomes of a connection or datagram: the modes of enrolment around the policy decision.
//!
//! [`outbound`] is asked by the connect and sendmsg hooks, the gate, and the agent when it accepts
//! a captured connection; [`inbound`] by sk_lookup and the gate for what arrives in clear;
//! [`tunnelled`] by the agent for what arrives through a tunnel. All are pure.

use crate::addr::{Addr, Endpoint, Protocol};
use crate::identity::{Evidence, IdentityId, Peer};
use crate::pod::{ListenerSlot, ModeKey, PodState, PodView, port_mode};
use crate::policy::{Direction, Policies, Question};
use crate::settings::TUNNEL_PORT;
use crate::verdict::{Reason, Verdict};

/// Where addresses are looked up.
pub trait Peers {
    /// What the cluster knows of an address.
    fn peer(&self, addr: &Addr) -> Option<Peer>;
    /// The identity and flags of the pod of this node that has the address: a local fact.
    fn local(&self, addr: &Addr) -> Option<PodView>;
    /// Whether the address is inside a pod CIDR.
    fn in_pod_cidr(&self, addr: &Addr) -> bool;
    /// The mode of a port, if it differs from the pod's.
    fn port_mode(&self, key: &ModeKey) -> Option<u8>;
}

/// Who is behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// The identity.
    pub id: IdentityId,
    /// How well it is known.
    pub evidence: Evidence,
    /// Whether it is a pod of this node.
    pub local: bool,
    /// [`Peer`] flags; for a local pod derived from its own state.
    pub flags: u32,
}

impl Who {
    /// Somebody outside.
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

/// What to do with an outgoing connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// Goes directly, in clear, for the reason [`Path::clear`].
    Direct,
    /// Goes to the agent, which tunnels it.
    Tunnel,
    /// Refused.
    Refuse,
}

/// A decision with its reasons.
#[must_use = "a decision that is thrown away is a hole"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// What to do.
    pub action: Outbound,
    /// The verdict and its rule.
    pub verdict: Verdict,
    /// Why it is in clear, where it is.
    pub clear: Reason,
    /// Who the other end is.
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

/// Who is behind an address, by address alone. Local pods are local facts, never the API's.
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

/// What to do with a connection or datagram that a pod sends. The destination is real: services are
/// already resolved.
#[inline(always)]
pub fn outbound<T: Peers + Policies>(
    tables: &T,
    pod: &PodView,
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
    // The egress of an enrolled pod to an enrolled one goes through a tunnel that proves the
    // peer's identity, or is not made: as good as proof at this end.
    let tunnel = protocol == Protocol::TCP
        && enrolled
        && !peer.local
        && peer.has(Peer::ENROLLED | Peer::READY);
    let evidence = if tunnel { Evidence::Tls } else { peer.evidence };
    let verdict = tables.decide(&Question {
        set: tables.set_of(pod),
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

/// An enrolled pod to something elsewhere that is not tunnelled to.
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

/// `udp` of MeshAuthentication is about UDP between workloads.
#[inline(always)]
fn udp_refused(pod: &PodView, protocol: Protocol, peer: &Who) -> bool {
    if protocol != Protocol::UDP || !(peer.has(Peer::POD) || peer.id == IdentityId::UNKNOWN) {
        return false;
    }
    pod.has(PodState::UDP_DENY) || (pod.has(PodState::UDP_SAME_NODE) && !peer.local)
}

/// Where a packet came from, as the caller can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// As the address says: the gate holds addresses, or there is nothing better.
    Address,
    /// Translated on its way: the address is a node's, the sender is not.
    Translated,
    /// No gate holds addresses on the pod's interface: a local pod's address is no better than any,
    /// and a node's proves nothing.
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

/// Whether a port of the pod accepts tunnels only.
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

/// What to do with a connection or datagram that arrives at a pod in clear. `action` is `Direct` or
/// `Refuse`.
#[inline(always)]
pub fn inbound<T: Peers + Policies>(
    tables: &T,
    pod: &PodView,
    from: &Addr,
    origin: Origin,
    protocol: Protocol,
    port: crate::Port,
) -> Path {
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
        set: tables.set_of(pod),
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

/// Decides a connection that arrived through a tunnel whose certificate proved `peer`.
#[inline(always)]
pub fn tunnelled(
    policies: &impl Policies,
    pod: &PodView,
    peer: IdentityId,
    from: &Addr,
    port: crate::Port,
) -> Verdict {
    policies.decide(&Question {
        set: policies.set_of(pod),
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
