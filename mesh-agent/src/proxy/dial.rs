// SPDX-License-Identifier: Apache-2.0
//! Sockets in pods' namespaces: the one seam between the data path and the machine, so that all
//! the rest can be tested over loopback.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use mesh_common::settings::MARK_INBOUND;
use mesh_common::{Endpoint, Port};
use socket2::TcpKeepalive;

use super::socket::Socket;
use mesh_datapath::datapath::Handles;
use mesh_datapath::pods::PodHandle;
use mesh_sys::socket;

/// How connections come to the agent and leave it.
pub(crate) trait Dial {
    /// The two ends of an accepted connection: where it was meant to go, and who opened it.
    fn ends(&self, socket: &Socket) -> io::Result<(SocketAddr, SocketAddr)>;

    /// Begins to connect to another node's agent from a pod's own address; `marked` = the port is
    /// an application's, and the connection says that it is a tunnel.
    fn peer(
        &self,
        pod: &PodHandle,
        from: SocketAddr,
        to: SocketAddr,
        marked: bool,
    ) -> io::Result<TcpStream>;

    /// Begins to connect to a pod's application from the client's own address and port; also
    /// whether that has come to its end already, as it mostly has within a namespace.
    fn application(
        &self,
        pod: &PodHandle,
        client: SocketAddr,
        to: SocketAddr,
    ) -> io::Result<(TcpStream, bool)>;

    /// The service that a captured connection asked for, if it did.
    fn service(&self, pod: &PodHandle, to: Endpoint, local_port: Port) -> Option<Endpoint>;
}

/// A node that has vanished is noticed in a minute: whoever waits for a connection that a tunnel
/// carries asks only its own node, which is always there to answer.
pub(crate) const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(30))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// The real thing.
#[derive(Debug)]
pub(crate) struct InPod(pub(crate) Handles);

impl InPod {
    /// Begins to connect; whether that has come to its end.
    fn connect(&self, socket: &socket2::Socket, to: SocketAddr, marked: bool) -> io::Result<bool> {
        self.0.exempt(socket.as_fd(), marked)?;
        socket.set_tcp_nodelay(true)?;
        is_connected(socket, to)
    }
}

/// Connects, or asks again what came of it.
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

impl Dial for InPod {
    fn ends(&self, socket: &Socket) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((socket.local_addr()?, socket.peer_addr()?))
    }

    fn peer(
        &self,
        pod: &PodHandle,
        from: SocketAddr,
        to: SocketAddr,
        marked: bool,
    ) -> io::Result<TcpStream> {
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
    ) -> io::Result<(TcpStream, bool)> {
        let socket = pod
            .netns
            .run(|| socket::on_behalf_of(client, MARK_INBOUND))??;
        // Over loopback the handshake is over, or refused, when the first call returns; the second
        // one says so, and saves waiting for it.
        let connected = self.connect(&socket, to, false)? || is_connected(&socket, to)?;
        Ok((socket.into(), connected))
    }

    fn service(&self, pod: &PodHandle, to: Endpoint, local_port: Port) -> Option<Endpoint> {
        self.0.take_captured(pod.netns_cookie, to, local_port)
    }
}
