// SPDX-License-Identifier: Apache-2.0
//! Makes /proc/sys writable in the agent's mount namespace. Container runtimes mount it read-only for unprivileged
//! containers, but the agent sets sysctls in the network namespaces of pods. It needs CAP_SYS_ADMIN. Other mount
//! namespaces are not changed.

use std::ffi::CStr;
use std::io;

const SYSCTLS: &CStr = c"/proc/sys";

/// Remounts /proc/sys writable if it is read-only.
///
/// # Errors
/// EPERM = CAP_SYS_ADMIN is missing; EACCES = an AppArmor profile denies mounts.
pub fn make_writable() -> io::Result<()> {
    // SAFETY: an all-zero statvfs is valid.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is NUL-terminated, and the pointer is valid for writes of a statvfs.
    if unsafe { libc::statvfs(SYSCTLS.as_ptr(), &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if found.f_flag & libc::ST_RDONLY == 0 {
        return Ok(());
    }
    let flags =
        libc::MS_REMOUNT | libc::MS_BIND | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: the target is NUL-terminated; a bind remount reads nothing else.
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
