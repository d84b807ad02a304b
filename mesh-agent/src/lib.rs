// SPDX-License-Identifier: Apache-2.0
//! The node agent, as rooms with one door each.
//!
//! Listed in the order in which things flow through them. A room imports only what stands before
//! it, or what is passed to it; `agent` alone knows them all.

pub mod config;
pub mod source;
pub mod control;
pub mod datapath;
pub mod identity;
pub mod pods;
pub mod proxy;
pub mod record;
pub mod flows;
pub mod metrics;
pub mod admin;
pub mod check;
pub mod logging;
pub mod sys;

#[cfg(test)]
mod testing;
