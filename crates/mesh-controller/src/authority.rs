// SPDX-License-Identifier: Apache-2.0
//! The CA's keys and certificates as a value, and the steps of its life. No I/O, no clock.
//!
//! A root signs an intermediate, which signs leaves. A root is replaced in three steps, so that
//! every peer knows a root before it meets it: the new one is published; after the overlap it signs;
//! when the last leaf of the old one has ended, the old one is no longer published.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use super::sign::serial;

const DAY: Duration = Duration::from_secs(24 * 3600);
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A root is replaced without being asked when so little of its life is left.
const ROOT_LEFT: Duration = Duration::from_secs(365 * 24 * 3600);
const INTERMEDIATE_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// An intermediate is replaced when so little of its life is left.
const INTERMEDIATE_LEFT: Duration = Duration::from_secs(120 * 24 * 3600);
const BACKDATED: Duration = Duration::from_secs(600);

/// Why there is no usable CA.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0} is no certificate in PEM")]
    Certificate(&'static str),
    #[error("{0} is no private key in PEM")]
    Key(&'static str),
    #[error("{0} was not signed by {1}")]
    Issuer(&'static str, &'static str),
    #[error("{0} does not belong to its key")]
    OtherKey(&'static str),
    #[error("root.key is missing: nothing new can be signed with the root")]
    NoRootKey,
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    #[error("cannot serve with the key")]
    Serve(#[from] rustls::Error),
}

/// A certificate and its key, in PEM.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct Pair {
    pub(super) certificate: String,
    /// Empty: it is kept elsewhere.
    pub(super) key: Zeroizing<String>,
}

/// Everything of the CA that is kept.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct Material {
    /// The root that signs.
    pub(super) root: Pair,
    /// What the root has signed, and what signs leaves.
    pub(super) intermediate: Pair,
    /// The root that is published and does not sign yet, since when (UNIX time).
    pub(super) next: Option<(Pair, u64)>,
    /// Roots that sign no more, since when.
    pub(super) old: Option<(String, u64)>,
    /// The request for a rotation that was the last to be followed.
    pub(super) followed: String,
}

/// How long things last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// The longest life of a leaf.
    pub(super) leaf: Duration,
    /// How long a new root is published before it signs.
    pub(super) overlap: Duration,
}

impl Material {
    /// All roots, in PEM.
    pub(super) fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|(pair, _)| &pair.certificate);
        let old = self.old.as_ref().map(|(roots, _)| roots);
        let mut bundle = String::new();
        for part in [Some(&self.root.certificate), next, old]
            .into_iter()
            .flatten()
        {
            bundle.push_str(part.trim());
            bundle.push('\n');
        }
        bundle
    }

    /// A CA that there was not before.
    pub(super) fn new(trust_domain: &str, now: SystemTime) -> Result<Self, Error> {
        let root = make_root(trust_domain, now)?;
        Ok(Self {
            intermediate: make_intermediate(&root, trust_domain, now)?,
            root,
            ..Self::default()
        })
    }

    /// The CA's next state, if it is time for one. `asked` = the request for a rotation that
    /// stands.
    pub(super) fn next(
        &self,
        asked: Option<&str>,
        trust_domain: &str,
        times: Times,
        now: SystemTime,
    ) -> Result<Option<Self>, Error> {
        let since = |then: u64| now.duration_since(UNIX_EPOCH + Duration::from_secs(then));
        let passed = |then: u64, wait: Duration| since(then).is_ok_and(|passed| passed >= wait);
        let mut next = self.clone();
        if let Some((pair, published)) = &self.next {
            if !passed(*published, times.overlap) {
                return Ok(None);
            }
            next.old = Some((self.root.certificate.clone(), unix(now)));
            next.root = pair.clone();
            next.intermediate = make_intermediate(pair, trust_domain, now)?;
            next.next = None;
            return Ok(Some(next));
        }
        if let Some((_, switched)) = &self.old {
            if !passed(*switched, times.leaf + times.overlap) {
                return Ok(None);
            }
            next.old = None;
            return Ok(Some(next));
        }
        let asked = asked.filter(|asked| *asked != self.followed);
        let root = read(&self.root.certificate, "root.crt")?;
        if asked.is_some() || ends(&root)? < now + ROOT_LEFT {
            next.next = Some((make_root(trust_domain, now)?, unix(now)));
            next.followed = asked.unwrap_or(&self.followed).to_owned();
            return Ok(Some(next));
        }
        let missing = self.intermediate.certificate.is_empty();
        if missing
            || ends(&read(&self.intermediate.certificate, "intermediate.crt")?)?
                < now + INTERMEDIATE_LEFT
        {
            if self.root.key.is_empty() {
                return if missing {
                    Err(Error::NoRootKey)
                } else {
                    Ok(None)
                };
            }
            next.intermediate = make_intermediate(&self.root, trust_domain, now)?;
            return Ok(Some(next));
        }
        Ok(None)
    }
}

pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn named(trust_domain: &str, what: &str, now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    // Two roots of one name would make peers try both.
    params
        .distinguished_name
        .push(DnType::CommonName, format!("mesh {what} {}", unix(now)));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = OffsetDateTime::from(now - BACKDATED);
    params
}

