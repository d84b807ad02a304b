// SPDX-License-Identifier: Apache-2.0
//! Tests parts of the agent in real network namespaces, without an agent process.
//!
//! `cargo xtask test` runs these one at a time: they share the machine's kernel and measure time.

mod capture;
mod cluster;
