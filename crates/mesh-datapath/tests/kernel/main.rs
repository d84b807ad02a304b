// SPDX-License-Identifier: Apache-2.0
//! Parts of the agent in the kernel's real network namespaces, without the agent as a process.
//!
//! `cargo xtask test` runs these one at a time: they share the machine's kernel and measure time.

mod capture;
mod cluster;