fn make_root(trust_domain: &str, now: SystemTime) -> Result<Pair, Error> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = named(trust_domain, "root", now);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.serial_number = Some(serial()?);
    params.not_after = OffsetDateTime::from(now + ROOT_LIFE);
    Ok(Pair {
        certificate: params.self_signed(&key)?.pem(),
        key: Zeroizing::new(key.serialize_pem()),
    })
}

fn make_intermediate(root: &Pair, trust_domain: &str, now: SystemTime) -> Result<Pair, Error> {
    if root.key.is_empty() {
        return Err(Error::NoRootKey);
    }
    let root_key = KeyPair::from_pem(&root.key).map_err(|_unusable| Error::Key("root.key"))?;
    let root_ends = ends(&read(&root.certificate, "root.crt")?)?;
    let root = Issuer::from_ca_cert_pem(&root.certificate, root_key)?;
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = named(trust_domain, "intermediate", now);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.serial_number = Some(serial()?);
    params.use_authority_key_identifier_extension = true;
    params.not_after = OffsetDateTime::from((now + INTERMEDIATE_LIFE).min(root_ends));
    Ok(Pair {
        certificate: params.signed_by(&key, &root)?.pem(),
        key: Zeroizing::new(key.serialize_pem()),
    })
}

fn read(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, Error> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_none| Error::Certificate(what))
}

fn ends(certificate: &CertificateDer<'_>) -> Result<SystemTime, Error> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_not_x509| Error::Certificate("a certificate of the CA"))?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(UNIX_EPOCH + Duration::from_secs(seconds))
}

/// What signs leaves.
pub(super) struct Signer {
    issuer: Issuer<'static, KeyPair>,
    ends: SystemTime,
}

impl Signer {
    pub(super) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
    }

    /// When the signing certificate ends; nothing that it signs may last longer.
    pub(super) fn ends(&self) -> SystemTime {
        self.ends
    }
}

/// The CA, ready to sign and to serve.
pub(super) struct Authority {
    pub(super) signer: Signer,
    /// The intermediate, in PEM.
    pub(super) intermediate: String,
    /// All roots, in PEM.
    pub(super) bundle: String,
    /// How many roots there are.
    pub(super) roots: usize,
    /// When the root ends.
    pub(super) root_ends: SystemTime,
    /// The controller's own certificate.
    pub(super) serving: Arc<CertifiedKey>,
    /// When that is to be replaced.
    pub(super) renew: SystemTime,
}

impl Authority {
    /// Checks what is kept, and makes the controller's own certificate for `names`.
    pub(super) fn new(
        material: &Material,
        names: &[String],
        times: Times,
        now: SystemTime,
    ) -> Result<Self, Error> {
        let root = read(&material.root.certificate, "root.crt")?;
        let der = read(&material.intermediate.certificate, "intermediate.crt")?;
        let key = KeyPair::from_pem(&material.intermediate.key)
            .map_err(|_unusable| Error::Key("intermediate.key"))?;
        check(&root, &der, &key)?;
        let signer = Signer {
            issuer: Issuer::from_ca_cert_der(&der, key)?,
            ends: ends(&der)?,
        };
        let serving = serving(&signer, &der, names, (now, times.leaf))?;
        let bundle = material.bundle();
        Ok(Self {
            signer,
            intermediate: material.intermediate.certificate.clone(),
            roots: CertificateDer::pem_slice_iter(bundle.as_bytes()).count(),
            bundle,
            root_ends: ends(&root)?,
            serving: Arc::new(serving),
            renew: now + times.leaf.min(DAY) / 2,
        })
    }
}

/// The intermediate is the root's, and the key the intermediate's.
fn check(root: &CertificateDer<'_>, der: &CertificateDer<'_>, key: &KeyPair) -> Result<(), Error> {
    let (_, root) =
        X509Certificate::from_der(root).map_err(|_no| Error::Certificate("root.crt"))?;
    let (_, intermediate) =
        X509Certificate::from_der(der).map_err(|_no| Error::Certificate("intermediate.crt"))?;
    intermediate
        .verify_signature(Some(root.public_key()))
        .map_err(|_not_signed| Error::Issuer("intermediate.crt", "root.crt"))?;
    let public = &intermediate.public_key().subject_public_key.data;
    if public.as_ref() != key.public_key_raw() {
        return Err(Error::OtherKey("intermediate.crt"));
    }
    Ok(())
}

/// The controller's own certificate, signed as any leaf is.
fn serving(
    signer: &Signer,
    intermediate: &CertificateDer<'static>,
    names: &[String],
    (now, life): (SystemTime, Duration),
) -> Result<CertifiedKey, Error> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut leaf = CertificateParams::default();
    leaf.distinguished_name = DistinguishedName::new();
    leaf.subject_alt_names = names
        .iter()
        .map(|name| {
            Ok(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            })
        })
        .collect::<Result<_, rcgen::Error>>()?;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.use_authority_key_identifier_extension = true;
    leaf.serial_number = Some(serial()?);
    leaf.not_before = OffsetDateTime::from(now - BACKDATED);
    leaf.not_after = OffsetDateTime::from((now + life).min(signer.ends));
    let certificate = leaf.signed_by(&key, signer.issuer())?;
    let der = PrivateKeyDer::from_pem_slice(Zeroizing::new(key.serialize_pem()).as_bytes())
        .map_err(|_none| Error::Key("the serving key"))?;
    let chain = vec![certificate.der().clone(), intermediate.clone()];
    Ok(CertifiedKey::new(chain, any_supported_type(&der)?))
}

#[cfg(test)]
mod tests;
