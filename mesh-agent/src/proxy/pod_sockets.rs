// SPDX-License-Identifier: Apache-2.0
//! Sockets in pods' namespaces. This interface separates the proxy from the node, so that the proxy can be
//! tested over loopback.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use mesh_common::settings::MARK_INBOUND;
use mesh_common::{Endpoint, Port};
use mesh_tunnel::Socket;
use socket2::TcpKeepalive;

use mesh_datapath::Handles;
use mesh_datapath::pods::PodHandle;
use mesh_sys::socket;

/// The two addresses of an accepted connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    /// The address that the peer connected to.
    pub(crate) local: SocketAddr,
    /// The peer's own address.
    pub(crate) peer: SocketAddr,
}

/// A connection to another node's agent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerAddress {
    /// The pod's own address.
    pub(crate) from: SocketAddr,
    /// The agent's address.
    pub(crate) to: SocketAddr,
    /// Whether the port is an application's, so that the SYN must carry the tunnels' option.
    pub(crate) marked: bool,
}

/// A connection that was begun.
#[derive(Debug)]
pub(crate) struct Connecting {
    /// The socket.
    pub(crate) stream: TcpStream,
    /// Whether it is already connected, which is the common case within a namespace.
    pub(crate) connected: bool,
}

/// Makes the proxy's connections, and knows their addresses.
pub(crate) trait PodSockets {
    /// The addresses of an accepted connection.
    fn addresses(&self, socket: &Socket) -> io::Result<Addresses>;

    /// Begins to connect to another node's agent from a pod's own address.
    fn peer(&self, pod: &PodHandle, address: PeerAddress) -> io::Result<TcpStream>;

    /// Begins to connect to a pod's application from the client's own address and port.
    fn application(
        &self,
        pod: &PodHandle,
        client: SocketAddr,
        to: SocketAddr,
    ) -> io::Result<Connecting>;

    /// The service address that a captured connection was made to, if there is one.
    fn service(&self, pod: &PodHandle, to: Endpoint, local_port: Port) -> Option<Endpoint>;
}

/// Detects a vanished node within a minute. An application's own keepalive does not: its own node
/// answers it.
pub(crate) const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(30))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// Sockets in the namespaces of pods.
#[derive(Debug)]
pub(crate) struct NamespaceSockets(pub(crate) Handles);

impl NamespaceSockets {
    /// Begins to connect; returns whether the socket is connected.
    fn connect(&self, socket: &socket2::Socket, to: SocketAddr, marked: bool) -> io::Result<bool> {
        self.0.exempt(socket.as_fd(), marked)?;
        socket.set_tcp_nodelay(true)?;
        is_connected(socket, to)
    }
}

/// Begins to connect, or asks for the result; returns whether the socket is connected.
fn is_connected(socket: &socket2::Socket, to: SocketAddr) -> io::Result<bool> {
    match socket.connect(&to.into()) {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINPROGRESS | libc::EALREADY)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

impl PodSockets for NamespaceSockets {
    fn addresses(&self, socket: &Socket) -> io::Result<Addresses> {
        Ok(Addresses {
            local: socket.local_addr()?,
            peer: socket.peer_addr()?,
        })
    }

    fn peer(&self, pod: &PodHandle, address: PeerAddress) -> io::Result<TcpStream> {
        let PeerAddress { from, to, marked } = address;
        let socket = pod.netns.run(|| socket::outgoing(from))??;
        socket.set_tcp_keepalive(&KEEPALIVE)?;
        self.connect(&socket, to, marked)?;
        Ok(socket.into())
    }

    fn application(
        &self,
        pod: &PodHandle,
        client: SocketAddr,
        to: SocketAddr,
    ) -> io::Result<Connecting> {
        let socket = pod
            .netns
            .run(|| socket::on_behalf_of(client, MARK_INBOUND))??;
        // Over loopback the TCP handshake is over when the first call returns; the second call tells
        // its result, which saves waiting for it.
        let connected = self.connect(&socket, to, false)? || is_connected(&socket, to)?;
        Ok(Connecting {
            stream: socket.into(),
            connected,
        })
    }

    fn service(&self, pod: &PodHandle, to: Endpoint, local_port: Port) -> Option<Endpoint> {
        self.0.take_captured(pod.netns_cookie, to, local_port)
    }
}
