// SPDX-License-Identifier: Apache-2.0
//! Identities of workloads: their certificates, and the TLS configurations of tunnels.
//!
//! ```text
//! wanted ids -> renewal (a task per id) -> issuer -> checked certificate
//!                   |
//!                   v
//!               Snapshot (watch) -> Identities: client(own, expected), server(own), peer(conn)
//! ```
//! Private keys never leave this crate's memory and are never logged. The crate opens no connection
//! between workloads and knows no addresses; it decides which peers are authenticated.

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::Reason;
use rustls::{
    ClientConfig, CommonState, ServerConfig, crypto::CryptoProvider, pki_types::CertificateDer,
};
use tokio::sync::watch;

mod certificate;
mod clock;
mod configs;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod issuer;
mod key;
mod refusal;
mod renewal;
mod revocation;
mod spiffe;
mod tls;
mod verify;

pub use self::{
    certificate::Certificate,
    clock::Clock,
    issuer::{Ca, GrpcCa, IssueError, wire},
    key::KeyError,
    refusal::Refusal,
    revocation::CrlError,
    spiffe::{SpiffeError, SpiffeId, TrustDomain},
    tls::server_name,
    verify::{Bundle, identity_of},
};
use self::{
    configs::ClientConfigs,
    revocation::Revoked,
    verify::{Rules, Skew, Trust},
};

/// The configuration of [`Identities`].
#[derive(Debug, Clone)]
pub struct Config {
    /// The issuer of certificates.
    pub ca: Ca,
    /// The trust domain of all identities.
    pub trust_domain: TrustDomain,
    /// Aliases of the trust domain: an identity in an alias equals the one in the trust domain.
    pub aliases: Vec<TrustDomain>,
    /// Files of certificate revocation lists.
    pub crls: Vec<PathBuf>,
    /// The ALPN name (RFC 7301) of the protocol inside a tunnel. Both sides offer it; a peer that does not
    /// agree on it is refused.
    pub alpn: &'static [u8],
    /// The wall clock.
    pub clock: Clock,
    /// A number that differs between agents, and spreads their renewals and retries.
    pub seed: u64,
}

/// A failure to start, or to return a TLS configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The issuer cannot be used.
    #[error("cannot use the CA")]
    Issuer(#[source] IssueError),
    /// A file of revocation lists cannot be used.
    #[error(transparent)]
    Crl(#[from] CrlError),
    /// The identity has no certificate yet: the issuer has not returned one, or nobody requested it.
    #[error("no certificate for {0} yet")]
    NotReady(SpiffeId),
    /// The certificate has expired, and the issuer has not returned a new one.
    #[error("the certificate of {0} has expired, and the CA has not issued a new one")]
    Expired(SpiffeId),
    /// The identity belongs to another trust domain, so that no peer can prove it.
    #[error("{0} belongs to another trust domain")]
    Foreign(SpiffeId),
    /// The TLS library rejects the configuration.
    #[error("cannot configure TLS")]
    Tls(#[from] rustls::Error),
}

impl Error {
    /// Returns the reason for the record of a connection that fails with this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Issuer(_) | Self::Crl(_) | Self::NotReady(_) | Self::Expired(_) => {
                Reason::NoCertificate
            }
            Self::Foreign(_) => Reason::IdentityRefused,
            Self::Tls(_) => Reason::TlsFailed,
        }
    }
}

/// The version of the certificate and of the roots with which a tunnel was authenticated. New
/// connections must not use a tunnel of an older epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch {
    /// Sequence number of the certificate in this agent.
    pub certificate: u64,
    /// Revision of the bundle.
    pub bundle: u64,
}

/// A certificate in use.
struct Served {
    certificate: Arc<Certificate>,
    server: Arc<ServerConfig>,
    epoch: Epoch,
}

/// All certificates and roots at a point in time.
pub struct Snapshot {
    bundle: Arc<Bundle>,
    served: BTreeMap<SpiffeId, Arc<Served>>,
    revoked: BTreeSet<SpiffeId>,
}

