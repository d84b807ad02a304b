// SPDX-License-Identifier: Apache-2.0
//! Network namespaces: open, name, enter and come back.
//!
//! A [`NetNs`] keeps its namespace alive. Sockets made inside [`NetNs::run`] belong to the
//! namespace for as long as they live, whichever thread uses them later.

use std::cell::{Cell, OnceCell};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::socket;

const OWN: &str = "/proc/thread-self/ns/net";

thread_local! {
    /// Where this thread belongs; opened when it first leaves.
    static HOME: OnceCell<OwnedFd> = const { OnceCell::new() };
    /// Where it is now, if not at home: valid while the `run` that wrote it is on the stack.
    static INSIDE: Cell<Option<RawFd>> = const { Cell::new(None) };
}

/// Tells one namespace from another, for as long as either lives: device and inode of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetNsId {
    device: u64,
    inode: u64,
}

impl NetNsId {
    /// Of the namespace whose file this is.
    ///
    /// # Errors
    /// When the file is gone.
    pub fn of(path: &Path) -> io::Result<Self> {
        let data = fs::metadata(path)?;
        Ok(Self {
            device: data.dev(),
            inode: data.ino(),
        })
    }
}

/// An open network namespace.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    id: NetNsId,
}

impl NetNs {
    /// Opens a namespace by its file: `/run/netns/NAME`, `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When the file is not there, or is no network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let data = file.metadata()?;
        let fd = OwnedFd::from(file);
        if kind(fd.as_fd()) != Some(libc::CLONE_NEWNET) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a network namespace",
            ));
        }
        let id = NetNsId {
            device: data.dev(),
            inode: data.ino(),
        };
        Ok(Self { fd, id })
    }

    /// The namespace this thread is in.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn own() -> io::Result<Self> {
        Self::open(Path::new(OWN))
    }

    /// A new namespace without a name: it is gone with the last descriptor. Its `lo` is down.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN.
    pub fn fresh() -> io::Result<Self> {
        let made = std::thread::Builder::new().spawn(|| {
            // SAFETY: unshare() changes this thread only, which ends at once.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Self::own()
        })?;
        made.join()
            .unwrap_or_else(|_panic| Err(io::Error::other("the thread panicked")))
    }

    /// What tells it from others.
    #[must_use]
    pub const fn id(&self) -> NetNsId {
        self.id
    }

    /// Its cookie (`SO_NETNS_COOKIE`, 5.14): never used again on this machine, and what the kernel
    /// programs know it by.
    ///
    /// # Errors
    /// When it cannot be entered, or the kernel is too old.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(|| socket::netns_cookie(std::net::UdpSocket::bind("0.0.0.0:0")?.as_fd()))?
    }

    /// Runs `f` on this thread inside the namespace and comes back; aborts the process if it cannot
    /// come back. `f` must not await and must not spawn; calls may be nested.
    ///
    /// # Errors
    /// When the namespace cannot be entered; `f` was not run then.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let before = match INSIDE.get() {
            Some(fd) => fd,
            None => home()?,
        };
        enter(self.fd.as_raw_fd())?;
        let _back = Back {
            fd: before,
            inside: INSIDE.replace(Some(self.fd.as_raw_fd())),
        };
        Ok(f())
    }
}

impl std::os::fd::AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Brings the thread back, also when `f` panics.
struct Back {
    fd: RawFd,
    inside: Option<RawFd>,
}

impl Drop for Back {
    fn drop(&mut self) {
        INSIDE.set(self.inside);
        if enter(self.fd).is_err() {
            // A thread in a stranger's namespace would make every later socket there.
            std::process::abort();
        }
    }
}

fn home() -> io::Result<RawFd> {
    HOME.with(|cell| {
        if let Some(fd) = cell.get() {
            return Ok(fd.as_raw_fd());
        }
        let fd = OwnedFd::from(File::open(OWN)?);
        Ok(cell.get_or_init(|| fd).as_raw_fd())
    })
}

fn enter(fd: RawFd) -> io::Result<()> {
    // SAFETY: setns() changes this thread only and touches no memory; a stale descriptor is an
    // error.
    if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The kind of a namespace file as its clone flag; `None` = no namespace file.
fn kind(fd: BorrowedFd<'_>) -> Option<i32> {
    // _IO(0xb7, 3) of linux/nsfs.h, 4.11.
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: this request takes no argument and writes nothing.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    (kind >= 0).then_some(kind)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::lab::fresh;

    fn here() -> u64 {
        NetNs::own().unwrap().cookie().unwrap()
    }

    #[test]
    fn run_enters_and_comes_back_also_nested_and_after_a_panic() {
        let (a, b) = (fresh(), fresh());
        let (home, in_a, in_b) = (here(), a.cookie().unwrap(), b.cookie().unwrap());
        assert_ne!(in_a, in_b);
        assert_ne!(in_a, home);
        a.run(|| {
            assert_eq!(here(), in_a);
            b.run(|| assert_eq!(here(), in_b)).unwrap();
            assert_eq!(here(), in_a);
        })
        .unwrap();
        assert_eq!(here(), home);
        let panicked = std::panic::catch_unwind(|| a.run(|| panic!("inside")));
        assert!(panicked.is_err());
        assert_eq!(here(), home);
    }

    #[test]
    fn a_socket_stays_where_it_was_made() {
        let ns = fresh();
        let socket = ns
            .run(|| std::net::UdpSocket::bind("0.0.0.0:0"))
            .unwrap()
            .unwrap();
        let cookie = socket::netns_cookie(socket.as_fd()).unwrap();
        assert_eq!(cookie, ns.cookie().unwrap());
        assert_ne!(cookie, here());
    }

    #[test]
    fn what_is_no_namespace_is_refused() {
        assert!(NetNs::open(Path::new("/proc/self/status")).is_err());
        assert!(NetNs::open(Path::new("/proc/self/ns/mnt")).is_err());
        assert!(NetNs::open(Path::new("/run/netns/no-such")).is_err());
    }
}
