// SPDX-License-Identifier: Apache-2.0
//! The sockets of a namespace: read them, and destroy them (`SOCK_DESTROY`).
//!
//! Destroying needs CONFIG_INET_DIAG_DESTROY; a blocked read of the application then returns
//! ECONNABORTED, and the other end gets a reset.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use mesh_common::settings::TUNNEL_PORT;
use mesh_common::socket::SocketState;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol};
use zerocopy::FromBytes as _;

use super::netlink::{Attributes, Body, Netlink, half, word};
use super::route::Family;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Length of struct inet_diag_sockid, linux/inet_diag.h.
const ID: usize = 48;
/// Attribute of a request: for which maps to give storages (linux/inet_diag.h).
const REQUEST_STORAGES: u16 = 2;
/// In it: a map (linux/sock_diag.h).
const REQUEST_MAP_FD: u16 = 1;
/// Length of struct inet_diag_msg.
const MESSAGE: usize = 72;

/// TCP states (net/tcp_states.h).
pub mod state {
    /// Also of connected UDP sockets.
    pub const ESTABLISHED: u8 = 1;
    /// connect() is under way.
    pub const SYN_SENT: u8 = 2;
    /// A connection has begun to arrive.
    pub const SYN_RECV: u8 = 3;
    /// Waits after the close; holds no data.
    pub const TIME_WAIT: u8 = 6;
    /// Also of unconnected UDP sockets.
    pub const CLOSE: u8 = 7;
    /// Listens.
    pub const LISTEN: u8 = 10;
}

/// States to read, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u32);

impl States {
    /// Everything that can carry data: every state but LISTEN and TIME_WAIT. Not only ESTABLISHED: a
    /// socket in CLOSE_WAIT goes on sending.
    pub const LIVE: Self = Self(0x1ffe & !(1 << state::LISTEN) & !(1 << state::TIME_WAIT));
    /// Listeners.
    pub const LISTEN: Self = Self(1 << state::LISTEN);
    /// Live sockets and listeners.
    pub const LIVE_AND_LISTEN: Self = Self(Self::LIVE.0 | Self::LISTEN.0);
}

/// A socket, as the kernel lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The family it was made with: a mapped address is in an IPv6 socket.
    pub family: Family,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// See [`state`].
    pub state: u8,
    /// Its own end.
    pub local: Endpoint,
    /// The other end; unspecified = none.
    pub remote: Endpoint,
    /// Its mark; 0 without CAP_NET_ADMIN.
    pub mark: u32,
    /// Which way it was opened, as far as is known: by its state, or by what the hooks have left with
    /// it. A connection that is older than they are may have either.
    pub direction: Option<Direction>,
    /// The file's inode; 0 = no file: not accepted yet, or closed by its process.
    pub inode: u32,
    id: [u8; ID],
}

impl Socket {
    /// Whether it has another end.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !self.remote.addr.is_unspecified() && self.remote.port.0 != 0
    }

    /// Whether either end is the port of tunnels.
    #[must_use]
    pub fn has_tunnel_port(&self) -> bool {
        self.local.port == TUNNEL_PORT || self.remote.port == TUNNEL_PORT
    }

    /// A socket that only a test knows.
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

    /// The socket's cookie, as in `SO_COOKIE`.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        let at = |i: usize| u64::from(word(&self.id, i).unwrap_or(0));
        at(40) | at(44) << 32
    }
}

/// What the TCP sockets of one namespace tell of each other.
#[derive(Debug)]
pub struct Overview {
    listening: BTreeSet<Port>,
    ends: BTreeSet<(Endpoint, Endpoint)>,
}

impl Overview {
    /// Of all sockets of a namespace, listeners included.
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

    /// Which way a connection was opened. Of one that is older than the hooks, it was most likely
    /// accepted by who listens now.
    #[must_use]
    pub fn direction(&self, socket: &Socket) -> Direction {
        let listened = self.listening.contains(&socket.local.port);
        socket.direction.unwrap_or(if listened {
            Direction::Ingress
        } else {
            Direction::Egress
        })
    }

    /// Whether a connection's other end is here too.
    #[must_use]
    pub fn has_other_end(&self, socket: &Socket) -> bool {
        self.ends.contains(&(socket.remote, socket.local))
    }
}

/// A sock_diag socket of the namespace it was made in.
#[derive(Debug)]
pub struct SockDiag(Netlink);

impl SockDiag {
    /// In this thread's namespace.
    ///
    /// # Errors
    /// When the kernel has no sock_diag.
    pub fn open() -> io::Result<Self> {
        const NETLINK_SOCK_DIAG: i32 = 4;
        Netlink::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Every TCP and UDP socket that has another end or listens. `decided` = the storage of
    /// [`SocketState`], which tells connections' directions: to be read it takes CAP_BPF, and Linux
    /// 5.8.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn all(&mut self, decided: Option<BorrowedFd<'_>>) -> io::Result<Vec<Socket>> {
        let mut all = self.read(Protocol::TCP, States::LIVE_AND_LISTEN, decided)?;
        all.extend(self.read(Protocol::UDP, States::LIVE, None)?);
        Ok(all)
    }

    /// The sockets of both families. Reads them while they change: one that moves meanwhile may be
    /// missed or be there twice.
    ///
    /// # Errors
    /// When the kernel refuses, or has no diag module for the protocol.
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

    /// Whether there is a TCP socket with these ends.
    ///
    /// # Errors
    /// When the kernel refuses.
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

    /// Destroys a socket; `false` = it was gone already.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the kernel cannot; `EPERM` without CAP_NET_ADMIN in the namespace.
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

/// The id of a socket by its ends, on any interface, with no cookie.
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

/// Which way a connection was opened that is in this state.
const fn by_state(state: u8) -> Option<Direction> {
    match state {
        state::SYN_SENT => Some(Direction::Egress),
        state::SYN_RECV => Some(Direction::Ingress),
        _ => None,
    }
}

/// What the hooks say of it: INET_DIAG_SK_BPF_STORAGES holds an SK_DIAG_BPF_STORAGE for each map
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
    fn a_connection_is_found_and_destroyed_in_both_families_and_mapped() {
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
    fn a_half_closed_connection_is_live() {
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
    fn a_connected_udp_socket_is_destroyed() {
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
