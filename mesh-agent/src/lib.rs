// SPDX-License-Identifier: Apache-2.0
//! The node agent.
//!
//! The modules are listed in the order of the data flow: snapshot of the cluster, plan, kernel,
//! connections, records. Only `agent` knows all of them.

// A line between them keeps rustfmt from sorting them.
pub mod config;

pub mod agent;

pub mod source;

pub mod control;

pub mod pods;

pub mod cni;

pub mod datapath;

pub mod identity;

pub mod proxy;

pub mod admin;

pub mod check;

pub mod cleanup;

pub mod controller;

pub mod uninstall;

pub mod logging;

pub mod shutdown;

pub mod sys;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;

#[cfg(test)]
mod testing;
