// SPDX-License-Identifier: Apache-2.0
//! Lists and destroys the sockets of a network namespace (sock_diag, `SOCK_DESTROY`).
//!
//! Destroying a socket needs CONFIG_INET_DIAG_DESTROY. A blocked read of the application returns ECONNABORTED, and
//! the peer gets an RST.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use mesh_common::socket::SocketState;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol};
use zerocopy::FromBytes as _;

use super::netlink::{Attributes, Body, Netlink, half, word};
use super::route::Family;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// The length of struct inet_diag_sockid (linux/inet_diag.h).
const ID: usize = 48;
/// The request attribute that selects the socket storage maps (linux/inet_diag.h).
const REQUEST_STORAGES: u16 = 2;
/// The nested attribute with a map descriptor (linux/sock_diag.h).
const REQUEST_MAP_FD: u16 = 1;
/// The length of struct inet_diag_msg.
const MESSAGE: usize = 72;

/// TCP states (net/tcp_states.h).
pub mod state {
    /// Established; also connected UDP sockets.
    pub const ESTABLISHED: u8 = 1;
    /// connect() is in progress.
    pub const SYN_SENT: u8 = 2;
    /// A SYN was received.
    pub const SYN_RECV: u8 = 3;
    /// Closed; waits before the 4-tuple can be reused.
    pub const TIME_WAIT: u8 = 6;
    /// Closed; also unconnected UDP sockets.
    pub const CLOSE: u8 = 7;
    /// Listening.
    pub const LISTEN: u8 = 10;
}

/// A bit set of socket states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u32);

impl States {
    /// All states that can carry data: all except LISTEN and TIME_WAIT. A socket in CLOSE_WAIT, for example, can
    /// still send.
    pub const LIVE: Self = Self(0x1ffe & !(1 << state::LISTEN) & !(1 << state::TIME_WAIT));
    /// Listeners.
    pub const LISTEN: Self = Self(1 << state::LISTEN);
    /// Live sockets and listeners.
    pub const LIVE_AND_LISTEN: Self = Self(Self::LIVE.0 | Self::LISTEN.0);
}

/// A socket in the kernel's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The address family of the socket: IPv6 for a socket with an IPv4-mapped address.
    pub family: Family,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The state: see [`state`].
    pub state: u8,
    /// The local endpoint.
    pub local: Endpoint,
    /// The remote endpoint; unspecified = none.
    pub remote: Endpoint,
    /// The mark; 0 without CAP_NET_ADMIN.
    pub mark: u32,
    /// The direction in which the connection was opened, by its state or its socket storage; `None` = unknown. The
    /// storage of a connection that predates the hooks can have either direction.
    pub direction: Option<Direction>,
    /// The inode of the socket file; 0 = not accepted yet, or closed by the process.
    pub inode: u32,
    id: [u8; ID],
}

impl Socket {
    /// Returns whether the socket has a remote endpoint.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !self.remote.addr.is_unspecified() && self.remote.port.0 != 0
    }

    /// Creates a socket for tests.
    #[must_use]
    pub fn imagined(protocol: Protocol, state: u8, ends: [&str; 2], mark: u32) -> Self {
        let end = |text: &str| {
            let at: std::net::SocketAddr = text.parse().expect("an address with a port");
            Endpoint::from(at)
        };
        Self {
            family: Family::V6,
            protocol,
            state,
            local: end(ends[0]),
            remote: end(ends[1]),
            mark,
            direction: None,
            inode: 1,
            id: [0; ID],
        }
    }

    /// Returns the socket's cookie, as in `SO_COOKIE`.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        let at = |i: usize| u64::from(word(&self.id, i).unwrap_or(0));
        at(40) | at(44) << 32
    }
}

/// An index of the TCP sockets of one network namespace.
#[derive(Debug)]
pub struct Overview {
    listening: BTreeSet<Port>,
    ends: BTreeSet<(Endpoint, Endpoint)>,
}

