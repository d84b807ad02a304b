// SPDX-License-Identifier: Apache-2.0
//! Reads the sockets of a pod's namespace, and ends those that may not go on.

use std::io;
use std::os::fd::BorrowedFd;

use super::adopted::Leaving;
use super::connections;
use mesh_sys::netns::NetNs;
use mesh_sys::sock_diag::{SockDiag, Socket};

/// Every TCP and UDP socket of a namespace that has another end or listens; `decided` as for
/// [`SockDiag::all`].
pub(super) fn list(netns: &NetNs, decided: Option<BorrowedFd<'_>>) -> io::Result<Vec<Socket>> {
    netns.run(|| SockDiag::open()?.all(decided))?
}

/// Whether the other end of a pod's connection is a socket of this node. What cannot be read is not.
pub(super) fn is_the_node_s(socket: &Socket) -> bool {
    SockDiag::open()
        .and_then(|mut diag| diag.has(socket.remote, socket.local))
        .unwrap_or(false)
}

/// Ends sockets; how many were still there.
///
/// # Errors
/// The first that could not be ended; the others are.
pub(super) fn end<'a>(
    netns: &NetNs,
    sockets: impl IntoIterator<Item = &'a Socket> + Send,
) -> io::Result<u64> {
    netns.run(|| {
        let mut diag = SockDiag::open()?;
        let mut ended = 0;
        let mut failure = None;
        for socket in sockets {
            match diag.destroy(socket) {
                Ok(true) => ended += 1,
                Ok(false) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(ended), Err)
    })?
}

/// Ends what is left in the namespace of a pod that was let go: our own sockets, and all if the
/// namespace has lost its file. Whether to look again.
pub(super) fn end_left(pod: &mut Leaving, is_tunnel: impl Fn(&Socket) -> bool) -> bool {
    let netns = &pod.home.netns;
    let is_there = pod.home.is_there();
    let ended = list(netns, None).and_then(|sockets| {
        let left = if is_there {
            connections::of_the_agent(&pod.view, &sockets, is_tunnel)
        } else {
            connections::all(&sockets)
        };
        end(netns, &left)
    });
    match ended {
        Ok(0) => {}
        Ok(ended) => tracing::debug!(ended, "sockets left in a pod that is gone were ended"),
        Err(error) => tracing::warn!(%error, "sockets may be left in a pod that is gone"),
    }
    pod.rounds = pod.rounds.saturating_sub(1);
    is_there && pod.rounds > 0
}
