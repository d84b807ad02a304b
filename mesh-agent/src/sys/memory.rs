// SPDX-License-Identifier: Apache-2.0
//! The C library's allocator, so that what is only needed for a moment does not stay with the agent.

/// From this size on an allocation is a mapping of its own, which goes back to the kernel at once. The
/// allocator would raise this by itself to the size of what is freed (mallopt(3)): answers of the API
/// server, of some MB each, would then leave holes between what is kept.
const MAPPED: libc::c_int = 256 << 10;
/// Heaps of the allocator. It would give each thread its own, and what one thread frees in its own is of
/// no use to the others; each thread still keeps what it frees in small pieces for itself.
const HEAPS: libc::c_int = 1;

/// To be called before there are threads.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns numbers only.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Gives whole pages that hold nothing back to the kernel. Takes some milliseconds, in which other
/// threads may have to wait for memory.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns numbers only.
    unsafe {
        libc::malloc_trim(0);
    }
}
