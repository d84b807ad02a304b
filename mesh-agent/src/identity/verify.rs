// SPDX-License-Identifier: Apache-2.0
//! Who a certificate proves: chain, validity, usage, and exactly one SPIFFE ID.
//!
//! The same rules for peers on both sides of a handshake and for our own certificates before
//! they are used. Names of hosts and addresses play no part.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error as TlsError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use super::{Refusal, SpiffeId, TrustDomain};

/// The roots of the trust domain at one moment.
pub struct Bundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    revision: u64,
}

impl Bundle {
    /// Takes the roots that can be read; their order and repetitions do not matter. The second
    /// value counts those that cannot.
    pub(super) fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> (Self, usize) {
        let mut all: Vec<_> = roots.into_iter().collect();
        all.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
        all.dedup();
        let given = all.len();
        let mut bundle = Self {
            roots: Vec::new(),
            anchors: Vec::new(),
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

    /// The roots, in DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// A hash of the roots: the same on every node that trusts the same ones.
    pub fn revision(&self) -> u64 {
        self.revision
    }
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            roots,
            anchors: _,
            revision,
        } = self;
        f.debug_struct("Bundle")
            .field("roots", &roots.len())
            .field("revision", &format_args!("{revision:016x}"))
            .finish()
    }
}

/// What a leaf certificate says of its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) id: SpiffeId,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

/// Reads a leaf and checks what X.509-SVID 4 and 5 ask of it; proves nothing of its chain.
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

fn system_time(unix: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix).unwrap_or(0))
}

/// What is asked of a certificate.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) trust_domain: TrustDomain,
    pub(super) bundle: Arc<Bundle>,
}

impl Rules {
    /// Proves a chain for use as client or server.
    pub(super) fn prove(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<Leaf, Refusal> {
        let certificate = EndEntityCert::try_from(leaf)?;
        certificate.verify_for_usage(
            self.provider.signature_verification_algorithms.all,
            &self.bundle.anchors,
            above,
            now,
            usage,
            None,
            None,
        )?;
        let leaf = read_leaf(leaf)?;
        if *leaf.id.trust_domain() != self.trust_domain {
            return Err(Refusal::WrongTrustDomain);
        }
        Ok(leaf)
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

// Only TLS 1.3 is enabled, and compiled in.
const NO_TLS12: &str = "TLS 1.2 is not enabled";

/// A client's view of a server: exactly this identity.
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

/// A server's view of a client: any identity of the trust domain, never none.
#[derive(Debug)]
pub(super) struct ExpectAny(pub(super) Rules);

impl ClientCertVerifier for ExpectAny {
    // A hint would tell strangers the names of our roots.
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
