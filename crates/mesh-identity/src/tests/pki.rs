// SPDX-License-Identifier: Apache-2.0
//! Certificates, good and bad, and both ends of a handshake.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    version::TLS13,
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{Ca, Clock, Config, Identities, Refusal, SpiffeId, tls};

pub(super) const DAY: Duration = Duration::from_secs(24 * 3600);

/// A clock that stands still until it is moved.
#[derive(Clone)]
pub(super) struct Hand(Arc<AtomicU64>);

impl Hand {
    pub(super) fn new() -> Self {
        Self(Arc::new(AtomicU64::new(1_800_000_000)))
    }

    pub(super) fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.0.load(Ordering::SeqCst))
    }

    pub(super) fn forward(&self, by: Duration) {
        self.0.fetch_add(by.as_secs(), Ordering::SeqCst);
    }

    pub(super) fn clock(&self) -> Clock {
        let hand = self.clone();
        Clock::new(move || hand.now())
    }
}

pub(super) fn id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap()
}

/// The content of a leaf certificate; the default is valid.
pub(super) struct Leaf {
    pub(super) uris: Vec<String>,
    pub(super) address: Option<std::net::IpAddr>,
    pub(super) key_usages: Vec<KeyUsagePurpose>,
    pub(super) extended: Vec<ExtendedKeyUsagePurpose>,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    pub(super) ca: bool,
}

impl Leaf {
    pub(super) fn of(uri: &str, now: SystemTime) -> Self {
        Self {
            uris: vec![uri.to_owned()],
            address: None,
            key_usages: vec![KeyUsagePurpose::DigitalSignature],
            extended: vec![
                ExtendedKeyUsagePurpose::ClientAuth,
                ExtendedKeyUsagePurpose::ServerAuth,
            ],
            not_before: now - Duration::from_secs(60),
            not_after: now + DAY,
            ca: false,
        }
    }

    pub(super) fn good(name: &str, now: SystemTime) -> Self {
        Self::of(&id(name).to_string(), now)
    }
}

/// A chain with its key.
pub(super) struct Pair {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) chain_pem: String,
    pub(super) key: KeyPair,
}

impl Pair {
    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.serialize_der().into())
    }
}

/// A root of tests; all have the same name.
pub(super) struct Root {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) der: CertificateDer<'static>,
    pub(super) pem: String,
}

