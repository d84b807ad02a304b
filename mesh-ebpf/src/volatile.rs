// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Reads of memory that the kernel provides or changes.

/// Reads a field exactly once and at its own width, as the verifier requires for contexts.
macro_rules! read {
    ($from:expr, $($field:tt)+) => {
        // SAFETY: a field of memory that the kernel handed to this program.
        unsafe { core::ptr::read_volatile(&raw const (*$from).$($field)+) }
    };
}
pub(crate) use read;
