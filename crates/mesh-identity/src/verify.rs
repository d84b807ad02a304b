// SPDX-License-Identifier: Apache-2.0
//! Verification of certificates: chain, validity, usage, and exactly one SPIFFE ID.
//!
//! The same rules apply to peers on both sides of a handshake and to this node's own certificates.
//! Host names and addresses are not verified.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error as TlsError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime, pem::PemObject},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{
    EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth, RevocationOptions,
    RevocationOptionsBuilder, UnknownStatusPolicy, anchor_from_trusted_cert,
};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use super::{Refusal, SpiffeId, TrustDomain, revocation::Revoked};

/// The roots of the trust domain and the revocation lists at a point in time.
pub struct Bundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    revoked: Arc<Revoked>,
    revision: u64,
}

impl Bundle {
    /// Makes a bundle of the valid roots, regardless of order and repetition. Also returns the number of
    /// invalid roots.
    pub(super) fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> (Self, usize) {
        let mut all: Vec<_> = roots.into_iter().collect();
        all.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
        all.dedup();
        let given = all.len();
        let mut bundle = Self {
            roots: Vec::new(),
            anchors: Vec::new(),
            revoked: Arc::default(),
            revision: 0,
        };
        let mut hash = digest::Context::new(&digest::SHA256);
        for root in all {
            let Ok(anchor) = anchor_from_trusted_cert(&root).map(|anchor| anchor.to_owned()) else {
                continue;
            };
            hash.update(&(root.len() as u64).to_be_bytes());
            hash.update(&root);
            bundle.anchors.push(anchor);
            bundle.roots.push(root);
        }
        let hash = hash.finish();
        bundle.revision = hash
            .as_ref()
            .iter()
            .take(8)
            .fold(0, |number, byte| number << 8 | u64::from(*byte));
        let unreadable = given - bundle.roots.len();
        (bundle, unreadable)
    }

    /// Adds revocation lists.
    pub(super) fn with(mut self, revoked: Arc<Revoked>) -> Self {
        self.revision ^= revoked.version();
        self.revoked = revoked;
        self
    }

    /// Returns the promised time of the next update of each revocation list, with its file.
    pub fn revocation_lists(&self) -> impl Iterator<Item = (&std::path::Path, SystemTime)> {
        self.revoked.next_updates()
    }

    /// Returns the roots, in DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Returns a hash of the roots and of the revocation lists. Nodes with equal ones have equal hashes.
    pub fn revision(&self) -> u64 {
        self.revision
    }
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            roots,
            anchors: _,
            revoked,
            revision,
        } = self;
        f.debug_struct("Bundle")
            .field("roots", &roots.len())
            .field("revoked", revoked)
            .field("revision", &format_args!("{revision:016x}"))
            .finish()
    }
}

/// The verified fields of a leaf certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) id: SpiffeId,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

/// Reads the SPIFFE ID of the first certificate in `pem`; `None` if it is not an X.509-SVID leaf. Does
/// not verify the issuer.
#[must_use]
pub fn identity_of(pem: &str) -> Option<SpiffeId> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    read_leaf(&der).ok().map(|leaf| leaf.id)
}

/// Parses a leaf and checks the constraints of X.509-SVID 4 and 5. Does not verify the chain.
pub(super) fn read_leaf(der: &CertificateDer<'_>) -> Result<Leaf, Refusal> {
    let (rest, certificate) = x509_parser::certificate::X509Certificate::from_der(der)
        .map_err(|_unreadable| Refusal::BadCertificate)?;
    if !rest.is_empty() {
        return Err(Refusal::BadCertificate);
    }
    let usage = certificate
        .key_usage()
        .map_err(|_twice| Refusal::BadCertificate)?;
    let usage = usage.ok_or(Refusal::WrongUsage)?.value;
    if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
        return Err(Refusal::WrongUsage);
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_twice| Refusal::BadCertificate)?;
    let names = names
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(Ok(*uri)),
        GeneralName::Invalid(..) => Some(Err(Refusal::BadCertificate)),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::DNSName(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_) => None,
    });
    let uri = uris.next().ok_or(Refusal::NoSpiffeId)??;
    if let Some(second) = uris.next() {
        return Err(second.err().unwrap_or(Refusal::SeveralNames));
    }
    let validity = certificate.validity();
    Ok(Leaf {
        id: SpiffeId::parse(uri).map_err(|_malformed| Refusal::NoSpiffeId)?,
        not_before: system_time(validity.not_before.timestamp()),
        not_after: system_time(validity.not_after.timestamp()),
    })
}

/// Returns the start of a certificate's validity, in seconds since 1970.
fn not_before(der: &CertificateDer<'_>) -> Option<u64> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
    u64::try_from(certificate.validity().not_before.timestamp()).ok()
}

pub(super) fn system_time(unix: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix).unwrap_or(0))
}

/// The tolerance for certificates that are not valid yet: clocks differ between nodes, and not every
/// CA backdates its certificates.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(300);

/// The observed lag of this node's clock.
#[derive(Debug, Default)]
pub(super) struct Skew(AtomicU64);

impl Skew {
    /// Returns the maximum.
    pub(super) fn most(&self) -> Duration {
        Duration::from_secs(self.0.load(Relaxed))
    }

