// SPDX-License-Identifier: Apache-2.0
//! Pinned links: updated in place where they live, replaced where what they were attached to is
//! gone.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use aya::programs::links::FdLink;

use mesh_sys::bpf;

/// Puts `program` behind the link that is pinned at `path`. `false` = there is none, or what it was
/// attached to is gone; the pin is removed then.
pub(super) fn update(path: &Path, program: BorrowedFd<'_>) -> io::Result<bool> {
    let link = match bpf::open_pin(path) {
        Ok(link) => link,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(err) => return Err(err),
    };
    match bpf::update_link(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // The cgroup, namespace or interface was removed.
        Err(err) if matches!(err.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV)) => {
            unpin(path)?;
            Ok(false)
        }
        Err(err) => Err(err),
    }
}

/// Pins a link: from now on it lives without this process.
pub(super) fn pin(link: FdLink, path: &Path) -> io::Result<()> {
    link.pin(path).map(drop).map_err(io::Error::other)
}

/// Removes a pin, and with the last reference the attachment. What is absent is no error.
pub(super) fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}
