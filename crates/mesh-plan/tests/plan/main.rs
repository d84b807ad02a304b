// SPDX-License-Identifier: Apache-2.0
//! Properties of `compile` and `diff`, checked with the same decision functions that the kernel programs
//! run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that meets what it does not expect has failed"
)]

mod addresses;
mod admin;
mod authentication;
mod explanations;
mod network_policy;
mod random;
mod service_accounts;
mod services;
mod support;
mod texts;
mod transitions;
