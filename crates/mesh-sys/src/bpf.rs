// SPDX-License-Identifier: Apache-2.0
//! The bpf(2) calls that aya 0.14 has no public function for: links that are updated in place, and
//! map elements through a shared descriptor.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_UPDATE: libc::c_int = 29;

/// `union bpf_attr` of element commands (linux/bpf.h).
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` of batch commands.
#[repr(C)]
struct Batch {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// `union bpf_attr` of BPF_OBJ_GET.
#[repr(C)]
struct ObjectGet {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` of BPF_LINK_UPDATE.
#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// `union bpf_attr` of BPF_PROG_QUERY.
#[repr(C)]
struct Query {
    cgroup: u32,
    hook: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` lives across the call and has the size that is passed; every pointer in
    // it belongs to a slice or string that the caller borrows across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// Opens what is pinned at a path: a map, a program or a link.
///
/// # Errors
/// When nothing is pinned there, or bpffs is not mounted.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = ObjectGet {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut attributes)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The ids of the programs that run for processes of a cgroup at a hook, whose number is an
/// `enum bpf_attach_type` (linux/bpf.h): its own, and those of the cgroups around it.
///
/// # Errors
/// As the kernel says; `ENOSPC` when there are more than 64.
pub fn programs_at(cgroup: BorrowedFd<'_>, hook: u32) -> io::Result<Vec<u32>> {
    const BPF_F_QUERY_EFFECTIVE: u32 = 1;
    let mut ids = [0_u32; 64];
    let mut attributes = Query {
        cgroup: number(cgroup),
        hook,
        flags: BPF_F_QUERY_EFFECTIVE,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: 64,
        pad: 0,
    };
    bpf(BPF_PROG_QUERY, &mut attributes)?;
    let count = usize::try_from(attributes.count).map_err(io::Error::other)?;
    Ok(ids.into_iter().take(count).collect())
}

/// Puts another program behind a link, with no moment in between (5.7).
///
/// # Errors
/// `ENOLINK` when what the link was attached to is gone.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdate {
        link: number(link),
        program: number(program),
        flags: 0,
        old_program: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attributes).map(drop)
}

fn element(map: BorrowedFd<'_>, key: &[u8], value: *const u8) -> Element {
    Element {
        map: number(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value as u64,
        flags: 0,
    }
}

/// Writes an element. The slices must have the map's sizes.
///
/// # Errors
/// `E2BIG` when the map is full.
pub fn put(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    bpf(BPF_MAP_UPDATE_ELEM, &mut element(map, key, value.as_ptr())).map(drop)
}

/// Reads an element into `value`; `false` = there is none. The slices must have the map's sizes.
///
/// # Errors
/// As the kernel says.
pub fn get(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let at = value.as_mut_ptr().cast_const();
    match bpf(BPF_MAP_LOOKUP_ELEM, &mut element(map, key, at)) {
        Ok(_) => Ok(true),
        Err(err) if err.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(err) => Err(err),
    }
}

/// Removes an element; removing what is absent is no error.
///
/// # Errors
/// As the kernel says.
pub fn remove(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    match bpf(
        BPF_MAP_DELETE_ELEM,
        &mut element(map, key, std::ptr::null()),
    ) {
        Err(err) if err.raw_os_error() != Some(libc::ENOENT) => Err(err),
        _ => Ok(()),
    }
}

/// How many elements a hash map has, LRU or not (5.6). `sizes` = bytes of a key and of a value.
/// What comes or goes meanwhile is counted or not.
///
/// # Errors
/// As the kernel says.
pub fn count(map: BorrowedFd<'_>, (key, value): (usize, usize)) -> io::Result<u64> {
    /// More than any bucket of a map of ours holds.
    const MOST: u32 = 4096;
    let room = |size: usize| vec![0_u8; size * MOST as usize];
    let (mut keys, mut values) = (room(key), room(value));
    let (mut from, mut to, mut first) = (0_u32, 0_u32, true);
    let mut total = 0;
    loop {
        let mut attributes = Batch {
            from: match first {
                true => 0,
                false => std::ptr::from_mut(&mut from) as u64,
            },
            to: std::ptr::from_mut(&mut to) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: MOST,
            map: number(map),
            element_flags: 0,
            flags: 0,
        };
        let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes);
        match result {
            Ok(_) => total += u64::from(attributes.count),
            // That was the last part.
            Err(err) if err.raw_os_error() == Some(libc::ENOENT) => {
                return Ok(total + u64::from(attributes.count));
            }
            Err(err) => return Err(err),
        }
        (from, first) = (to, false);
    }
}
