// SPDX-License-Identifier: Apache-2.0
//! The cluster's controller: its CA, and the status of policies.
//!
//! ```text
//! Secret -> authority -> (leaf of a CSR) -> service <- caller (TokenReview), workloads (pods)
//! MeshNodes, policies -> status (the leader only) -> conditions
//! ```
//! Every replica signs; only the one that holds the lease writes: the Secret, the ConfigMap with the
//! roots, and status.

mod authority;
mod caller;
mod fold;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
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
mod workloads;

use std::io;

pub use run::{rotate_root, run};

/// Why the controller ended, or never ran.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The Kubernetes API's address or credentials.
    #[error("cannot tell how to reach the Kubernetes API: {0}")]
    Cluster(String),
    /// The Kubernetes API refused what the controller cannot do without.
    #[error("cannot {what}: {why}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// What the API server said.
        why: String,
    },
    /// The trust domain.
    #[error("--trust-domain {0:?} is no trust domain")]
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
    /// A part ended although nobody wanted it to.
    #[error("{0} ended")]
    Room(&'static str),
}

impl Error {
    /// What the process exits with (sysexits.h): 1 failed, 69 a feature is missing, 70 internal, 78
    /// configuration.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Room(_) => 70,
            Self::Cluster(_) | Self::TrustDomain(_) => 78,
            Self::Api { .. } | Self::Tls(_) | Self::Process { .. } => 1,
        }
    }
}