impl Root {
    pub(super) fn new(now: SystemTime) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "the root of the mesh");
        params.not_before = OffsetDateTime::from(now - DAY);
        params.not_after = OffsetDateTime::from(now + DAY * 365);
        let root = params.self_signed(&key).unwrap();
        let (der, pem) = (root.der().clone(), root.pem());
        Self {
            issuer: Issuer::new(params, key),
            der,
            pem,
        }
    }

    pub(super) fn sign(&self, leaf: Leaf) -> Pair {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf
            .uris
            .into_iter()
            .map(|uri| SanType::URI(uri.try_into().unwrap()))
            .collect();
        params
            .subject_alt_names
            .extend(leaf.address.map(SanType::IpAddress));
        params.key_usages = leaf.key_usages;
        params.extended_key_usages = leaf.extended;
        params.not_before = OffsetDateTime::from(leaf.not_before);
        params.not_after = OffsetDateTime::from(leaf.not_after);
        if leaf.ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        Pair {
            chain: vec![signed.der().clone()],
            chain_pem: signed.pem(),
            key,
        }
    }

    /// A revocation list that names these certificates.
    pub(super) fn revoke(&self, pairs: &[&Pair], next_update: SystemTime) -> String {
        let leaves: Vec<_> = pairs.iter().map(|pair| &pair.chain[0]).collect();
        self.revoke_leaves(&leaves, next_update)
    }

    /// The same, by the certificates alone.
    pub(super) fn revoke_leaves(
        &self,
        leaves: &[&CertificateDer<'_>],
        next_update: SystemTime,
    ) -> String {
        let revoked_certs = leaves.iter().map(|leaf| RevokedCertParams {
            serial_number: serial(leaf),
            revocation_time: OffsetDateTime::UNIX_EPOCH,
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: OffsetDateTime::UNIX_EPOCH,
            next_update: OffsetDateTime::from(next_update),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// Writes a good certificate where `files:` looks for it.
    pub(super) fn write(&self, dir: &Path, name: &str, leaf: Leaf) {
        let pair = self.sign(leaf);
        let dir = dir.join("shop").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("tls.crt"), pair.chain_pem).unwrap();
        std::fs::write(dir.join("tls.key"), pair.key.serialize_pem()).unwrap();
        std::fs::write(dir.join("ca.crt"), &self.pem).unwrap();
    }
}

fn serial(der: &CertificateDer<'_>) -> SerialNumber {
    let (_, certificate) = X509Certificate::from_der(der).unwrap();
    SerialNumber::from_slice(certificate.raw_serial())
}

impl Identities {
    /// Returns the peer of a handshake.
    pub(super) fn who(&self, connection: &CommonState) -> Result<SpiffeId, Refusal> {
        self.peer(connection).map(|proof| proof.id)
    }
}

/// The protocol that the tests offer.
const ALPN: &[u8] = b"test";

pub(super) fn config(ca: Ca, clock: Clock) -> Config {
    Config {
        ca,
        trust_domain: "cluster.local".parse().unwrap(),
        aliases: Vec::new(),
        crls: Vec::new(),
        alpn: ALPN,
        clock,
        seed: 7,
    }
}

pub(super) type Wanted = watch::Sender<BTreeSet<SpiffeId>>;

pub(super) fn want(names: &[&str]) -> (Wanted, watch::Receiver<BTreeSet<SpiffeId>>) {
    watch::channel(names.iter().map(|name| id(name)).collect())
}

/// An agent's identities `web`, `db` and `cron`, from files signed by a root that is known.
pub(super) struct Agent {
    pub(super) identities: Identities,
    pub(super) root: Root,
    pub(super) hand: Hand,
    pub(super) dir: tempfile::TempDir,
    _wanted: Wanted,
}

impl Agent {
    pub(super) async fn start() -> Self {
        Self::with(|_, _| {}).await
    }

    /// The same, with a configuration that `change` changes, given also the directory.
    pub(super) async fn with(change: impl FnOnce(&mut Config, &Path)) -> Self {
        let hand = Hand::new();
        let root = Root::new(hand.now());
        let dir = tempfile::tempdir().unwrap();
        let names = ["web", "db", "cron"];
        for name in names {
            root.write(dir.path(), name, Leaf::good(name, hand.now()));
        }
        let (wanted, ids) = want(&names);
        let mut config = config(Ca::Files(dir.path().to_owned()), hand.clock());
        change(&mut config, dir.path());
        let identities = Identities::start(config, ids).await.unwrap();
        for name in names {
            identities.ready(&id(name)).await.unwrap();
        }
        Self {
            identities,
            root,
            hand,
            dir,
            _wanted: wanted,
        }
    }
}

pub(super) type Client = client::TlsStream<tokio::io::DuplexStream>;
pub(super) type Server = server::TlsStream<tokio::io::DuplexStream>;

/// One handshake, and a byte from the server, with which the client has what follows the
/// handshake: tickets, or an alert.
pub(super) async fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (Result<Client, Refusal>, Result<Server, Refusal>) {
    let (near, far) = tokio::io::duplex(1 << 16);
    let dial = async {
        let name = tls::server_name([10, 0, 0, 1].into());
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let serve = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_u8(7).await?;
        stream.flush().await?;
        Ok(stream)
    };
    let (client, server) = tokio::join!(dial, serve);
    let reason = |error: std::io::Error| Refusal::of_io(&error);
    (client.map_err(reason), server.map_err(reason))
}

#[derive(Debug)]
struct Gullible(rustls::crypto::WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General(String::new()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// A client that believes everybody and shows whatever it was given.
pub(super) fn stranger(pair: Option<&Pair>) -> ClientConfig {
    let provider = tls::provider();
    let gullible = Gullible(provider.signature_verification_algorithms);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(gullible));
    let mut config = match pair {
        Some(pair) => builder
            .with_client_auth_cert(pair.chain.clone(), pair.key())
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

/// A server that asks for no certificate and shows whatever it was given.
pub(super) fn impostor(pair: &Pair) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(pair.chain.clone(), pair.key())
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}
