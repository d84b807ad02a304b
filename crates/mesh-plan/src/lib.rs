// SPDX-License-Identifier: Apache-2.0
//! Compiles a snapshot of a cluster into the desired state of a node's kernel, as values: no async,
//! no clock, no I/O.
//!
//! [`compile()`] turns a [`cluster::ClusterSnapshot`] into the [`plan::Plan`] of one node; [`diff::diff`]
//! turns two plans into ordered operations on maps; an [`Index`] decides connections by a plan. All
//! are pure: equal snapshots give equal plans in any order and on any node.

#![forbid(unsafe_code)]

pub mod authentication;
pub mod cluster;
pub mod compile;
pub mod diff;
pub mod evaluate;
pub mod explain;
pub mod index;
pub mod modes;
pub mod plan;
pub mod shared;
pub mod text;

mod digest;
mod identities;
mod peers;
mod policies;
mod ranges;
mod services;

#[cfg(test)]
extern crate self as mesh_plan;
#[cfg(test)]
#[path = "../tests/plan/random.rs"]
#[allow(dead_code, reason = "the tests beside src use more of it")]
mod random;
#[cfg(test)]
#[path = "../tests/plan/support.rs"]
#[allow(dead_code, reason = "the tests beside src use more of it")]
mod support;
#[cfg(test)]
mod tests;

pub use cluster::{ClusterSnapshot, Rejection};
pub use compile::{Compiler, compile};
pub use diff::diff;
pub use index::Index;
pub use plan::{MapOp, Plan};
