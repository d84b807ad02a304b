// SPDX-License-Identifier: Apache-2.0
//! Settings of the C library's allocator that return memory to the kernel sooner.

/// The size from which an allocation is a separate mapping, which free() returns to the kernel. By default, the
/// allocator raises this threshold to the size of freed mappings (mallopt(3)), and responses of the API server,
/// some MB each, fragment the heap.
const MAPPED: libc::c_int = 256 << 10;
/// The number of arenas of the allocator. By default, each thread has its own, and the other threads cannot use
/// memory that it frees. Each thread still caches small allocations.
const HEAPS: libc::c_int = 1;

/// Configures the allocator. Call it before threads are started.
pub fn configure_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call has no pointer arguments.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Returns unused pages of the heap to the kernel. Takes some milliseconds, during which allocations of other
/// threads can block.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call has no pointer arguments.
    unsafe {
        libc::malloc_trim(0);
    }
}