impl Snapshot {
    /// Returns the roots that authenticate peers.
    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.bundle
    }

    /// Returns the epoch of an identity of this node; `None` without a certificate.
    pub fn epoch(&self, own: &SpiffeId) -> Option<Epoch> {
        self.served.get(own).map(|served| served.epoch)
    }

    /// Returns the certificates, sorted by identity.
    pub fn certificates(&self) -> impl Iterator<Item = &Arc<Certificate>> {
        self.served.values().map(|served| &served.certificate)
    }

    /// Tells whether the certificate is in use and revoked.
    pub fn is_revoked(&self, certificate: &Arc<Certificate>) -> bool {
        let id = certificate.id();
        let in_use = |served: &Arc<Served>| Arc::ptr_eq(&served.certificate, certificate);
        self.revoked.contains(id) && self.served.get(id).is_some_and(in_use)
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.certificates()).finish()
    }
}

/// The certificates of this node's workloads. Clones share them.
#[derive(Debug, Clone)]
pub struct Identities(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    now: watch::Receiver<Arc<Snapshot>>,
    clients: ClientConfigs,
    alpn: &'static [u8],
    provider: Arc<CryptoProvider>,
    trust: Trust,
    skew: Arc<Skew>,
    clock: Clock,
}

/// The proof of a peer's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Identity of the peer.
    pub id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Identities {
    /// Opens the issuer, and maintains a certificate for each identity in `wanted` until the sender of
    /// `wanted` is dropped. Returns before the first certificate is issued.
    ///
    /// # Errors
    /// [`Error::Issuer`] when the issuer cannot be used, for example when a directory is not writable.
    /// [`Error::Crl`] when a revocation list cannot be read.
    pub async fn start(
        config: Config,
        wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    ) -> Result<Self, Error> {
        let issuer = config.ca.open(&config.clock).await.map_err(Error::Issuer)?;
        let revoked = revocation::follow(config.crls.clone()).await?;
        Ok(Self::with(issuer, config, wanted, revoked))
    }

    fn with(
        issuer: Arc<dyn issuer::Issuer>,
        config: Config,
        wanted: watch::Receiver<BTreeSet<SpiffeId>>,
        revoked: watch::Receiver<Arc<Revoked>>,
    ) -> Self {
        let Config {
            ca: _,
            crls: _,
            alpn,
            trust_domain,
            aliases,
            clock,
            seed,
        } = config;
        let provider = tls::provider();
        let (bundle, _none) = Bundle::new([]);
        let bundle = Arc::new(bundle);
        let trust = Trust {
            domain: trust_domain,
            aliases: aliases.into(),
        };
        let skew = Arc::new(Skew::default());
        let rules = Rules {
            alpn,
            provider: Arc::clone(&provider),
            trust: trust.clone(),
            bundle: Arc::clone(&bundle),
            skew: Arc::clone(&skew),
        };
        let empty = Snapshot {
            bundle,
            served: BTreeMap::new(),
            revoked: BTreeSet::new(),
        };
        let (writer, now) = watch::channel(Arc::new(empty));
        let spread = clock::Spread(seed);
        let renewer = renewal::Renewer {
            issuer,
            rules,
            clock: clock.clone(),
            spread,
            revoked,
        };
        tokio::spawn(renewal::run(renewer, wanted, writer));
        let clients = ClientConfigs::default();
        Self(Arc::new(Shared {
            now,
            clients,
            alpn,
            provider,
            trust,
            skew,
            clock,
        }))
    }

    /// Returns the latest certificate of an identity of this node.
    pub fn certificate(&self, id: &SpiffeId) -> Option<Arc<Certificate>> {
        let now = self.0.now.borrow();
        now.served
            .get(id)
            .map(|served| Arc::clone(&served.certificate))
    }

    /// Waits until `id` has a certificate; never returns if `id` is not wanted. Cancel safe.
    ///
    /// # Errors
    /// [`Error::NotReady`] when the agent shuts down.
    pub async fn ready(&self, id: &SpiffeId) -> Result<Arc<Certificate>, Error> {
        let mut changes = self.0.now.clone();
        let now = changes.wait_for(|now| now.served.contains_key(id)).await;
        let now = now.map_err(|_ended| Error::NotReady(id.clone()))?;
        let served = now
            .served
            .get(id)
            .ok_or_else(|| Error::NotReady(id.clone()))?;
        Ok(Arc::clone(&served.certificate))
    }

    /// Returns a receiver of each change of a certificate or of the bundle. Compare
    /// [`Snapshot::epoch`].
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.0.now.clone()
    }

    /// Returns the current epoch of an identity of this node; `None` without a valid certificate.
    pub fn epoch(&self, own: &SpiffeId) -> Option<Epoch> {
        self.valid(own).ok().map(|(served, _bundle)| served.epoch)
    }

    /// Returns the expiry of each certificate, sorted by identity, for
    /// `mesh_certificate_expiry_timestamp_seconds`.
    pub fn expiries(&self) -> Vec<(SpiffeId, SystemTime)> {
        let now = self.0.now.borrow();
        now.certificates()
            .map(|c| (c.id().clone(), c.not_after()))
            .collect()
    }

    /// Returns the trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust.domain
    }

    /// Returns the configuration for connecting as `own` to a peer that must prove to be `expected`.
    /// The configuration, with its sessions, stays the same while certificate and bundle do.
    ///
    /// # Errors
    /// When `own` has no valid certificate, or `expected` belongs to another trust domain.
    pub fn client(&self, own: &SpiffeId, expected: &SpiffeId) -> Result<Arc<ClientConfig>, Error> {
        let shared = &*self.0;
        if *expected.trust_domain() != shared.trust.domain {
            return Err(Error::Foreign(expected.clone()));
        }
        let (served, bundle) = self.valid(own)?;
        shared.clients.get(own, expected, served.epoch, || {
            let rules = shared.rules(bundle);
            tls::client(&served.certificate, expected, rules, &shared.clock)
        })
    }

    /// Returns the configuration for serving as `own`. Clients must prove an identity of the trust
    /// domain.
    ///
    /// # Errors
    /// When `own` has no valid certificate.
    pub fn server(&self, own: &SpiffeId) -> Result<Arc<ServerConfig>, Error> {
        let (served, _bundle) = self.valid(own)?;
        Ok(Arc::clone(&served.server))
    }

    fn valid(&self, own: &SpiffeId) -> Result<(Arc<Served>, Arc<Bundle>), Error> {
        let now = self.0.now.borrow();
        let served = now
            .served
            .get(own)
            .ok_or_else(|| Error::NotReady(own.clone()))?;
        if served.certificate.not_after() <= self.0.clock.now() {
            return Err(Error::Expired(own.clone()));
        }
        Ok((Arc::clone(served), Arc::clone(&now.bundle)))
    }

    /// Returns the identity of the peer of a finished handshake, on either side. Also checks that the
    /// peer's certificate has not expired since, which a resumed session skips.
    ///
    /// # Errors
    /// When the peer has proven no valid identity of the trust domain, or uses another protocol.
    pub fn peer(&self, connection: &CommonState) -> Result<Proof, Refusal> {
        if connection.is_handshaking() {
            return Err(Refusal::NoCertificate);
        }
        let chain = connection.peer_certificates().unwrap_or_default();
        let leaf = verify::read_leaf(chain.first().ok_or(Refusal::NoCertificate)?)?;
        let id = self.0.trust.own(leaf.id)?;
        if leaf.not_after <= self.0.clock.now() {
            return Err(Refusal::Expired);
        }
        if connection.alpn_protocol() != Some(self.0.alpn) {
            return Err(Refusal::Protocol);
        }
        let proof = Proof {
            id,
            chain: chain.to_vec(),
            not_after: leaf.not_after,
        };
        // The lists may have changed during the handshake.
        if self.is_revoked(&proof) {
            return Err(Refusal::Revoked);
        }
        Ok(proof)
    }

    /// Tells whether the certificates of both sides of a tunnel are still valid, so that the tunnel may
    /// carry another connection.
    pub fn stands(&self, own: &SpiffeId, proof: &Proof) -> bool {
        let own_expired = matches!(self.valid(own), Err(Error::Expired(_)));
        !own_expired && self.0.clock.now() < proof.not_after
    }

    /// Tells whether the certificate of an authenticated peer is revoked now.
    pub fn is_revoked(&self, proof: &Proof) -> bool {
        let bundle = Arc::clone(&self.0.now.borrow().bundle);
        let now = clock::unix_time(self.0.clock.now());
        self.0.rules(bundle).is_revoked_now(&proof.chain, now)
    }

    /// Returns the largest observed lag of this node's clock.
    pub fn clock_skew(&self) -> Duration {
        self.0.skew.most()
    }
}

impl Shared {
    fn rules(&self, bundle: Arc<Bundle>) -> Rules {
        Rules {
            alpn: self.alpn,
            provider: Arc::clone(&self.provider),
            trust: self.trust.clone(),
            bundle,
            skew: Arc::clone(&self.skew),
        }
    }
}

#[cfg(test)]
mod tests;
