// SPDX-License-Identifier: Apache-2.0
//! `files:DIR`: certificates that something else writes, reloaded when they change.
//!
//! `DIR/NAMESPACE/SERVICEACCOUNT/{tls.crt,tls.key,ca.crt}`, as a mounted Secret or cert-manager
//! has them. Every `ca.crt` of the directory is trusted alike: whoever writes one of them
//! decides who is in the trust domain.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::{
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use zeroize::{Zeroize as _, Zeroizing};

use super::{BoxFuture, IssueError, Issued, Issuer, Version};
use crate::SpiffeId;

/// Polling sees what notification misses: symbolic links that are swapped, network mounts.
const POLL: Duration = Duration::from_secs(2);

/// Certificates in files.
#[derive(Debug)]
pub(crate) struct Files {
    dir: PathBuf,
}

/// The three files as they were read.
struct Contents {
    chain: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    roots: Vec<u8>,
}

impl Contents {
    fn version(&self) -> Version {
        let mut hasher = DefaultHasher::new();
        (&self.chain, &*self.key, &self.roots).hash(&mut hasher);
        Version(hasher.finish())
    }
}

impl Files {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    // Neither name can climb: both are checked when an identity is made.
    fn of(&self, id: &SpiffeId) -> PathBuf {
        self.dir.join(id.namespace()).join(id.service_account())
    }

    async fn read(&self, id: &SpiffeId) -> Result<Contents, IssueError> {
        let dir = self.of(id);
        Ok(Contents {
            chain: read(&dir.join("tls.crt")).await?,
            key: Zeroizing::new(read(&dir.join("tls.key")).await?),
            roots: read(&dir.join("ca.crt")).await?,
        })
    }

    async fn load(&self, id: &SpiffeId) -> Result<Issued, IssueError> {
        let contents = self.read(id).await?;
        let dir = self.of(id);
        let without = |what, name| IssueError::Pem {
            what,
            path: dir.join(name),
        };
        let chain =
            certificates(&contents.chain).ok_or_else(|| without("certificate", "tls.crt"))?;
        let roots =
            certificates(&contents.roots).ok_or_else(|| without("certificate", "ca.crt"))?;
        let mut der = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|_none| without("private key", "tls.key"))?;
        let key = any_supported_type(&der);
        der.zeroize();
        let key = key.map_err(IssueError::KeyKind)?;
        Ok(Issued {
            chain,
            key,
            roots,
            version: contents.version(),
        })
    }
}

impl Issuer for Files {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.load(id))
    }

    fn changed<'a>(&'a self, id: &'a SpiffeId, seen: Version) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            loop {
                tokio::time::sleep(POLL).await;
                // What cannot be read now is in the middle of a change: look again.
                if self.read(id).await.is_ok_and(|now| now.version() != seen) {
                    return;
                }
            }
        })
    }

    fn renews(&self) -> bool {
        false
    }
}

pub(super) async fn read(path: &Path) -> Result<Vec<u8>, IssueError> {
    let contents = tokio::fs::read(path).await;
    contents.map_err(|source| IssueError::File {
        op: "read",
        path: path.to_owned(),
        source,
    })
}

/// All certificates of a PEM file; none if there is none, or one that is broken.
pub(super) fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .ok()?;
    (!all.is_empty()).then_some(all)
}
