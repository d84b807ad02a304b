// SPDX-License-Identifier: Apache-2.0
//! Who workloads are: their certificates, and TLS configurations made of them.
//!
//! ```text
//! wanted ids -> renewal (a task per id) -> issuer -> checked certificate
//!                   |
//!                   v
//!               Snapshot (watch) -> Identities: client(own, expected), server(own), peer(conn)
//! ```
//! Private keys stay inside this room and in memory; nothing of them is ever logged. The room
//! opens no connection between workloads and knows no addresses: it says who may be believed.

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

/// What this room needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who issues certificates.
    pub ca: Ca,
    /// The one trust domain whose identities are believed.
    pub trust_domain: TrustDomain,
    /// Trust domains that count as the same: an identity of theirs is that of ours.
    pub aliases: Vec<TrustDomain>,
    /// Files of certificate revocation lists.
    pub crls: Vec<PathBuf>,
    /// The protocol inside a tunnel, as ALPN (RFC 7301) names it: both sides offer it, and a peer that did
    /// not agree on it is refused.
    pub alpn: &'static [u8],
    /// What time it is.
    pub clock: Clock,
    /// Any number that differs from agent to agent: it spreads their renewals and retries.
    pub seed: u64,
}

/// Why there is no TLS configuration for an identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The issuer cannot be used at all.
    #[error("cannot use the CA")]
    Issuer(#[source] IssueError),
    /// A file of revocation lists cannot be used.
    #[error(transparent)]
    Crl(#[from] CrlError),
    /// There is no certificate yet: the issuer has not given one, or it was not asked for.
    #[error("no certificate for {0} yet")]
    NotReady(SpiffeId),
    /// The certificate has ended and the issuer gave no new one.
    #[error("the certificate of {0} has expired and the CA gave no new one")]
    Expired(SpiffeId),
    /// The identity is not of our trust domain: nobody could prove it here.
    #[error("{0} is not of our trust domain")]
    Foreign(SpiffeId),
    /// The TLS library refused the configuration.
    #[error("cannot configure TLS")]
    Tls(#[from] rustls::Error),
}

impl Error {
    /// The reason of the record of a connection that fails by it.
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

/// Which certificate and which roots a tunnel was made under. Tunnels of another epoch than the
/// present one are not to be used for new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch {
    /// Counts the certificates that this agent has taken into use.
    pub certificate: u64,
    /// The bundle's revision.
    pub bundle: u64,
}

/// A certificate in use.
struct Served {
    certificate: Arc<Certificate>,
    server: Arc<ServerConfig>,
    epoch: Epoch,
}

/// All certificates and roots at one moment.
pub struct Snapshot {
    bundle: Arc<Bundle>,
    served: BTreeMap<SpiffeId, Arc<Served>>,
    revoked: BTreeSet<SpiffeId>,
}

impl Snapshot {
    /// The roots that peers are proven against.
    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.bundle
    }

    /// The epoch of an identity of this node; `None` without a certificate.
    pub fn epoch(&self, own: &SpiffeId) -> Option<Epoch> {
        self.served.get(own).map(|served| served.epoch)
    }

    /// The certificates, in the order of their names.
    pub fn certificates(&self) -> impl Iterator<Item = &Arc<Certificate>> {
        self.served.values().map(|served| &served.certificate)
    }

    /// Whether a CA has revoked this certificate, which is in use.
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

/// The certificates of this node's workloads: a handle, cheap to clone.
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

/// What a peer has proven itself with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Who it is.
    pub id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Identities {
    /// Opens the issuer and keeps a certificate for each identity in `wanted`, until the sender
    /// of `wanted` is gone. Returns before the first certificate is there.
    ///
    /// # Errors
    /// [`Error::Issuer`]: the issuer cannot be used, for example a directory not be written.
    /// [`Error::Crl`]: a revocation list cannot be read.
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
        let keeper = renewal::Keeper {
            issuer,
            rules,
            clock: clock.clone(),
            spread,
            revoked,
        };
        tokio::spawn(renewal::run(keeper, wanted, writer));
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

    /// The latest certificate of an identity of this node.
    pub fn certificate(&self, id: &SpiffeId) -> Option<Arc<Certificate>> {
        let now = self.0.now.borrow();
        now.served
            .get(id)
            .map(|served| Arc::clone(&served.certificate))
    }

    /// Waits until there is a certificate for `id`; for ever, if nobody wants one. Cancel safe.
    ///
    /// # Errors
    /// [`Error::NotReady`] if there will never be one, because the agent ends.
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

    /// Each change of a certificate or of the bundle; the present state counts as the first.
    /// Compare [`Snapshot::epoch`].
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.0.now.clone()
    }

    /// The present epoch of an identity of this node; `None` without a certificate, or with one
    /// that has ended.
    pub fn epoch(&self, own: &SpiffeId) -> Option<Epoch> {
        self.valid(own).ok().map(|(served, _bundle)| served.epoch)
    }

    /// When each certificate ends, in the order of their names:
    /// `mesh_certificate_expiry_timestamp_seconds`.
    pub fn expiries(&self) -> Vec<(SpiffeId, SystemTime)> {
        let now = self.0.now.borrow();
        now.certificates()
            .map(|c| (c.id().clone(), c.not_after()))
            .collect()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust.domain
    }

    /// How to dial as `own` a peer that must prove to be `expected`. The same configuration, and
    /// so the same sessions, as long as certificate and bundle are the same.
    ///
    /// # Errors
    /// There is no valid certificate of `own`, or `expected` is of another trust domain.
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

    /// How to serve as `own`: clients must prove an identity of the trust domain.
    ///
    /// # Errors
    /// There is no valid certificate of `own`.
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

    /// Who the other end of a finished handshake is, whichever end this is. Asks also what a
    /// resumed session would else skip: that the peer's certificate has not ended since.
    ///
    /// # Errors
    /// No proof, or not of a present member of the trust domain, or not in the tunnel protocol.
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
        // The handshake may have begun under older lists.
        if self.is_revoked(&proof) {
            return Err(Refusal::Revoked);
        }
        Ok(proof)
    }

    /// Whether a tunnel between an identity of this node and a peer that was proven before may carry
    /// one more connection: no certificate of either has ended.
    pub fn stands(&self, own: &SpiffeId, proof: &Proof) -> bool {
        let own_ended = matches!(self.valid(own), Err(Error::Expired(_)));
        !own_ended && self.0.clock.now() < proof.not_after
    }

    /// Whether a CA has revoked a certificate of a peer that was proven before.
    pub fn is_revoked(&self, proof: &Proof) -> bool {
        let bundle = Arc::clone(&self.0.now.borrow().bundle);
        let now = clock::unix_time(self.0.clock.now());
        self.0.rules(bundle).is_revoked_now(&proof.chain, now)
    }

    /// By how much this node's clock is seen to be behind others', the most so far.
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
