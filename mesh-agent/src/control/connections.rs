// SPDX-License-Identifier: Apache-2.0
//! The effect of a plan on connections that are already open: [`judge`], a pure function over the sockets
//! of a pod's namespace.
//!
//! The agent's own sockets are never judged. A tunnel is known by its port, or by the kernel if it has an
//! application's port; a socket with a foreign address is known by that address. Connections that the proxy
//! carries, both captured ones and those that arrive through a tunnel, are closed by the proxy.

use mesh_common::identity::Peer;
use mesh_common::path::{self, Arrival, Origin, Outbound, Path, Peers as _};
use mesh_common::pod::{PodState, PodView};
use mesh_common::service::is_virtual;
use mesh_common::settings::{MARK_CAPTURE, MARK_INBOUND, MARK_MASK};
use mesh_common::{Direction, Endpoint, Protocol, Reason, Verdict};
use mesh_plan::Index;

use mesh_sys::sock_diag::{Overview, Socket, state};

/// The decision about the open connections of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Connections older than the enrollment that stay plaintext: local endpoint, remote endpoint, reason.
    pub old: Vec<(Endpoint, Endpoint, Reason)>,
    /// Connections to close, each with the verdict that refuses it.
    pub denied: Vec<(Socket, Verdict)>,
}

/// Questions about a socket that only the kernel can answer, asked as a last resort.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// Tells whether the socket is the agent's endpoint of a tunnel.
    pub is_tunnel: &'a dyn Fn(&Socket) -> bool,
    /// Tells whether the peer, which has an address of this node, is a socket of this node.
    pub is_node_peer: &'a dyn Fn(&Socket) -> bool,
}

/// Decides about the open connections of a pod. `sockets` are all sockets of its namespace, including
/// listeners. `fresh` tells whether the pod is just being enrolled, as opposed to a change of its peers;
/// `carried` tells whether the agent has tunnels for it, also while it is being unenrolled.
#[must_use]
pub fn judge(
    plan: &Index,
    pod: &PodView,
    sockets: &[Socket],
    (fresh, carried): (bool, bool),
    ask: Ask<'_>,
) -> Judgement {
    let scene = Scene::new(plan, pod, sockets, carried, ask);
    let mut judgement = Judgement::default();
    for socket in sockets {
        match scene.decide(socket) {
            Fate::Keep => {}
            _ if carried && (ask.is_tunnel)(socket) => {}
            Fate::Deny(verdict) => judgement.denied.push((*socket, verdict)),
            Fate::Old => {
                let reason = if fresh {
                    Reason::PreEnrolment
                } else {
                    Reason::PeerNotReady
                };
                judgement.old.push((socket.local, socket.remote, reason));
            }
        }
    }
    judgement
}

/// Selects the pod's sockets that are connected to the agent: captured connections, and connections that
/// the agent made to the application.
#[must_use]
pub fn with_the_agent(pod: &PodView, sockets: &[Socket]) -> Vec<Socket> {
    let overview = Overview::of(sockets);
    connected(sockets)
        .filter(|s| pod.owns(&s.local.addr) && !pod.owns(&s.remote.addr))
        .filter(|s| {
            let marked = [MARK_CAPTURE, MARK_INBOUND].contains(&(s.mark & MARK_MASK));
            marked || overview.has_local_peer(s)
        })
        .copied()
        .collect()
}

/// Selects the agent's own sockets: tunnels, and sockets with a foreign address.
#[must_use]
pub fn of_the_agent(
    pod: &PodView,
    sockets: &[Socket],
    is_tunnel: impl Fn(&Socket) -> bool,
) -> Vec<Socket> {
    let ours = |s: &&Socket| {
        let foreign = !(pod.owns(&s.local.addr) || s.local.addr.is_loopback());
        foreign || is_tunnel(s)
    };
    connected(sockets).filter(ours).copied().collect()
}

/// Selects every connection of a namespace.
#[must_use]
pub fn all(sockets: &[Socket]) -> Vec<Socket> {
    connected(sockets).copied().collect()
}

fn connected(sockets: &[Socket]) -> impl Iterator<Item = &Socket> {
    let tcp = |s: &&Socket| s.protocol == Protocol::TCP && s.state != state::LISTEN;
    sockets.iter().filter(tcp)
}

enum Fate {
    Keep,
    Old,
    Deny(Verdict),
}

struct Scene<'a> {
    plan: &'a Index,
    pod: &'a PodView,
    carried: bool,
    ask: Ask<'a>,
    overview: Overview,
}

impl<'a> Scene<'a> {
    fn new(
        plan: &'a Index,
        pod: &'a PodView,
        sockets: &[Socket],
        carried: bool,
        ask: Ask<'a>,
    ) -> Self {
        Self {
            plan,
            pod,
            carried,
            ask,
            overview: Overview::of(sockets),
        }
    }

