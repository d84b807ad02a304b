// SPDX-License-Identifier: Apache-2.0
//! The cluster's controller: its CA, and the status of policies.
//!
//! ```text
//! Secret -> authority -> (leaf of a CSR) -> service <- caller (TokenReview), workloads (pods)
//! MeshNodes, policies -> status (the leader only) -> conditions
//! ```
//! Every replica signs; only the one that holds the lease writes: the Secret, the ConfigMap with the
//! roots, and status. Without the feature `kubernetes` there is none.

#[cfg(feature = "kubernetes")]
mod authority;
#[cfg(feature = "kubernetes")]
mod caller;
#[cfg(feature = "kubernetes")]
mod fold;
#[cfg(all(feature = "kubernetes", any(test, fuzzing)))]
pub(crate) mod fuzz;
#[cfg(feature = "kubernetes")]
mod keeper;
#[cfg(feature = "kubernetes")]
mod lease;
#[cfg(feature = "kubernetes")]
mod limits;
#[cfg(feature = "kubernetes")]
mod numbers;
#[cfg(feature = "kubernetes")]
mod probes;
#[cfg(feature = "kubernetes")]
mod run;
#[cfg(feature = "kubernetes")]
mod service;
#[cfg(feature = "kubernetes")]
mod sign;
#[cfg(feature = "kubernetes")]
mod status;
#[cfg(feature = "kubernetes")]
mod tls;
#[cfg(feature = "kubernetes")]
mod workloads;

use std::io;

#[cfg(feature = "kubernetes")]
pub use run::{rotate_root, run};

/// Why the controller ended, or never ran.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This build cannot be a controller.
    #[error("this build has no controller: it was made without the feature kubernetes")]
    NotBuilt,
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
            Self::NotBuilt => 69,
            Self::Room(_) => 70,
            Self::Cluster(_) | Self::TrustDomain(_) => 78,
            Self::Api { .. } | Self::Tls(_) | Self::Process { .. } => 1,
        }
    }
}

/// Is the controller until a signal ends it.
///
/// # Errors
/// This build has none.
#[cfg(not(feature = "kubernetes"))]
pub fn run(_: crate::config::ControllerConfig) -> Result<(), Error> {
    Err(Error::NotBuilt)
}

/// Has the controllers replace the root of the CA.
///
/// # Errors
/// This build has none.
#[cfg(not(feature = "kubernetes"))]
pub fn rotate_root(_: &crate::config::ControllerConfig) -> Result<String, Error> {
    Err(Error::NotBuilt)
}
