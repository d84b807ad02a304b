// SPDX-License-Identifier: Apache-2.0
//! Everything that the mesh's programs report about their work: metrics, flow records, the flow log,
//! and the HTTP server of metrics and probes.
//!
//! ```text
//! connection, kernel event -> record -> flows (log)
//!                                   \-> metrics -> http (/metrics)
//! ```
//! The crate reads the plan and the kernel's counters through closures and traits that the program
//! passes in. It knows neither the agent nor eBPF.

#![forbid(unsafe_code)]

pub mod record;

pub mod flows;

pub mod metrics;

pub mod readiness;

pub mod places;

pub mod http;
