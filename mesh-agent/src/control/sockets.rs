// SPDX-License-Identifier: Apache-2.0
//! Reads the sockets of a pod's namespace, and closes sockets in it.

use std::io;
use std::os::fd::BorrowedFd;

use super::connections;
use super::managed::Detached;
use mesh_log::warn_limited;
use mesh_sys::netns::NetNs;
use mesh_sys::sock_diag::{SockDiag, Socket};

/// Lists the connected and listening TCP and UDP sockets of a namespace; `decided` as for
/// [`SockDiag::all`].
pub(super) fn list(netns: &NetNs, decided: Option<BorrowedFd<'_>>) -> io::Result<Vec<Socket>> {
    netns.run(|| SockDiag::open()?.all(decided))?
}

/// Tells whether the peer of a pod's connection is a socket of this node; `false` if it cannot be read.
pub(super) fn is_node_peer(socket: &Socket) -> bool {
    SockDiag::open()
        .and_then(|mut diag| diag.has(socket.remote, socket.local))
        .unwrap_or(false)
}

/// Closes sockets; returns how many were still open.
///
/// # Errors
/// The first failure; all other sockets are closed.
pub(super) fn close<'a>(
    netns: &NetNs,
    sockets: impl IntoIterator<Item = &'a Socket> + Send,
) -> io::Result<u64> {
    netns.run(|| {
        let mut diag = SockDiag::open()?;
        let mut closed = 0;
        let mut failure = None;
        for socket in sockets {
            match diag.destroy(socket) {
                Ok(true) => closed += 1,
                Ok(false) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(closed), Err)
    })?
}

/// Closes leftover sockets in the namespace of a detached pod: the agent's own, and all of them if the
/// namespace has lost its file. Tells whether to try again.
pub(super) fn close_leftover(pod: &mut Detached, is_tunnel: impl Fn(&Socket) -> bool) -> bool {
    let netns = &pod.home.netns;
    let is_there = pod.home.is_there();
    let closed = list(netns, None).and_then(|sockets| {
        let left = if is_there {
            connections::of_the_agent(&pod.view, &sockets, is_tunnel)
        } else {
            connections::all(&sockets)
        };
        close(netns, &left)
    });
    match closed {
        Ok(0) => {}
        Ok(closed) => tracing::debug!(closed, "closed leftover sockets of a removed pod"),
        Err(error) => {
            warn_limited!(
                "leftover_sockets",
                error,
                "cannot close leftover sockets of a removed pod"
            );
        }
    }
    pod.rounds = pod.rounds.saturating_sub(1);
    is_there && pod.rounds > 0
}
