// SPDX-License-Identifier: Apache-2.0
//! Pinned links: updates them in place, and removes those whose target no longer exists.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use aya::programs::links::FdLink;

use mesh_sys::bpf;

/// Replaces the program of the link that is pinned at `path`. `false` = no link is pinned there, or its target no
/// longer exists; the pin is removed then.
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

/// Pins a link, so that it no longer depends on this process.
pub(super) fn pin(link: FdLink, path: &Path) -> io::Result<()> {
    link.pin(path).map(drop).map_err(io::Error::other)
}

/// Removes a pin, and the attachment with its last reference. A missing pin is not an error.
pub(super) fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}
