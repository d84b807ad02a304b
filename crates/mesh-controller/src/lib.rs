// SPDX-License-Identifier: Apache-2.0
//! The cluster's controller: its CA, and the status of policies.
//!
//! ```text
//! Secret -> authority -> (leaf of a CSR) -> service <- caller (TokenReview), workloads (pods)
//! MeshNodes, policies -> status (the leader only) -> conditions
//! ```
//! Every replica signs; only the one that holds the lease writes: the Secret, the ConfigMap with the
//! roots, and status.

#![forbid(unsafe_code)]

mod authority;
mod caller;
mod fold;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod keeper;
mod lease;
mod limits;
mod numbers;
mod probes;
mod run;
mod service;
mod sign;
mod status;
mod tls;
pub mod uninstall;
mod workloads;

use std::io;

pub use run::{rotate_root, run};

/// Why the controller ended, or never ran.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no client of the Kubernetes API.
    #[error(transparent)]
    Client(#[from] mesh_kube::Error),
    /// The Kubernetes API refused what the controller cannot do without.
    #[error("cannot {what}: {why}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// What the API server said.
        why: String,
    },
    /// The trust domain.
    #[error("--trust-domain: invalid trust domain {0:?}")]
    TrustDomain(String),
    /// The TLS library.
    #[error("cannot configure TLS")]
    Tls(#[from] rustls::Error),
    /// Threads, sockets, signals.
    #[error("cannot {what}")]
    Process {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A task ended that runs for as long as the controller does.
    #[error("{0} ended unexpectedly")]
    Task(&'static str),
}

impl Error {
    /// What the process exits with (sysexits.h): 1 failed, 69 a feature is missing, 70 internal, 78
    /// configuration.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Task(_) => 70,
            Self::Client(_) | Self::TrustDomain(_) => 78,
            Self::Api { .. } | Self::Tls(_) | Self::Process { .. } => 1,
        }
    }
}
