// SPDX-License-Identifier: Apache-2.0
//! System calls that no safe crate offers, one safe function each.
//!
//! This is the only crate with unsafe code outside the kernel programs and their ABI. It does not know
//! what a pod is, keeps no state beyond the descriptors it returns, and makes no decisions.

#![allow(
    unsafe_code,
    reason = "the crate exists for system calls that no safe crate offers"
)]

pub mod bpf;
pub mod clock;
pub mod lab;
pub mod limits;
pub mod memory;
pub mod netlink;
pub mod netns;
pub mod route;
pub mod signals;
pub mod sock_diag;
pub mod socket;
pub mod sysctls;
pub mod testbed;
pub mod thread;
