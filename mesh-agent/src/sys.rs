// SPDX-License-Identifier: Apache-2.0
//! Raw system calls, one safe function each.
//!
//! The only unsafe code of the crate. Nothing here knows what a pod is, keeps state beyond the
//! descriptors it hands out, or decides anything.

#![allow(
    unsafe_code,
    reason = "the room of system calls that no safe crate offers"
)]

pub mod bpf;
pub mod clock;
#[cfg(test)]
pub(crate) mod lab;
pub mod limits;
pub mod memory;
pub mod netlink;
pub mod netns;
pub mod route;
pub mod sock_diag;
pub mod socket;
pub mod sysctls;
pub mod thread;
