// SPDX-License-Identifier: Apache-2.0
//! Cluster facts to desired kernel state, as values: no async, no clock, no I/O.
//!
//! [`compile()`] turns a [`cluster::Cluster`] into the [`plan::Plan`] of one node;
//! [`diff::diff`] turns two plans into ordered operations on maps. Both are pure: the same facts
//! give the same plan in any order and on any node.

pub mod authentication;
pub mod cluster;
pub mod compile;
pub mod diff;
pub mod evaluate;
pub mod explain;
pub mod modes;
pub mod plan;
pub mod shared;
pub mod text;

mod digest;
mod identities;
mod peers;
mod policies;
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

pub use cluster::{Cluster, Rejection};
pub use compile::{Compiler, compile};
pub use diff::diff;
pub use plan::{MapOp, Plan};
