// SPDX-License-Identifier: Apache-2.0
//! The controller of the mesh: the CA, the status of policies, and the uninstallation.
//!
//! ```text
//! Secret -> ca_store -> authority -> sign (CSR) -> service <- caller (TokenReview), workloads (pods)
//! MeshNodes, policies -> status_aggregation -> status (the leader only)
//! ```
//! Every replica issues certificates. Only the holder of the lease writes the Secret, the ConfigMap
//! with the roots, and status.

#![forbid(unsafe_code)]

mod authority;
mod ca_store;
mod caller;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod lease;
mod limits;
mod metrics;
mod outcome;
mod run;
mod service;
mod sign;
mod status;
mod status_aggregation;
mod tls;
pub mod uninstall;
mod workloads;

use std::io;

pub use run::{rotate_root, run};

/// A failure of the controller.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The Kubernetes API cannot be reached.
    #[error(transparent)]
    Client(#[from] mesh_kube::Error),
    /// The Kubernetes API refused a request.
    #[error("cannot {what}: {why}")]
    Api {
        /// Failed operation.
        what: &'static str,
        /// Message of the API server.
        why: String,
    },
    /// The trust domain is invalid.
    #[error("--trust-domain: invalid trust domain {0:?}")]
    TrustDomain(String),
    /// TLS cannot be configured.
    #[error("cannot configure TLS")]
    Tls(#[from] rustls::Error),
    /// An operation of the operating system failed.
    #[error("cannot {what}")]
    Process {
        /// Failed operation.
        what: String,
        /// Cause.
        source: io::Error,
    },
    /// A task ended that must run as long as the controller.
    #[error("{0} ended unexpectedly")]
    Task(&'static str),
}

impl Error {
    /// Returns the exit code of the process (sysexits.h): 1 failed, 70 internal, 78 configuration.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Task(_) => 70,
            Self::Client(_) | Self::TrustDomain(_) => 78,
            Self::Api { .. } | Self::Tls(_) | Self::Process { .. } => 1,
        }
    }
}
