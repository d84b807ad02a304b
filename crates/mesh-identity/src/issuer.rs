// SPDX-License-Identifier: Apache-2.0
//! Issuers of certificates: one trait, and an implementation for each form of `--ca`.
//!
//! An issuer makes or fetches a certificate when asked. When to ask, what to do when it fails,
//! and whether what it gave may be used, is not its business.

use std::{future::Future, io, path::PathBuf, pin::Pin, sync::Arc};

use rustls::{pki_types::CertificateDer, sign::SigningKey};

use super::{Clock, Refusal, SpiffeId, key::KeyError};

mod files;
pub(super) mod grpc;
mod self_signed;

pub use self::grpc::GrpcCa;
#[cfg(any(test, fuzzing))]
pub(super) use self::grpc::split;
pub use self::grpc::wire;
pub(super) use self::{files::Files, grpc::Grpc, self_signed::SelfSigned};

/// The lifetime of certificates that `self:` signs, and that other issuers are asked for.
pub(super) const VALIDITY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// The issuer, as in the value of `--ca`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ca {
    /// `self:DIR`: a CA of this node's own in this directory, for demos and tests.
    SelfSigned(PathBuf),
    /// `files:DIR`: `DIR/NAMESPACE/SERVICEACCOUNT/{tls.crt,tls.key,ca.crt}`, written by others.
    Files(PathBuf),
    /// `grpc:URL`: Istio's certificate service.
    Grpc(GrpcCa),
}

impl Ca {
    /// Makes the issuer ready.
    pub(super) async fn open(&self, clock: &Clock) -> Result<Arc<dyn Issuer>, IssueError> {
        Ok(match self {
            Self::SelfSigned(dir) => Arc::new(SelfSigned::open(dir, clock.clone()).await?),
            Self::Files(dir) => Arc::new(Files::new(dir.clone())),
            Self::Grpc(ca) => Arc::new(Grpc::new(ca.clone())?),
        })
    }
}

/// The response of an issuer. It is not trusted: it is verified before use.
pub(super) struct Issued {
    /// The leaf first, then what is between it and a root.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Arc<dyn SigningKey>,
    /// All roots that peers may have.
    pub(super) roots: Vec<CertificateDer<'static>>,
    pub(super) version: Version,
}

/// Tells one state of an issuer's sources from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version(pub(super) u64);

pub(super) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Makes or fetches certificates.
pub(super) trait Issuer: Send + Sync {
    /// A certificate for `id`, as new as can be had.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>>;

    /// Ends when asking again would give something else than `seen` because the issuer's
    /// sources changed. Cancel safe.
    fn changed<'a>(&'a self, _id: &'a SpiffeId, _seen: Version) -> BoxFuture<'a, ()> {
        Box::pin(std::future::pending())
    }

    /// Whether asking gives a new certificate. If not, it is asked only after `changed`.
    fn renews(&self) -> bool {
        true
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// A file cannot be read or written.
    #[error("cannot {op} {}", .path.display())]
    File {
        /// The operation that failed.
        op: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not PEM of what is needed.
    #[error("{} has no {what} in PEM", .path.display())]
    Pem {
        /// The missing part.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Others than its owner can read a CA key.
    #[error("{} can be read by others than its owner: make its mode 600", .path.display())]
    Exposed {
        /// The key's file.
        path: PathBuf,
    },
    /// A private key is of no use.
    #[error("private key: {0}")]
    Key(#[from] KeyError),
    /// A private key of a kind that TLS cannot use.
    #[error("private key: {0}")]
    KeyKind(rustls::Error),
    /// A certificate or request could not be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// The issuer gave no certificate.
    #[error("the issuer gave no certificate")]
    Empty,
    /// The issuer gave a certificate that every peer would refuse.
    #[error("peers would refuse what the issuer gave: as {label}", label = .0.label())]
    Useless(#[from] Refusal),
    /// The issuer gave somebody else's certificate.
    #[error("the issuer gave a certificate of {0}")]
    OtherIdentity(SpiffeId),
    /// Key and certificate do not belong together.
    #[error("key and certificate do not belong together")]
    OtherKey(#[source] rustls::Error),
    /// The CA's address cannot be used, or it cannot be connected to.
    #[error("cannot connect to the CA")]
    Connect(#[source] tonic::transport::Error),
    /// The CA refused.
    #[error("the CA answered {code:?}: {why}")]
    Refused {
        /// gRPC's code.
        code: tonic::Code,
        /// The CA's own words, shortened.
        why: String,
    },
    /// The CA's answer is not PEM.
    #[error("the CA's answer is not a chain of certificates in PEM")]
    Answer,
    /// The token cannot be sent.
    #[error("{} has no token", .path.display())]
    Token {
        /// The token's file.
        path: PathBuf,
    },
    /// The issuer did not answer in time.
    #[error("the issuer did not answer in time")]
    Timeout,
}

impl From<webpki::Error> for IssueError {
    fn from(error: webpki::Error) -> Self {
        Self::Useless(error.into())
    }
}
