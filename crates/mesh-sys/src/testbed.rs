// SPDX-License-Identifier: Apache-2.0
//! System calls that only the test bed makes: namespaces, mounts, credentials and packet sockets.

pub mod packet;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// User and group of the unprivileged `nobody` account on Debian.
pub const NOBODY: u32 = 65534;

/// `CAP_NET_RAW` of `linux/capability.h`.
const CAP_NET_RAW: libc::c_ulong = 13;

/// Upper bound of capability numbers in the kernel's 64-bit sets.
const CAP_MAX: libc::c_ulong = 63;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Moves the calling thread into the network namespace behind `ns`.
///
/// # Errors
/// Whatever `setns` reports, e.g. EPERM without CAP_SYS_ADMIN.
pub fn enter_netns(ns: impl AsFd) -> io::Result<()> {
    // SAFETY: the fd is valid for the duration of the call; setns changes only this thread.
    check(unsafe { libc::setns(ns.as_fd().as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Gives the calling thread a new, empty network namespace.
///
/// # Errors
/// Whatever `unshare` reports.
pub fn new_netns() -> io::Result<()> {
    // SAFETY: unshare(CLONE_NEWNET) takes no pointers and changes only this thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

fn mount(source: &Path, target: &Path, kind: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (source, target) = (c_path(source)?, c_path(target)?);
    let kind = CString::new(kind).map_err(io::Error::other)?;
    // SAFETY: all strings are NUL-terminated and live until the call returns; data may be null.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    })
    .map(drop)
}

/// Bind-mounts `source` on `target`.
///
/// # Errors
/// Whatever `mount` reports.
pub fn mount_bind(source: &Path, target: &Path) -> io::Result<()> {
    mount(source, target, "none", libc::MS_BIND)
}

/// Bind-mounts a directory with everything mounted below it on itself.
///
/// # Errors
/// Whatever `mount` reports.
pub fn mount_self(target: &Path) -> io::Result<()> {
    mount(target, target, "none", libc::MS_BIND | libc::MS_REC)
}

/// Makes the mount at `target` shared; EINVAL if `target` is not a mount point.
///
/// # Errors
/// Whatever `mount` reports.
pub fn make_shared(target: &Path) -> io::Result<()> {
    mount(
        Path::new(""),
        target,
        "none",
        libc::MS_SHARED | libc::MS_REC,
    )
}

/// Mounts a new BPF file system on `target`.
///
/// # Errors
/// Whatever `mount` reports.
pub fn mount_bpffs(target: &Path) -> io::Result<()> {
    mount(Path::new("bpf"), target, "bpf", 0)
}

/// Detaches the topmost mount at `target`.
///
/// # Errors
/// EINVAL if nothing is mounted there.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: the path is NUL-terminated and lives until the call returns.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) })
        .map(drop)
}

/// Takes an exclusive advisory lock that lasts as long as `file` is open.
///
/// # Errors
/// Whatever `flock` reports.
pub fn lock(file: &File) -> io::Result<()> {
    // SAFETY: the fd is valid for the duration of the call.
    check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }).map(drop)
}

/// Waits until the process ends; false if `timeout` passed first. Does not reap.
///
/// # Errors
/// ESRCH if the process was reaped already.
pub fn wait_exit(pid: u32, timeout: Duration) -> io::Result<bool> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(i32::try_from(fd).map_err(io::Error::other)?)?;
    // SAFETY: the kernel has just returned this descriptor to us, nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    poll_readable(&fd, timeout)
}

/// Waits until `fd` is readable; false if `timeout` passed first.
///
/// # Errors
/// Whatever `poll` reports, but never EINTR.
pub fn poll_readable(fd: impl AsFd, timeout: Duration) -> io::Result<bool> {
    poll_any(&[fd.as_fd()], timeout).map(|ready| ready[0])
}

/// Waits until one of `fds` is readable or closed and tells which; all false after `timeout`.
///
/// # Errors
/// Whatever `poll` reports, but never EINTR.
pub fn poll_any(fds: &[std::os::fd::BorrowedFd<'_>], timeout: Duration) -> io::Result<Vec<bool>> {
    let until = std::time::Instant::now() + timeout;
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let count = libc::nfds_t::try_from(polled.len()).map_err(io::Error::other)?;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let millis = i32::try_from(left.as_millis().div_ceil(1)).unwrap_or(i32::MAX);
        // SAFETY: the pointer and length describe a live, exclusively borrowed array.
        match check(unsafe { libc::poll(polled.as_mut_ptr(), count, millis) }) {
            Ok(_) => return Ok(polled.iter().map(|p| p.revents != 0).collect()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sends a signal to one process.
///
/// # Errors
/// ESRCH if it no longer exists.
pub fn signal(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: kill takes two integers; the pid is positive, so no group is meant.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// The effective user of this process.
#[must_use]
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

/// With which rights a started program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rights {
    /// As the harness itself: root with everything.
    #[default]
    Root,
    /// User and group `nobody`, no capability, none to be gained.
    Nobody,
    /// User and group given by number, no supplementary groups.
    User(u32, u32),
    /// Root without capabilities except CAP_NET_RAW, as in a container that drops the others.
    NetRawOnly,
}

/// The namespaces and cgroup in which a program is started.
#[derive(Debug)]
pub struct Placement {
    /// The network namespace.
    pub netns: OwnedFd,
    /// An open `cgroup.procs`, or none to stay where the harness is.
    pub cgroup_procs: Option<OwnedFd>,
    /// Its rights, taken on last.
    pub rights: Rights,
}

/// Makes `command` start in its own session, in `place`.
pub fn place(command: &mut Command, place: Placement) {
    let enter = move || {
        // SAFETY: setsid has no arguments; failing (already a leader) does no harm.
        let _session = unsafe { libc::setsid() };
        if let Some(procs) = &place.cgroup_procs {
            // SAFETY: writes one byte from a static buffer; "0" means the calling process.
            let written = unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) };
            if written != 1 {
                return Err(io::Error::last_os_error());
            }
        }
        enter_netns(&place.netns)?;
        take_rights(place.rights)
    };
    // SAFETY: between fork and exec the closure only makes system calls and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

fn take_rights(rights: Rights) -> io::Result<()> {
    match rights {
        Rights::Root => Ok(()),
        Rights::Nobody => {
            // SAFETY: prctl with these arguments takes integers only.
            check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
            become_user(NOBODY, NOBODY)
        }
        Rights::User(user, group) => become_user(user, group),
        Rights::NetRawOnly => {
            for cap in (0..=CAP_MAX).filter(|cap| *cap != CAP_NET_RAW) {
                // SAFETY: prctl with these arguments takes integers only. EINVAL: no such cap.
                let _dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) };
            }
            // SAFETY: as above; 0 = the capability is not in the bounding set.
            if unsafe { libc::prctl(libc::PR_CAPBSET_READ, 21, 0, 0, 0) } != 0 {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            Ok(())
        }
    }
}

fn become_user(user: u32, group: u32) -> io::Result<()> {
    // SAFETY: an empty list needs no pointer; setgid and setuid take integers.
    check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: as above.
    check(unsafe { libc::setgid(group) })?;
    // SAFETY: as above.
    check(unsafe { libc::setuid(user) }).map(drop)
}

/// Sets an integer socket option.
///
/// # Errors
/// Whatever `setsockopt` reports.
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<i32>()).map_err(io::Error::other)?;
    // SAFETY: pointer and length describe a live i32.
    check(unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            len,
        )
    })
    .map(drop)
}

