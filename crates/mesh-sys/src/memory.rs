// SPDX-License-Identifier: Apache-2.0
//! Settings of the C library's allocator, so that memory which is needed for a moment goes back to the
//! kernel.

/// The size from which on an allocation is a mapping of its own, which goes back to the kernel when it is
/// freed. The allocator would raise it to the size of what is freed (mallopt(3)): answers of the API
/// server, some MB each, would then leave holes in the heap.
const MAPPED: libc::c_int = 256 << 10;
/// The number of heaps of the allocator. By default each thread gets its own, and memory that one thread
/// frees is of no use to the others. Each thread still caches small pieces.
const HEAPS: libc::c_int = 1;

/// Configures the allocator. Call it before there are threads.
pub fn configure_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns numbers only.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Returns empty pages of the heap to the kernel. Takes some milliseconds, in which other threads may have
/// to wait for memory.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns numbers only.
    unsafe {
        libc::malloc_trim(0);
    }
}
