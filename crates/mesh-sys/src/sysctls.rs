// SPDX-License-Identifier: Apache-2.0
//! /proc/sys of a container that is not privileged is mounted read-only, by whatever runtime. The
//! agent has settings to make in pods' namespaces, and CAP_SYS_ADMIN: it makes its own view of
//! /proc/sys writable. Nobody else's is changed.

use std::ffi::CStr;
use std::io;

const SYSCTLS: &CStr = c"/proc/sys";

/// Makes /proc/sys writable where it is not.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, EACCES below an AppArmor profile that forbids mounts.
pub fn make_writable() -> io::Result<()> {
    // SAFETY: all-zero is a valid statvfs, which the call overwrites.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is NUL-terminated, and the pointer is to a live statvfs.
    if unsafe { libc::statvfs(SYSCTLS.as_ptr(), &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if found.f_flag & libc::ST_RDONLY == 0 {
        return Ok(());
    }
    let flags =
        libc::MS_REMOUNT | libc::MS_BIND | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: the target is NUL-terminated; for a remount of a bind nothing else is read.
    let done = unsafe {
        libc::mount(
            std::ptr::null(),
            SYSCTLS.as_ptr(),
            std::ptr::null(),
            flags,
            std::ptr::null(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
