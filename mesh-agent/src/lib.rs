// SPDX-License-Identifier: Apache-2.0
//! The node agent, as rooms with one door each.
//!
//! Listed in the order in which things flow through them: facts in, plan, kernel, connections,
//! records out. A room imports only what it is passed and what the table of ARCHITECTURE.md allows;
//! `agent` alone knows them all.

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

pub mod record;

pub mod flows;

pub mod metrics;

pub mod admin;

pub mod check;

pub mod cleanup;

pub mod controller;

pub mod uninstall;

pub mod logging;

pub mod shutdown;

pub mod sys;

mod backoff;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;

#[cfg(test)]
mod testing;
