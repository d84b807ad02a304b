// SPDX-License-Identifier: Apache-2.0
//! Socket options that the standard library and `socket2` do not offer, and the two kinds of socket
//! that the agent makes in a pod's namespace.

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use socket2::{Domain, Socket, Type};

// asm-generic/socket.h and linux/in.h; not all are in libc.
const SO_COOKIE: i32 = 57;
const SO_NETNS_COOKIE: i32 = 71;
const IP_BIND_ADDRESS_NO_PORT: i32 = 24;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV6_TRANSPARENT: i32 = 75;

fn get<T: Copy + Default>(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<T> {
    let mut value = MaybeUninit::new(T::default());
    let mut length = libc::socklen_t::try_from(mem::size_of::<T>()).unwrap_or(0);
    // SAFETY: `value` has room for `length` bytes, which the kernel does not exceed. It was
    // initialised, and is used for integers only, so any bytes written leave it valid.
    unsafe {
        if libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        ) != 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(value.assume_init())
    }
}

fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(mem::size_of::<i32>()).unwrap_or(0);
    // SAFETY: `value` is `length` bytes long and read only.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The cookie of the namespace a socket belongs to (5.14).
///
/// # Errors
/// On older kernels.
pub fn netns_cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    get(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE)
}

/// The cookie of a socket: never used again while the machine runs.
///
/// # Errors
/// When it is no socket.
pub fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    get(fd, libc::SOL_SOCKET, SO_COOKIE)
}

/// Lets a socket of the family of `addr` bind to, and answer from, addresses that are not of this
/// namespace (`IP_TRANSPARENT`). Needs CAP_NET_ADMIN or CAP_NET_RAW.
///
/// # Errors
/// Without the capability.
pub fn set_transparent(fd: BorrowedFd<'_>, addr: &SocketAddr) -> io::Result<()> {
    if addr.is_ipv4() {
        set(fd, libc::SOL_IP, libc::IP_TRANSPARENT, 1)
    } else {
        set(fd, libc::SOL_IPV6, IPV6_TRANSPARENT, 1)
    }
}

/// Sets the mark (`SO_MARK`). Needs CAP_NET_ADMIN or CAP_NET_RAW.
///
/// # Errors
/// Without the capability.
pub fn set_mark(fd: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())
}

/// The mark.
///
/// # Errors
/// When it is no socket.
pub fn mark(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, libc::SOL_SOCKET, libc::SO_MARK)
}

/// Leaves the choice of the local port to connect(), which knows the whole 4-tuple, so that a bind
/// to an address takes no port from anybody (4.2).
///
/// # Errors
/// When it is no IP socket.
pub fn set_bind_address_no_port(fd: BorrowedFd<'_>) -> io::Result<()> {
    set(fd, libc::SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Limits the local ports that the kernel picks for this socket to `first..=last`, as far as they
/// are in the namespace's own range.
///
/// # Errors
/// `ENOPROTOOPT` before 6.3: the caller goes on without.
pub fn set_local_port_range(fd: BorrowedFd<'_>, first: u16, last: u16) -> io::Result<()> {
    let range = u32::from(last) << 16 | u32::from(first);
    set(fd, libc::SOL_IP, IP_LOCAL_PORT_RANGE, range.cast_signed())
}

/// The CPU on which the last packet of a connection was received (`SO_INCOMING_CPU`, 3.19): on
/// loopback, that of the sender.
///
/// # Errors
/// When it is no socket.
pub fn incoming_cpu(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, libc::SOL_SOCKET, libc::SO_INCOMING_CPU)
}

/// What the kernel knows of a TCP connection. Counters are cumulative, also for connections that
/// carry one stream after another: take differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// The state (`TCP_ESTABLISHED` = 1 and so on).
    pub state: u8,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Segments sent again.
    pub retransmits: u32,
    /// Payload bytes the peer acknowledged.
    pub bytes_acked: u64,
    /// Payload bytes received.
    pub bytes_received: u64,
}

