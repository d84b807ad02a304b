// SPDX-License-Identifier: Apache-2.0
//! Lists the open connections of a pod from the pod's sockets, for the admin interface and for policy checks.
//! Excludes the agent's own sockets.

use std::io;
use std::os::fd::BorrowedFd;

use mesh_common::pod::{PodState, PodView};
use mesh_common::settings::{MARK_CAPTURE, MARK_INBOUND, MARK_MASK};
use mesh_common::{Direction, Endpoint, Protocol};

use super::PodHandle;
use mesh_sys::sock_diag::{Overview, SockDiag, Socket, state};

/// One endpoint of an open connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Whether the pod accepted or opened the connection.
    pub direction: Direction,
    /// TCP, or UDP for a connected socket.
    pub protocol: Protocol,
    /// The client.
    pub source: Endpoint,
    /// The server, after service translation on this node.
    pub destination: Endpoint,
    /// Whether the agent proxies the connection.
    pub tunnelled: bool,
}

/// Lists the open connections of a pod. `view` is the pod's state in the plan, `decided` the socket storage map as
/// for [`SockDiag::all`]; `is_tunnel` returns whether a socket is the agent's endpoint of a tunnel.
/// Enters the pod's namespace: do not call it on a worker thread that serves connections.
///
/// # Errors
/// The namespace cannot be entered, or its sockets cannot be read.
pub fn open(
    pod: &PodHandle,
    view: &PodView,
    decided: Option<BorrowedFd<'_>>,
    is_tunnel: impl Fn(&Socket) -> bool,
) -> io::Result<Vec<Open>> {
    let sockets = pod.netns.run(|| SockDiag::open()?.all(decided))??;
    Ok(of(view, &sockets, is_tunnel))
}

fn of(view: &PodView, sockets: &[Socket], is_tunnel: impl Fn(&Socket) -> bool) -> Vec<Open> {
    let overview = Overview::of(sockets);
    let enrolled = view.has(PodState::ENROLLED);
    let of_tunnel = |s: &Socket| enrolled && is_tunnel(s);
    let one = |s: &Socket| {
        let is_open = s.state != state::LISTEN && s.is_connected();
        let applications = view.owns(&s.local.addr) && !view.owns(&s.remote.addr);
        if !is_open || !applications || of_tunnel(s) {
            return None;
        }
        let mark = s.mark & MARK_MASK;
        let marked = mark == MARK_CAPTURE || mark == MARK_INBOUND;
        // A connected UDP socket belongs to the client.
        let direction = if s.protocol == Protocol::TCP {
            overview.direction(s)
        } else {
            Direction::Egress
        };
        let (source, destination) = match direction {
            Direction::Ingress => (s.remote, s.local),
            Direction::Egress => (s.local, s.remote),
        };
        Some(Open {
            direction,
            protocol: s.protocol,
            source,
            destination,
            tunnelled: marked || overview.has_local_peer(s),
        })
    };
    sockets.iter().filter_map(one).collect()
}
