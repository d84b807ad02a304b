// SPDX-License-Identifier: Apache-2.0
//! What `compile` and `diff` promise, asked of their results with the very functions that the
//! kernel programs run.

mod addresses;
mod admin;
mod authentication;
mod network_policy;
mod random;
mod service_accounts;
mod services;
mod support;
mod transitions;