/// Reads `TCP_INFO`. Fields that an older kernel does not have are 0.
///
/// # Errors
/// When it is no TCP socket.
pub fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    // Offsets of struct tcp_info, linux/tcp.h: only ever appended to.
    const LENGTH: usize = 136;
    let mut raw = [0u8; LENGTH];
    let mut length = libc::socklen_t::try_from(LENGTH).unwrap_or(0);
    // SAFETY: `raw` has room for `length` bytes, which the kernel does not exceed.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            raw.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let word = |at: usize| u32::from_ne_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let long = |at: usize| {
        let mut bytes = [0u8; 8];
        bytes.copy_from_slice(&raw[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    Ok(TcpInfo {
        state: raw[0],
        rtt_us: word(68),
        retransmits: word(100),
        bytes_acked: long(120),
        bytes_received: long(128),
    })
}

/// A nonblocking transparent listener. Bind it to a loopback address: it is then reached by
/// steering only. Never `SO_REUSEPORT`, by which another process could join; `SO_REUSEADDR`, so
/// that it keeps no port from an application.
///
/// # Errors
/// When the address cannot be bound, or without CAP_NET_ADMIN.
pub fn transparent_listener(addr: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    set_transparent(socket.as_fd(), &addr)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(backlog)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// A nonblocking socket for the agent's connection from `from` (a pod's own address, port 0 = any),
/// bound but not connected. Call it inside the pod's namespace, exempt it, then connect. It takes no
/// port that an application could want to bind.
///
/// # Errors
/// When the address cannot be bound.
pub fn outgoing(from: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(from), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    set_bind_address_no_port(socket.as_fd())?;
    socket.bind(&from.into())?;
    Ok(socket)
}

/// A nonblocking socket for the hand-over to an application: bound to the client's exact address
/// and port, which are not of this namespace, and to `lo`. Call it inside the pod's namespace,
/// exempt it, then connect.
///
/// # Errors
/// When the address cannot be bound, or without CAP_NET_ADMIN.
pub fn on_behalf_of(client: SocketAddr, mark: u32) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(client),
        Type::STREAM.nonblocking(),
        None,
    )?;
    set_transparent(socket.as_fd(), &client)?;
    socket.set_reuse_address(true)?;
    set_mark(socket.as_fd(), mark)?;
    socket.bind_device(Some(b"lo"))?;
    match socket.bind(&client.into()) {
        // An application listens on a port of the same number, without SO_REUSEADDR. It is no
        // clash: the address is another.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            bind_past_listeners(&socket, client)?;
        }
        bound => bound?,
    }
    Ok(socket)
}

/// Binds although the port is in use: a socket under repair is not compared with others (3.5). A
/// clash of whole connections is still found, by connect().
fn bind_past_listeners(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    const REPAIR_ON: i32 = 1;
    // Without a window probe; there is no window yet (4.19).
    const REPAIR_OFF: i32 = -1;
    set(
        socket.as_fd(),
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR,
        REPAIR_ON,
    )?;
    let bound = socket.bind(&addr.into());
    set(
        socket.as_fd(),
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR,
        REPAIR_OFF,
    )?;
    // The end of repair has taken it away.
    socket.set_reuse_address(true)?;
    bound
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use super::*;
    use crate::lab::alone;

    #[test]
    fn a_listener_is_transparent_on_loopback_and_nonblocking() {
        alone(listeners);
    }

    fn listeners() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let listener = transparent_listener(addr.parse().unwrap(), 16).unwrap();
            assert!(listener.local_addr().unwrap().ip().is_loopback());
            let error = listener.accept().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            let reuse_port: i32 =
                get(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT).unwrap();
            assert_eq!(reuse_port, 0);
        }
    }

    #[test]
    fn tcp_info_counts_payload() {
        alone(payload);
    }

    fn payload() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[7; 1000]).unwrap();
        let mut data = [0; 1000];
        server.read_exact(&mut data).unwrap();
        let info = tcp_info(server.as_fd()).unwrap();
        assert_eq!((info.state, info.bytes_received), (1, 1000));
    }

    #[test]
    fn cookies_differ_between_sockets_and_agree_within_a_namespace() {
        let a = TcpListener::bind("127.0.0.1:0").unwrap();
        let b = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_ne!(cookie(a.as_fd()).unwrap(), cookie(b.as_fd()).unwrap());
        assert_eq!(
            netns_cookie(a.as_fd()).unwrap(),
            netns_cookie(b.as_fd()).unwrap()
        );
    }

    #[test]
    fn a_clients_port_may_be_one_that_an_application_listens_on() {
        let application = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = application.local_addr().unwrap().port();
        let client = SocketAddr::from(([10, 244, 7, 10], port));
        let plain = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        set_transparent(plain.as_fd(), &client).unwrap();
        let refused = plain.bind(&client.into()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);

        let socket = on_behalf_of(client, 0x006d_0000).unwrap();
        assert_eq!(socket.local_addr().unwrap().as_socket(), Some(client));
        assert!(socket.reuse_address().unwrap());
    }

    #[test]
    fn marks_are_set_and_read() {
        let a = outgoing("127.0.0.1:0".parse().unwrap()).unwrap();
        set_mark(a.as_fd(), 0x004d_0001).unwrap();
        assert_eq!(mark(a.as_fd()).unwrap(), 0x004d_0001);
    }
}
