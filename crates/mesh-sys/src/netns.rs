// SPDX-License-Identifier: Apache-2.0
//! Opens, identifies and enters network namespaces.
//!
//! A [`NetNs`] keeps its namespace alive. Sockets that are created in [`NetNs::run`] belong to the namespace
//! permanently, whichever thread uses them.

use std::cell::{Cell, OnceCell};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::socket;

const OWN: &str = "/proc/thread-self/ns/net";

thread_local! {
    /// The original network namespace of this thread, opened when the thread first leaves it.
    static HOME: OnceCell<OwnedFd> = const { OnceCell::new() };
    /// The current network namespace of this thread, if not the original one. Valid while the `run` that set it is
    /// on the stack.
    static INSIDE: Cell<Option<RawFd>> = const { Cell::new(None) };
}

/// The identity of a namespace while it exists: device and inode of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetNsId {
    device: u64,
    inode: u64,
}

impl NetNsId {
    /// Returns the identity of the namespace with this file.
    ///
    /// # Errors
    /// The file does not exist.
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
    /// Opens a namespace by its file, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// The file does not exist, or is not a network namespace.
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

    /// Opens the current namespace of this thread.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn own() -> io::Result<Self> {
        Self::open(Path::new(OWN))
    }

    /// Creates a namespace without a name, which is removed with its last descriptor. Its `lo` is down.
    ///
    /// # Errors
    /// CAP_SYS_ADMIN is missing.
    pub fn fresh() -> io::Result<Self> {
        let made = std::thread::Builder::new().spawn(|| {
            // SAFETY: unshare() changes only this thread, which exits at once.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Self::own()
        })?;
        made.join()
            .unwrap_or_else(|_panic| Err(io::Error::other("the thread panicked")))
    }

    /// Returns the identity of the namespace.
    #[must_use]
    pub const fn id(&self) -> NetNsId {
        self.id
    }

    /// Returns the cookie (`SO_NETNS_COOKIE`, Linux 5.14), which is unique until the next boot, and by which eBPF
    /// programs identify the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel is older.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(|| socket::netns_cookie(std::net::UdpSocket::bind("0.0.0.0:0")?.as_fd()))?
    }

    /// Runs `f` on this thread in the namespace, then returns the thread to its previous namespace; aborts the process
    /// if that fails. `f` must not await or spawn threads. Calls can be nested.
    ///
    /// # Errors
    /// The namespace cannot be entered; `f` is not run.
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

/// A guard that returns the thread to its previous namespace, also if `f` panics.
struct Back {
    fd: RawFd,
    inside: Option<RawFd>,
}

impl Drop for Back {
    fn drop(&mut self) {
        INSIDE.set(self.inside);
        if enter(self.fd).is_err() {
            // All later sockets of the thread would be in the wrong namespace.
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
    // SAFETY: setns() changes only this thread and accesses no memory; an invalid descriptor is an error.
    if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the type of a namespace file as its clone flag; `None` = not a namespace file.
fn kind(fd: BorrowedFd<'_>) -> Option<i32> {
    // NS_GET_NSTYPE: _IO(0xb7, 3) in linux/nsfs.h, Linux 4.11.
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: this request has no argument and writes no memory.
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
    fn run_restores_the_namespace_also_when_nested_and_after_a_panic() {
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
    fn socket_stays_in_the_namespace_of_its_creation() {
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
    fn other_files_are_rejected() {
        assert!(NetNs::open(Path::new("/proc/self/status")).is_err());
        assert!(NetNs::open(Path::new("/proc/self/ns/mnt")).is_err());
        assert!(NetNs::open(Path::new("/run/netns/no-such")).is_err());
    }
}
