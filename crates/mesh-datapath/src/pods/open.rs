// SPDX-License-Identifier: Apache-2.0
//! The open connections of a pod, as its own sockets have them: for people, and for trying policy
//! out. The agent's own sockets are left out.

use std::io;
use std::os::fd::BorrowedFd;

use mesh_common::pod::{PodState, PodView};
use mesh_common::settings::{MARK_CAPTURE, MARK_INBOUND, MARK_MASK};
use mesh_common::{Direction, Endpoint, Protocol};

use super::PodHandle;
use mesh_sys::sock_diag::{Overview, SockDiag, Socket, state};

/// An end of an open connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Whether the pod accepted it or opened it.
    pub direction: Direction,
    /// TCP, or UDP of a connected socket.
    pub protocol: Protocol,
    /// Who opened it.
    pub source: Endpoint,
    /// Who was reached, after translation by this node.
    pub destination: Endpoint,
    /// The agent carries it.
    pub tunnelled: bool,
}

/// Lists the open connections of a pod whose view in the plan is `view`; `decided` as for [`SockDiag::all`]; `is_tunnel` tells the agent's own sockets
/// that have an application's port. Enters the pod's namespace: not for a thread that serves
/// connections.
///
/// # Errors
/// The namespace cannot be entered, or the kernel does not tell.
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
    let of_tunnel = |s: &Socket| enrolled && (s.has_tunnel_port() || is_tunnel(s));
    let one = |s: &Socket| {
        let is_open = s.state != state::LISTEN && s.is_connected();
        let applications = view.owns(&s.local.addr) && !view.owns(&s.remote.addr);
        if !is_open || !applications || of_tunnel(s) {
            return None;
        }
        let mark = s.mark & MARK_MASK;
        let marked = mark == MARK_CAPTURE || mark == MARK_INBOUND;
        // Of a connected UDP socket: it is the client's.
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
            tunnelled: marked || overview.has_other_end(s),
        })
    };
    sockets.iter().filter_map(one).collect()
}