impl Overview {
    /// Creates the index from all sockets of a network namespace, including listeners.
    #[must_use]
    pub fn of(sockets: &[Socket]) -> Self {
        let tcp = || sockets.iter().filter(|s| s.protocol == Protocol::TCP);
        Self {
            listening: tcp()
                .filter(|s| s.state == state::LISTEN)
                .map(|s| s.local.port)
                .collect(),
            ends: tcp().map(|s| (s.local, s.remote)).collect(),
        }
    }

    /// Returns the direction in which a connection was opened. A connection that predates the hooks counts as ingress
    /// if a socket listens on its local port.
    #[must_use]
    pub fn direction(&self, socket: &Socket) -> Direction {
        let listened = self.listening.contains(&socket.local.port);
        socket.direction.unwrap_or(if listened {
            Direction::Ingress
        } else {
            Direction::Egress
        })
    }

    /// Returns whether the remote endpoint of a connection is in this namespace too.
    #[must_use]
    pub fn has_local_peer(&self, socket: &Socket) -> bool {
        self.ends.contains(&(socket.remote, socket.local))
    }
}

/// A sock_diag socket of one network namespace.
#[derive(Debug)]
pub struct SockDiag(Netlink);

impl SockDiag {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// The kernel does not support sock_diag.
    pub fn open() -> io::Result<Self> {
        const NETLINK_SOCK_DIAG: i32 = 4;
        Netlink::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Lists all TCP and UDP sockets that are connected or listen. `decided` is the storage map of [`SocketState`], which
    /// contains the directions of connections; reading it needs CAP_BPF and Linux 5.8.
    ///
    /// # Errors
    /// See [`SockDiag::sockets`].
    pub fn all(&mut self, decided: Option<BorrowedFd<'_>>) -> io::Result<Vec<Socket>> {
        let mut all = self.read(Protocol::TCP, States::LIVE_AND_LISTEN, decided)?;
        all.extend(self.read(Protocol::UDP, States::LIVE, None)?);
        Ok(all)
    }

    /// Lists the sockets of both families. A socket that changes its state meanwhile can be missing or listed twice.
    ///
    /// # Errors
    /// The request failed, or the kernel has no diag module for the protocol.
    pub fn sockets(&mut self, protocol: Protocol, states: States) -> io::Result<Vec<Socket>> {
        self.read(protocol, states, None)
    }

    fn read(
        &mut self,
        protocol: Protocol,
        states: States,
        storage: Option<BorrowedFd<'_>>,
    ) -> io::Result<Vec<Socket>> {
        let mut found = Vec::new();
        for family in [Family::V4, Family::V6] {
            let mut body = request(family, protocol, states.0, &[0; ID]);
            if let Some(map) = storage {
                let map = Body::default().with(REQUEST_MAP_FD, &map.as_raw_fd().to_ne_bytes());
                body = body.with(REQUEST_STORAGES, map.bytes());
            }
            found.extend(
                self.0
                    .dump(SOCK_DIAG_BY_FAMILY, &body, |m| parse(protocol, m))?,
            );
        }
        Ok(found)
    }

    /// Returns whether a TCP socket with these endpoints exists.
    ///
    /// # Errors
    /// The request failed.
    pub fn has(&mut self, local: Endpoint, remote: Endpoint) -> io::Result<bool> {
        let family = if local.addr.is_v4() {
            Family::V4
        } else {
            Family::V6
        };
        let body = request(family, Protocol::TCP, u32::MAX, &id(local, remote));
        match self.0.get(SOCK_DIAG_BY_FAMILY, &body) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Destroys a socket; `false` = it no longer exists.
    ///
    /// # Errors
    /// `EOPNOTSUPP` = the kernel does not support it; `EPERM` = CAP_NET_ADMIN in the namespace is missing.
    pub fn destroy(&mut self, socket: &Socket) -> io::Result<bool> {
        let body = request(socket.family, socket.protocol, u32::MAX, &socket.id);
        match self.0.request(SOCK_DESTROY, 0, &body) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn request(family: Family, protocol: Protocol, states: u32, id: &[u8; ID]) -> Body {
    let number = match family {
        Family::V4 => 2,
        Family::V6 => 10,
    };
    let mut raw = [0u8; 8 + ID];
    raw[0] = number;
    raw[1] = protocol.0;
    raw[4..8].copy_from_slice(&states.to_ne_bytes());
    raw[8..].copy_from_slice(id);
    Body::new(&raw)
}

/// Encodes the id of a socket by its endpoints, on any interface and without a cookie.
fn id(local: Endpoint, remote: Endpoint) -> [u8; ID] {
    let mut id = [0; ID];
    for (at, end) in [(0, local), (1, remote)] {
        id[2 * at..][..2].copy_from_slice(&end.port.0.to_ne_bytes());
        let words = match end.addr.v4_word() {
            Some(word) => vec![word],
            None => end.addr.words().to_vec(),
        };
        for (i, word) in words.into_iter().enumerate() {
            id[4 + 16 * at + 4 * i..][..4].copy_from_slice(&word.to_ne_bytes());
        }
    }
    // INET_DIAG_NOCOOKIE
    id[40..].fill(0xff);
    id
}

/// Returns the direction in which a connection was opened, as far as its state determines it.
const fn by_state(state: u8) -> Option<Direction> {
    match state {
        state::SYN_SENT => Some(Direction::Egress),
        state::SYN_RECV => Some(Direction::Ingress),
        _ => None,
    }
}

/// Parses the socket storage: INET_DIAG_SK_BPF_STORAGES contains an SK_DIAG_BPF_STORAGE for each map
/// (linux/sock_diag.h).
fn by_storage(storages: &[u8]) -> Option<Direction> {
    const STORAGE: u16 = 1;
    const VALUE: u16 = 3;
    let (_, storage) = Attributes::after(storages, 0).find(|(kind, _)| *kind == STORAGE)?;
    let (_, value) = Attributes::after(storage, 0).find(|(kind, _)| *kind == VALUE)?;
    let (state, _) = SocketState::read_from_prefix(value).ok()?;
    if state.flags & SocketState::DECIDED == 0 {
        return None;
    }
    [Direction::Egress, Direction::Ingress]
        .into_iter()
        .find(|direction| *direction as u8 == state.direction)
}

fn parse(protocol: Protocol, message: &[u8]) -> Option<Socket> {
    const INET_DIAG_MARK: u16 = 15;
    const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
    let family = match *message.first()? {
        2 => Family::V4,
        10 => Family::V6,
        _ => return None,
    };
    let id = *message.get(4..)?.first_chunk::<ID>()?;
    let mut socket = Socket {
        family,
        protocol,
        state: *message.get(1)?,
        local: endpoint(family, &id, 4, 0)?,
        remote: endpoint(family, &id, 20, 2)?,
        mark: 0,
        direction: by_state(*message.get(1)?),
        inode: word(message, MESSAGE - 4)?,
        id,
    };
    for (kind, data) in Attributes::after(message, MESSAGE) {
        if kind == INET_DIAG_MARK {
            socket.mark = word(data, 0)?;
        } else if kind == INET_DIAG_SK_BPF_STORAGES {
            socket.direction = socket.direction.or_else(|| by_storage(data));
        }
    }
    Some(socket)
}

fn endpoint(family: Family, id: &[u8], addr: usize, port: usize) -> Option<Endpoint> {
    let word = |i: usize| word(id, addr + 4 * i);
    let addr = match family {
        Family::V4 => Addr::from_v4_word(word(0)?),
        Family::V6 => Addr::from_words([word(0)?, word(1)?, word(2)?, word(3)?]),
    };
    Some(Endpoint::new(addr, Port(half(id, port)?)))
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd as _;
    use std::thread;

    use super::*;
    use crate::lab::alone;
    use crate::socket;

    fn find(protocol: Protocol, local: SocketAddr, remote: SocketAddr) -> Option<Socket> {
        let all = SockDiag::open()
            .unwrap()
            .sockets(protocol, States::LIVE)
            .unwrap();
        all.into_iter()
            .find(|s| s.local == local.into() && s.remote == remote.into())
    }

    #[test]
    fn connection_is_found_and_destroyed_over_ipv4_ipv6_and_mapped_addresses() {
        alone(destroys_tcp);
    }

    fn destroys_tcp() {
        for (listen, connect) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("[::1]:0", "::1"),
            ("[::]:0", "::ffff:127.0.0.1"),
        ] {
            let listener = TcpListener::bind(listen).unwrap();
            let to = SocketAddr::new(
                connect.parse().unwrap(),
                listener.local_addr().unwrap().port(),
            );
            let mut client = TcpStream::connect(to).unwrap();
            let (mut server, from) = listener.accept().unwrap();
            socket::set_mark(client.as_fd(), 0x77).unwrap();
            let found = find(Protocol::TCP, client.local_addr().unwrap(), to)
                .unwrap_or_else(|| panic!("{connect} is not listed"));
            assert_eq!(found.mark, 0x77);
            assert_eq!(found.state, state::ESTABLISHED);
            let mut diag = SockDiag::open().unwrap();
            assert!(diag.has(found.local, found.remote).unwrap(), "{connect}");
            let other = Endpoint::new(found.remote.addr, Port(1));
            assert!(!diag.has(found.local, other).unwrap(), "{connect}");
            assert_eq!(found.cookie(), socket::cookie(client.as_fd()).unwrap());
            let blocked = thread::spawn(move || server.read(&mut [0; 1]).unwrap_err().kind());
            let mut diag = SockDiag::open().unwrap();
            assert!(diag.destroy(&found).unwrap());
            assert!(!diag.destroy(&found).unwrap(), "it is gone");
            assert_eq!(blocked.join().unwrap(), ErrorKind::ConnectionReset);
            let error = client.read(&mut [0; 1]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
            assert_eq!(find(Protocol::TCP, from, to), None);
        }
    }

    #[test]
    fn half_closed_connection_is_live() {
        alone(half_closed);
    }

    fn half_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, from) = listener.accept().unwrap();
        let local = server.local_addr().unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
        let found = find(Protocol::TCP, local, from).expect("CLOSE_WAIT is listed");
        assert_eq!(found.state, 8);
        assert!(SockDiag::open().unwrap().destroy(&found).unwrap());
        assert!(server.write_all(b"more").is_err(), "it goes on sending");
    }

    #[test]
    fn connected_udp_socket_is_destroyed() {
        alone(destroys_udp);
    }

    fn destroys_udp() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        client.connect(to).unwrap();
        let found = find(Protocol::UDP, client.local_addr().unwrap(), to).expect("it is listed");
        assert!(found.is_connected());
        let unconnected = SockDiag::open()
            .unwrap()
            .sockets(Protocol::UDP, States::LIVE)
            .unwrap()
            .into_iter()
            .find(|s| s.local == to.into())
            .expect("it is listed too");
        assert!(!unconnected.is_connected());
        assert!(SockDiag::open().unwrap().destroy(&found).unwrap());
        assert_eq!(find(Protocol::UDP, client.local_addr().unwrap(), to), None);
    }

    #[test]
    fn listeners_are_read_apart() {
        alone(listeners);
    }

    fn listeners() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local: Endpoint = listener.local_addr().unwrap().into();
        let mut diag = SockDiag::open().unwrap();
        let has = |sockets: Vec<Socket>| sockets.iter().any(|s| s.local == local);
        assert!(has(diag.sockets(Protocol::TCP, States::LISTEN).unwrap()));
        assert!(!has(diag.sockets(Protocol::TCP, States::LIVE).unwrap()));
    }
}
