// SPDX-License-Identifier: Apache-2.0
//! The CA's keys and certificates, and the rotation of its roots. Pure: no I/O and no clock.
//!
//! A root signs an intermediate, which signs leaves. A root is replaced in three steps, so that every
//! peer trusts a root before it sees a leaf of it: the new root is published; after the overlap it
//! signs; when the last leaf of the old root has expired, the old root is no longer published.

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
/// The remaining life at which a root is replaced without a request.
const ROOT_RENEWAL: Duration = Duration::from_secs(365 * 24 * 3600);
const INTERMEDIATE_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// The remaining life at which an intermediate is replaced.
const INTERMEDIATE_RENEWAL: Duration = Duration::from_secs(120 * 24 * 3600);
/// The time between the start of a certificate's validity and its issuance, for clocks that differ.
const BACKDATED: Duration = Duration::from_secs(600);

/// A failure to load or create the CA.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0} is not a PEM certificate")]
    Certificate(&'static str),
    #[error("{0} is not a PEM private key")]
    Key(&'static str),
    #[error("{0} was not signed by {1}")]
    Issuer(&'static str, &'static str),
    #[error("{0} does not match its private key")]
    OtherKey(&'static str),
    #[error("cannot sign an intermediate: root.key is missing")]
    NoRootKey,
    #[error("cannot create a certificate")]
    Create(#[from] rcgen::Error),
    #[error("cannot use the serving key for TLS")]
    Serve(#[from] rustls::Error),
}

/// A certificate and its private key, in PEM.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct CertificateAndKey {
    pub(super) certificate: String,
    /// Private key; empty if it is stored elsewhere.
    pub(super) key: Zeroizing<String>,
}

/// The stored state of the CA.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct Material {
    /// The root that signs.
    pub(super) root: CertificateAndKey,
    /// The certificate that the root has signed and that signs leaves.
    pub(super) intermediate: CertificateAndKey,
    /// The root that is published and does not sign yet, with the time of its publication (UNIX time).
    pub(super) next: Option<(CertificateAndKey, u64)>,
    /// Roots that no longer sign, with the time of their replacement (UNIX time).
    pub(super) old: Option<(String, u64)>,
    /// The rotation request that was carried out last.
    pub(super) last_request: String,
}

/// The lifetimes of the CA's certificates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetimes {
    /// The maximum lifetime of a leaf.
    pub(super) leaf: Duration,
    /// The time that a new root is published before it signs.
    pub(super) overlap: Duration,
}

impl Material {
    /// Returns all roots, in PEM.
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

    /// Creates a new CA.
    pub(super) fn new(trust_domain: &str, now: SystemTime) -> Result<Self, Error> {
        let root = create_root(trust_domain, now)?;
        Ok(Self {
            intermediate: create_intermediate(&root, trust_domain, now)?,
            root,
            ..Self::default()
        })
    }

    /// Returns the CA's next state if a step is due. `request` = the rotation request in the Secret.
    pub(super) fn next(
        &self,
        request: Option<&str>,
        trust_domain: &str,
        lifetimes: Lifetimes,
        now: SystemTime,
    ) -> Result<Option<Self>, Error> {
        let since = |then: u64| now.duration_since(UNIX_EPOCH + Duration::from_secs(then));
        let passed = |then: u64, wait: Duration| since(then).is_ok_and(|passed| passed >= wait);
        let mut next = self.clone();
        if let Some((pair, published)) = &self.next {
            if !passed(*published, lifetimes.overlap) {
                return Ok(None);
            }
            next.old = Some((self.root.certificate.clone(), unix(now)));
            next.root = pair.clone();
            next.intermediate = create_intermediate(pair, trust_domain, now)?;
            next.next = None;
            return Ok(Some(next));
        }
        if let Some((_, switched)) = &self.old {
            if !passed(*switched, lifetimes.leaf + lifetimes.overlap) {
                return Ok(None);
            }
            next.old = None;
            return Ok(Some(next));
        }
        let request = request.filter(|request| *request != self.last_request);
        let root_expiry = expiry(&self.root.certificate, "root.crt")?;
        if request.is_some() || root_expiry < now + ROOT_RENEWAL {
            next.next = Some((create_root(trust_domain, now)?, unix(now)));
            next.last_request = request.unwrap_or(&self.last_request).to_owned();
            return Ok(Some(next));
        }
        let missing = self.intermediate.certificate.is_empty();
        if missing
            || expiry(&self.intermediate.certificate, "intermediate.crt")?
                < now + INTERMEDIATE_RENEWAL
        {
            if self.root.key.is_empty() {
                return if missing {
                    Err(Error::NoRootKey)
                } else {
                    Ok(None)
                };
            }
            next.intermediate = create_intermediate(&self.root, trust_domain, now)?;
            return Ok(Some(next));
        }
        Ok(None)
    }
}

/// Returns the seconds since 1970.
pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Returns the parameters of a CA certificate. `role` = root or intermediate.
fn ca_params(trust_domain: &str, role: &str, now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    // Peers try every root whose name matches: each root has a name of its own.
    params
        .distinguished_name
        .push(DnType::CommonName, format!("mesh {role} {}", unix(now)));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = OffsetDateTime::from(now - BACKDATED);
    params
}

fn create_root(trust_domain: &str, now: SystemTime) -> Result<CertificateAndKey, Error> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = ca_params(trust_domain, "root", now);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.serial_number = Some(serial()?);
    params.not_after = OffsetDateTime::from(now + ROOT_LIFE);
    Ok(CertificateAndKey {
        certificate: params.self_signed(&key)?.pem(),
        key: Zeroizing::new(key.serialize_pem()),
    })
}

