// SPDX-License-Identifier: Apache-2.0
//! Socket options that the standard library and `socket2` do not offer, and the sockets that the agent creates in
//! a pod's network namespace.

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
    // SAFETY: `value` is valid for writes of `length` bytes, which the kernel does not exceed. It is initialized
    // and only used for integers, for which all bytes are valid.
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
    // SAFETY: `value` is valid for reads of `length` bytes.
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

/// Returns the cookie of a socket's network namespace (Linux 5.14).
///
/// # Errors
/// The kernel is older.
pub fn netns_cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    get(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE)
}

/// Returns the cookie of a socket, which is unique until the next boot.
///
/// # Errors
/// The descriptor is not a socket.
pub fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    get(fd, libc::SOL_SOCKET, SO_COOKIE)
}

/// Allows a socket of the family of `addr` to bind to, and reply from, addresses of other namespaces
/// (`IP_TRANSPARENT`). Needs CAP_NET_ADMIN or CAP_NET_RAW.
///
/// # Errors
/// The capability is missing.
pub fn set_transparent(fd: BorrowedFd<'_>, addr: &SocketAddr) -> io::Result<()> {
    if addr.is_ipv4() {
        set(fd, libc::SOL_IP, libc::IP_TRANSPARENT, 1)
    } else {
        set(fd, libc::SOL_IPV6, IPV6_TRANSPARENT, 1)
    }
}

/// Sets the mark of a socket (`SO_MARK`). Needs CAP_NET_ADMIN or CAP_NET_RAW.
///
/// # Errors
/// The capability is missing.
pub fn set_mark(fd: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())
}

/// Returns the mark of a socket.
///
/// # Errors
/// The descriptor is not a socket.
pub fn mark(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, libc::SOL_SOCKET, libc::SO_MARK)
}

/// Defers the choice of the local port to connect(), which knows the whole 4-tuple, so that bind() to an address
/// reserves no port (`IP_BIND_ADDRESS_NO_PORT`, Linux 4.2).
///
/// # Errors
/// The descriptor is not an IP socket.
pub fn set_bind_address_no_port(fd: BorrowedFd<'_>) -> io::Result<()> {
    set(fd, libc::SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Limits the local ports that the kernel chooses for a socket to the part of `first..=last` that is in the range of
/// the network namespace (`IP_LOCAL_PORT_RANGE`).
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.3: the caller should continue without the limit.
pub fn set_local_port_range(fd: BorrowedFd<'_>, first: u16, last: u16) -> io::Result<()> {
    let range = u32::from(last) << 16 | u32::from(first);
    set(fd, libc::SOL_IP, IP_LOCAL_PORT_RANGE, range.cast_signed())
}

/// Returns the CPU that received the last packet of a connection (`SO_INCOMING_CPU`, Linux 3.19). On loopback, this
/// is the sender's CPU.
///
/// # Errors
/// The descriptor is not a socket.
pub fn incoming_cpu(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get(fd, libc::SOL_SOCKET, libc::SO_INCOMING_CPU)
}

/// Statistics of a TCP connection. Counters are cumulative: use differences for a connection that carries several
/// streams one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// The state (`TCP_ESTABLISHED` = 1 and so on).
    pub state: u8,
    /// The smoothed round-trip time in microseconds.
    pub rtt_us: u32,
    /// The number of retransmitted segments.
    pub retransmits: u32,
    /// The number of payload bytes that the peer acknowledged.
    pub bytes_acked: u64,
    /// The number of payload bytes received.
    pub bytes_received: u64,
}

/// Reads `TCP_INFO`. Fields that an older kernel lacks are 0.
///
/// # Errors
/// The descriptor is not a TCP socket.
pub fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    // Offsets in struct tcp_info (linux/tcp.h), to which fields are only appended.
    const LENGTH: usize = 136;
    let mut raw = [0u8; LENGTH];
    let mut length = libc::socklen_t::try_from(LENGTH).unwrap_or(0);
    // SAFETY: `raw` is valid for writes of `length` bytes, which the kernel does not exceed.
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

/// Creates a nonblocking transparent listener. With a loopback address, it gets only connections that the eBPF
/// programs redirect. It does not set `SO_REUSEPORT`, with which another process could share the port, but
/// `SO_REUSEADDR`, so that it does not block a port for applications.
///
/// # Errors
/// The address cannot be bound, or CAP_NET_ADMIN is missing.
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

/// Creates a nonblocking socket for a connection of the agent, bound to `from` (an address of the pod, port 0 =
/// any). Call it in the pod's network namespace, exempt the socket from the hooks, then connect it. It does not
/// block a port for applications.
///
/// # Errors
/// The address cannot be bound.
pub fn outgoing(from: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(from), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    set_bind_address_no_port(socket.as_fd())?;
    socket.bind(&from.into())?;
    Ok(socket)
}

/// Creates a nonblocking socket for a connection to an application on behalf of a remote client: bound to the
/// client's address and port, which are not local, and to `lo`. Call it in the pod's network namespace, exempt the
/// socket from the hooks, then connect it.
///
/// # Errors
/// The address cannot be bound, or CAP_NET_ADMIN is missing.
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
        // An application listens on the same port without SO_REUSEADDR. This is not a conflict, since the
        // addresses differ.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            bind_past_listeners(&socket, client)?;
        }
        bound => bound?,
    }
    Ok(socket)
}

/// Binds a socket although its port is in use: the kernel skips the conflict check for a socket in repair mode
/// (`TCP_REPAIR`, Linux 3.5). connect() still detects a conflict of whole 4-tuples.
fn bind_past_listeners(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    const REPAIR_ON: i32 = 1;
    // Leaves repair mode without a window probe, since there is no window yet (Linux 4.19).
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
    // Leaving repair mode clears the option.
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
    fn listener_is_transparent_and_nonblocking() {
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
    fn client_port_can_equal_a_listening_port() {
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
