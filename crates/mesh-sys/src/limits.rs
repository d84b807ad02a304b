// SPDX-License-Identifier: Apache-2.0
//! Resource limits of this process.

use std::io;

/// Raises the soft limit of open descriptors to the hard limit, and returns it.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the kernel to write to.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid limit, read only.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

/// Keeps this process's memory, in which private keys are, out of core dumps, and from other
/// processes of its user that have no right of their own to trace it.
///
/// # Errors
/// When the kernel refuses.
pub fn forbid_dumps() -> io::Result<()> {
    let no: libc::c_ulong = 0;
    // SAFETY: takes and returns numbers only.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, no, no, no, no) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
