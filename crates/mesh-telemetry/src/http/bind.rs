// SPDX-License-Identifier: Apache-2.0
//! Sockets that a predecessor may still hold.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, UnixListener};

const BACKLOG: i32 = 128;

/// Listens on an address; an unspecified IPv6 address becomes IPv4 on a host without IPv6.
pub(super) fn tcp_or_ipv4(addr: SocketAddr) -> io::Result<TcpListener> {
    tcp(addr).or_else(|error| match addr.ip() {
        IpAddr::V6(ip) if ip.is_unspecified() && no_ipv6(&error) => {
            tcp(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port()))
        }
        IpAddr::V6(_) | IpAddr::V4(_) => Err(error),
    })
}

fn tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // The predecessor serves until we do. Safe in the host's namespace only: in a pod, its root could
    // join the group.
    socket.set_reuse_port(true)?;
    if addr.is_ipv6() && addr.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Tells whether the host has no IPv6 at all.
fn no_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

/// Listens on a Unix socket that only root may connect to, and replaces an older one in one step.
pub(super) fn unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = beside(path);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(&new)?)?;
    // Before it listens nobody can connect, whatever the umask.
    let finished = fs::set_permissions(&new, fs::Permissions::from_mode(0o600))
        .and_then(|()| socket.listen(BACKLOG))
        .and_then(|()| SocketFile::of(&new, path))
        .and_then(|file| fs::rename(&new, path).map(|()| file));
    match finished {
        Ok(file) => Ok((UnixListener::from_std(socket.into())?, file)),
        Err(error) => {
            fs::remove_file(&new)?;
            Err(error)
        }
    }
}

/// The path under which a socket is created before it replaces an older one.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

/// The file of a Unix socket. It is removed on drop unless another socket has replaced it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    fn of(now: &Path, later: &Path) -> io::Result<Self> {
        Ok(Self {
            path: later.to_owned(),
            id: id(now)?,
        })
    }
}

fn id(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if id(&self.path).is_ok_and(|id| id == self.id)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove the Unix socket");
        }
    }
}
