// SPDX-License-Identifier: Apache-2.0
//! A certificate of this node's workload, validated before use.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::sign::CertifiedKey;
use webpki::KeyUsage;

use super::{
    SpiffeId,
    clock::unix_time,
    issuer::{IssueError, Issued},
    revocation::Revoked,
    verify::{Bundle, Leaf, Rules},
};

/// A certificate of a workload of this node, with its private key.
pub struct Certificate {
    id: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    pub(super) roots: Arc<Bundle>,
    pub(super) key: Arc<CertifiedKey>,
}

impl Certificate {
    /// Validates an issued certificate as a peer that trusts the issuer's roots would.
    pub(super) fn check(
        id: &SpiffeId,
        issued: Issued,
        (mut rules, revoked): (Rules, Arc<Revoked>),
        now: SystemTime,
    ) -> Result<Self, IssueError> {
        let Issued {
            chain,
            key,
            roots,
            version: _,
        } = issued;
        let (roots, _unreadable) = Bundle::new(roots);
        rules.bundle = Arc::new(roots.with(revoked));
        let (leaf, above) = chain.split_first().ok_or(IssueError::Empty)?;
        let now = unix_time(now);
        rules.prove(leaf, above, now, KeyUsage::client_auth())?;
        let leaf = rules.prove(leaf, above, now, KeyUsage::server_auth())?;
        let Leaf {
            id: proven,
            not_before,
            not_after,
        } = leaf;
        if proven != *id {
            return Err(IssueError::OtherIdentity(proven));
        }
        let key = CertifiedKey::new(chain, key);
        key.keys_match().map_err(IssueError::OtherKey)?;
        Ok(Self {
            id: proven,
            not_before,
            not_after,
            roots: rules.bundle,
            key: Arc::new(key),
        })
    }

    /// Returns the identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Returns the leaf certificate, in DER.
    #[must_use]
    pub fn leaf(&self) -> &rustls::pki_types::CertificateDer<'static> {
        &self.key.cert[0]
    }

    /// Returns the start of the validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Returns the expiry.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            id,
            not_before,
            not_after,
            roots,
            key: _,
        } = self;
        f.debug_struct("Certificate")
            .field("id", &format_args!("{id}"))
            .field("not_before", not_before)
            .field("not_after", not_after)
            .field("roots", roots)
            .finish_non_exhaustive()
    }
}