    fn decide(&self, socket: &Socket) -> Fate {
        if socket.state == state::LISTEN
            || !socket.is_connected()
            || !self.pod.owns(&socket.local.addr)
            || self.pod.owns(&socket.remote.addr)
        {
            return Fate::Keep;
        }
        if socket.protocol == Protocol::TCP {
            self.tcp(socket)
        } else {
            self.udp(socket)
        }
    }

    fn tcp(&self, socket: &Socket) -> Fate {
        match self.overview.direction(socket) {
            Direction::Ingress => self.accepted(socket),
            Direction::Egress => self.connected(socket),
        }
    }

    /// A connection that the pod accepted.
    fn accepted(&self, socket: &Socket) -> Fate {
        // A connection whose other endpoint is in this namespace is one with the agent.
        if socket.mark & MARK_MASK == MARK_INBOUND || self.overview.has_local_peer(socket) {
            return Fate::Keep;
        }
        let path = self.inbound(socket, self.origin(socket));
        if path.action == Outbound::Refuse {
            return Fate::Deny(path.verdict);
        }
        let peer = path::who(self.plan, &socket.remote.addr);
        if !path::tunnels(self.pod, &peer) {
            return Fate::Keep;
        }
        let strict = path::strict(self.plan, self.pod, socket.local.port);
        self.old_or_denied(socket, strict)
    }

    /// Returns the origin that the hooks recorded when the connection arrived.
    fn origin(&self, socket: &Socket) -> Origin {
        let host = || path::who(self.plan, &socket.remote.addr).id.is_host();
        let origin = Origin::of(self.pod);
        if origin == Origin::Address && host() && !(self.ask.is_node_peer)(socket) {
            Origin::Translated
        } else {
            origin
        }
    }

    /// Decides a plaintext connection or datagram from the socket's remote endpoint.
    fn inbound(&self, socket: &Socket, origin: Origin) -> Path {
        let arrival = Arrival {
            from: &socket.remote.addr,
            origin,
            protocol: socket.protocol,
            port: socket.local.port,
        };
        path::inbound(self.plan, self.pod, self.pod.set, arrival)
    }

    /// A connection that the pod opened.
    fn connected(&self, socket: &Socket) -> Fate {
        if is_virtual(self.plan, &socket.remote, Protocol::TCP) {
            // The destination is unknown: another load balancer translated it before the enrollment.
            let enrolled = self.pod.has(PodState::ENROLLED);
            return if enrolled {
                self.old_or_denied(socket, self.pod.has(PodState::STRICT))
            } else {
                Fate::Keep
            };
        }
        let set = self.pod.set;
        let path = path::outbound(self.plan, self.pod, set, socket.remote, Protocol::TCP);
        match path.action {
            Outbound::Refuse if self.meets_silence(socket, path.verdict.reason) => Fate::Keep,
            // The proxy closes it, and records the reason.
            Outbound::Refuse if self.carried && self.is_captured(socket) => Fate::Keep,
            Outbound::Refuse => Fate::Deny(path.verdict),
            Outbound::Direct => Fate::Keep,
            Outbound::Tunnel if self.is_captured(socket) => Fate::Keep,
            Outbound::Tunnel => self.old_or_denied(socket, self.pod.has(PodState::STRICT)),
        }
    }

    /// Decides a plaintext connection to a peer that now accepts tunnels: it stays only while both ends are
    /// Permissive.
    fn old_or_denied(&self, socket: &Socket, strict: bool) -> Fate {
        let peer = self.plan.peer(&socket.remote.addr);
        if strict || self.pod.has(PodState::REQUIRED) || peer.is_some_and(|p| p.has(Peer::STRICT)) {
            return Fate::Deny(Verdict::refuse(Reason::PreEnrolment));
        }
        // This includes a connection in SYN_SENT: a hook passed it as plaintext, and it is not captured later.
        Fate::Old
    }

    fn udp(&self, socket: &Socket) -> Fate {
        let to = socket.remote;
        if is_virtual(self.plan, &to, Protocol::UDP) {
            return Fate::Keep;
        }
        let out = path::outbound(self.plan, self.pod, self.pod.set, to, Protocol::UDP);
        let back = self.inbound(socket, Origin::Address);
        // The initiator is unknown: a reply is allowed if the request was.
        if out.action == Outbound::Refuse && back.action == Outbound::Refuse {
            Fate::Deny(out.verdict)
        } else {
            Fate::Keep
        }
    }

    /// Whether policy refuses a connect() that the gate lets time out.
    fn meets_silence(&self, socket: &Socket, reason: Reason) -> bool {
        socket.state == state::SYN_SENT
            && reason.is_policy()
            && self.pod.has(PodState::SILENT)
            && self.pod.has(PodState::GATED)
    }

    fn is_captured(&self, socket: &Socket) -> bool {
        socket.mark & MARK_MASK == MARK_CAPTURE || self.overview.has_local_peer(socket)
    }
}

#[cfg(test)]
mod tests;