fn create_intermediate(
    root: &CertificateAndKey,
    trust_domain: &str,
    now: SystemTime,
) -> Result<CertificateAndKey, Error> {
    if root.key.is_empty() {
        return Err(Error::NoRootKey);
    }
    let root_key = KeyPair::from_pem(&root.key).map_err(|_unusable| Error::Key("root.key"))?;
    let root_not_after = expiry(&root.certificate, "root.crt")?;
    let root = Issuer::from_ca_cert_pem(&root.certificate, root_key)?;
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = ca_params(trust_domain, "intermediate", now);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.serial_number = Some(serial()?);
    params.use_authority_key_identifier_extension = true;
    params.not_after = OffsetDateTime::from((now + INTERMEDIATE_LIFE).min(root_not_after));
    Ok(CertificateAndKey {
        certificate: params.signed_by(&key, &root)?.pem(),
        key: Zeroizing::new(key.serialize_pem()),
    })
}

fn parse_certificate(pem: &str, file: &'static str) -> Result<CertificateDer<'static>, Error> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_none| Error::Certificate(file))
}

/// Returns the expiry of a PEM certificate of the CA.
fn expiry(pem: &str, file: &'static str) -> Result<SystemTime, Error> {
    not_after(&parse_certificate(pem, file)?)
}

fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, Error> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_not_x509| Error::Certificate("a certificate of the CA"))?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(UNIX_EPOCH + Duration::from_secs(seconds))
}

/// The intermediate and its key, which sign leaves.
pub(super) struct Signer {
    issuer: Issuer<'static, KeyPair>,
    not_after: SystemTime,
}

impl Signer {
    pub(super) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
    }

    /// When the signing certificate ends; nothing that it signs may last longer.
    pub(super) fn not_after(&self) -> SystemTime {
        self.not_after
    }
}

/// The CA, ready to sign and to serve.
pub(super) struct Authority {
    pub(super) signer: Signer,
    /// The intermediate, in PEM.
    pub(super) intermediate: String,
    /// All roots, in PEM.
    pub(super) bundle: String,
    /// Number of roots.
    pub(super) roots: usize,
    /// Expiry of the root that signs.
    pub(super) root_not_after: SystemTime,
    /// The controller's own serving certificate.
    pub(super) serving: Arc<CertifiedKey>,
    /// The time at which the serving certificate is to be replaced.
    pub(super) renew: SystemTime,
}

impl Authority {
    /// Validates the stored state, and creates the controller's serving certificate for `names`.
    pub(super) fn new(
        material: &Material,
        names: &[String],
        lifetimes: Lifetimes,
        now: SystemTime,
    ) -> Result<Self, Error> {
        let root = parse_certificate(&material.root.certificate, "root.crt")?;
        let der = parse_certificate(&material.intermediate.certificate, "intermediate.crt")?;
        let key = KeyPair::from_pem(&material.intermediate.key)
            .map_err(|_unusable| Error::Key("intermediate.key"))?;
        check_chain(&root, &der, &key)?;
        let signer = Signer {
            issuer: Issuer::from_ca_cert_der(&der, key)?,
            not_after: not_after(&der)?,
        };
        let serving = create_serving(&signer, &der, names, (now, lifetimes.leaf))?;
        let bundle = material.bundle();
        Ok(Self {
            signer,
            intermediate: material.intermediate.certificate.clone(),
            roots: CertificateDer::pem_slice_iter(bundle.as_bytes()).count(),
            bundle,
            root_not_after: not_after(&root)?,
            serving: Arc::new(serving),
            renew: now + lifetimes.leaf.min(DAY) / 2,
        })
    }
}

/// Checks that the root has signed the intermediate, and that the key is the intermediate's.
fn check_chain(
    root: &CertificateDer<'_>,
    der: &CertificateDer<'_>,
    key: &KeyPair,
) -> Result<(), Error> {
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

/// Creates the controller's serving certificate, signed by the intermediate.
fn create_serving(
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
    leaf.not_after = OffsetDateTime::from((now + life).min(signer.not_after));
    let certificate = leaf.signed_by(&key, signer.issuer())?;
    let der = PrivateKeyDer::from_pem_slice(Zeroizing::new(key.serialize_pem()).as_bytes())
        .map_err(|_none| Error::Key("the serving key"))?;
    let chain = vec![certificate.der().clone(), intermediate.clone()];
    Ok(CertifiedKey::new(chain, any_supported_type(&der)?))
}

#[cfg(test)]
mod tests;