/// `SO_NETNS_COOKIE` (5.14) of the namespace in which `socket` was made.
///
/// # Errors
/// Whatever `getsockopt` reports.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let mut cookie = 0_u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: pointer and length describe a live, exclusively borrowed u64.
    check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    })?;
    Ok(cookie)
}

/// `sendto` with flags; connects the socket where `MSG_FASTOPEN` is among them.
///
/// # Errors
/// Whatever `sendto` reports.
pub fn send_to(
    socket: impl AsFd,
    data: &[u8],
    flags: i32,
    to: &socket2::SockAddr,
) -> io::Result<usize> {
    // SAFETY: data and address are live for the call, with their own lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_fd().as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            flags,
            to.as_ptr().cast(),
            to.len(),
        )
    };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}

/// Binds the calling thread to one CPU.
///
/// # Errors
/// EINVAL if there is no such CPU.
pub fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is the valid empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET bounds-checks the index by slice access on a live set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: pointer and length describe a live set; 0 = the calling thread.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) })
        .map(drop)
}

/// The signals by which a user or a supervisor ends a program.
fn interrupts() -> libc::sigset_t {
    // SAFETY: all-zero is a valid sigset_t, and emptied properly on the next line.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is live and exclusively borrowed; these calls cannot fail for valid signals.
    unsafe {
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
    }
    set
}

/// Holds back SIGINT, SIGTERM and SIGHUP from this thread and those it starts from now on.
/// Started programs are not concerned: std gives them an empty mask.
///
/// # Errors
/// Cannot fail for these signals.
pub fn block_interrupts() -> io::Result<()> {
    let set = interrupts();
    // SAFETY: the set is live; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Waits for one of the signals that [`block_interrupts`] holds back, and gives its number.
///
/// # Errors
/// Cannot fail for these signals.
pub fn wait_for_interrupt() -> io::Result<i32> {
    let (set, mut signal) = (interrupts(), 0);
    // SAFETY: both pointers are to live variables.
    match unsafe { libc::sigwait(&raw const set, &raw mut signal) } {
        0 => Ok(signal),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}