    fn saw(&self, ahead: Duration) {
        let seconds = ahead.as_secs().max(1);
        // Once for each new maximum: a peer can repeat it at will.
        if self.0.fetch_max(seconds, Relaxed) < seconds {
            tracing::warn!(
                ?ahead,
                "accepted a certificate that is not valid yet: this node's clock is behind, or the CA's is ahead"
            );
        }
    }
}

/// The trust domain and its aliases.
#[derive(Debug, Clone)]
pub(super) struct Trust {
    /// The trust domain.
    pub(super) domain: TrustDomain,
    /// Aliases of the trust domain.
    pub(super) aliases: Arc<[TrustDomain]>,
}

impl Trust {
    /// Returns the identity with an alias replaced by the trust domain; refuses other trust domains.
    pub(super) fn own(&self, id: SpiffeId) -> Result<SpiffeId, Refusal> {
        if *id.trust_domain() == self.domain {
            Ok(id)
        } else if self.aliases.contains(id.trust_domain()) {
            Ok(id.in_domain(&self.domain))
        } else {
            Err(Refusal::WrongTrustDomain)
        }
    }
}

/// The rules of verification.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// ALPN name of the tunnel protocol.
    pub(super) alpn: &'static [u8],
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) trust: Trust,
    pub(super) bundle: Arc<Bundle>,
    pub(super) skew: Arc<Skew>,
}

impl Rules {
    /// Verifies a chain for use as client or server.
    pub(super) fn prove(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<Leaf, Refusal> {
        self.chains(leaf, above, now, usage, None)
            .or_else(|why| self.chains_soon(leaf, above, now, usage, why))?;
        if self.is_revoked(leaf, above, now, usage) {
            return Err(Refusal::Revoked);
        }
        let leaf = read_leaf(leaf)?;
        let id = self.trust.own(leaf.id)?;
        Ok(Leaf { id, ..leaf })
    }

    fn chains(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
        revocation: Option<RevocationOptions<'_>>,
    ) -> Result<(), Refusal> {
        EndEntityCert::try_from(leaf)?.verify_for_usage(
            self.provider.signature_verification_algorithms.all,
            &self.bundle.anchors,
            above,
            now,
            usage,
            revocation,
            None,
        )?;
        Ok(())
    }

    /// Accepts a chain that is not valid yet, but becomes valid within [`CLOCK_TOLERANCE`].
    fn chains_soon(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
        why: Refusal,
    ) -> Result<(), Refusal> {
        if why != Refusal::NotYetValid {
            return Err(why);
        }
        let seconds = now.as_secs();
        let later = Duration::from_secs(seconds) + CLOCK_TOLERANCE;
        self.chains(leaf, above, UnixTime::since_unix_epoch(later), usage, None)
            .map_err(|_still_invalid| why)?;
        let begins = std::iter::once(leaf).chain(above).filter_map(not_before);
        let ahead = begins.max().map_or(0, |at| at.saturating_sub(seconds));
        self.skew.saw(Duration::from_secs(ahead));
        Ok(())
    }

    /// Tells whether a CA of a verified chain has revoked a certificate of the chain.
    fn is_revoked(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> bool {
        self.bundle.revoked.naming(leaf, above).iter().any(|list| {
            let only = [*list];
            let options = RevocationOptionsBuilder::new(&only).map(|options| {
                options
                    .with_depth(RevocationCheckDepth::Chain)
                    .with_status_policy(UnknownStatusPolicy::Allow)
                    .with_expiration_policy(ExpirationPolicy::Ignore)
                    .build()
            });
            // Any other result means that the list belongs to another CA with the same name.
            options.is_ok_and(|options| {
                self.chains(leaf, above, now, usage, Some(options)) == Err(Refusal::Revoked)
            })
        })
    }

    /// Tells whether a chain that was verified before is revoked now.
    pub(super) fn is_revoked_now(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> bool {
        let Some((leaf, above)) = chain.split_first() else {
            return false;
        };
        [KeyUsage::client_auth(), KeyUsage::server_auth()]
            .into_iter()
            .any(|usage| self.is_revoked(leaf, above, now, usage))
    }

    fn signed(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

// Only TLS 1.3 is compiled in.
const NO_TLS12: &str = "TLS 1.2 is not enabled";

/// Verifies servers: the server must have exactly the expected identity.
#[derive(Debug)]
pub(super) struct ExpectOne {
    pub(super) rules: Rules,
    pub(super) expected: SpiffeId,
}

impl ServerCertVerifier for ExpectOne {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let leaf = self
            .rules
            .prove(leaf, above, now, KeyUsage::server_auth())?;
        if leaf.id != self.expected {
            return Err(Refusal::WrongIdentity.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General(NO_TLS12.to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.rules.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.rules.schemes()
    }
}

/// Verifies clients: the client must have an identity of the trust domain.
#[derive(Debug)]
pub(super) struct ExpectAny(pub(super) Rules);

impl ClientCertVerifier for ExpectAny {
    // A hint would reveal the names of the roots to unauthenticated clients.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.0.prove(leaf, above, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General(NO_TLS12.to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.schemes()
    }
}
