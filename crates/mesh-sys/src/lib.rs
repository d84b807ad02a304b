// SPDX-License-Identifier: Apache-2.0
//! Safe functions for system calls that no safe crate offers.
//!
//! This is the only crate with unsafe code except the eBPF programs and their ABI. It does not know pods, keeps no
//! state except the descriptors that it returns, and makes no decisions.

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
