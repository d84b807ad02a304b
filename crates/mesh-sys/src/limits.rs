// SPDX-License-Identifier: Apache-2.0
//! Resource limits of this process.

use std::io;

/// Raises the soft limit of open file descriptors to the hard limit, and returns it.
///
/// # Errors
/// The system call failed.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid for writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is valid and only read.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

/// Protects the memory of this process, which contains private keys, from core dumps and from unprivileged
/// processes of the same user (`PR_SET_DUMPABLE`).
///
/// # Errors
/// The system call failed.
pub fn forbid_dumps() -> io::Result<()> {
    let no: libc::c_ulong = 0;
    // SAFETY: the call has no pointer arguments.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, no, no, no, no) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
