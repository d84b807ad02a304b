// SPDX-License-Identifier: Apache-2.0
//! The bpf(2) calls for which aya 0.14 has no public function: in-place link updates, and access to map elements
//! through a shared descriptor.

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
    // SAFETY: `attributes` is valid for the size that is passed; all pointers in it refer to slices or strings
    // that the caller borrows during the call.
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

/// Opens the map, program or link that is pinned at a path.
///
/// # Errors
/// Nothing is pinned there, or bpffs is not mounted.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = ObjectGet {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut attributes)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns the ids of the programs that run for processes of a cgroup at an `enum bpf_attach_type` (linux/bpf.h),
/// including those of its ancestors.
///
/// # Errors
/// The system call failed; `ENOSPC` = more than 64 programs.
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

/// Replaces the program of a link atomically (Linux 5.7).
///
/// # Errors
/// `ENOLINK` = the target of the link no longer exists.
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

/// Writes an element. The slices must have the key and value sizes of the map.
///
/// # Errors
/// `E2BIG` = the map is full.
pub fn put(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    bpf(BPF_MAP_UPDATE_ELEM, &mut element(map, key, value.as_ptr())).map(drop)
}

/// Reads an element into `value`; `false` = not found. The slices must have the key and value sizes of the map.
///
/// # Errors
/// The system call failed.
pub fn get(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let at = value.as_mut_ptr().cast_const();
    match bpf(BPF_MAP_LOOKUP_ELEM, &mut element(map, key, at)) {
        Ok(_) => Ok(true),
        Err(err) if err.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(err) => Err(err),
    }
}

/// Removes an element. A missing element is not an error.
///
/// # Errors
/// The system call failed.
pub fn remove(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    match bpf(
        BPF_MAP_DELETE_ELEM,
        &mut element(map, key, std::ptr::null()),
    ) {
        Err(err) if err.raw_os_error() != Some(libc::ENOENT) => Err(err),
        _ => Ok(()),
    }
}

/// Counts the elements of a hash map or LRU hash map (Linux 5.6). `sizes` are the sizes of a key and of a value.
/// Elements that are added or removed meanwhile may or may not be counted.
///
/// # Errors
/// The system call failed.
pub fn count(map: BorrowedFd<'_>, (key, value): (usize, usize)) -> io::Result<u64> {
    /// The elements in one batch: more than one bucket of the agent's maps holds.
    const MOST: u32 = 4096;
    let buffer = |size: usize| vec![0_u8; size * MOST as usize];
    let (mut keys, mut values) = (buffer(key), buffer(value));
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
            // This was the last batch.
            Err(err) if err.raw_os_error() == Some(libc::ENOENT) => {
                return Ok(total + u64::from(attributes.count));
            }
            Err(err) => return Err(err),
        }
        (from, first) = (to, false);
    }
}
