// SPDX-License-Identifier: Apache-2.0
//! From a signing request to a certificate.
//!
//! Of a request only its public key counts, and that whoever made it has the private one. Names,
//! usages and validity that it asks for are not read: who the certificate is for was proven
//! otherwise.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType,
    SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;
use time::OffsetDateTime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo as ReadKey;

use super::authority::Signer;
use super::numbers::Outcome;
use mesh_identity::SpiffeId;

/// Longest request in PEM. One with an RSA key of 8192 bits and a few names has 3 KiB.
const CSR_MAX: usize = 8 << 10;
/// Keeps certificates valid where clocks differ a little.
const BACKDATED: Duration = Duration::from_secs(600);
/// Bits of RSA keys.
const RSA: std::ops::RangeInclusive<usize> = 2048..=8192;

/// What a request asks to be certified.
#[derive(Debug)]
pub(super) struct Asked {
    key: SubjectPublicKeyInfo,
    /// Tells keys apart.
    pub(super) digest: [u8; 32],
}

/// Reads a request in PEM.
pub(super) fn read(pem: &str) -> Result<Asked, Outcome> {
    if pem.len() > CSR_MAX {
        return Err(Outcome::Oversized);
    }
    let mut all = CertificateSigningRequestDer::pem_slice_iter(pem.as_bytes());
    let (Some(Ok(der)), None) = (all.next(), all.next()) else {
        return Err(Outcome::Malformed);
    };
    let (rest, request) =
        X509CertificationRequest::from_der(&der).map_err(|_no_csr| Outcome::Malformed)?;
    if !rest.is_empty() {
        return Err(Outcome::Malformed);
    }
    let key = &request.certification_request_info.subject_pki;
    if !is_strong(key) {
        return Err(Outcome::WeakKey);
    }
    request
        .verify_signature()
        .map_err(|_not_its_key| Outcome::Malformed)?;
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, key.raw).as_ref());
    Ok(Asked {
        key: SubjectPublicKeyInfo::from_der(key.raw).map_err(|_unknown| Outcome::WeakKey)?,
        digest: hash,
    })
}

/// P-256, P-384, and RSA from 2048 bits: what every peer can verify.
fn is_strong(key: &ReadKey<'_>) -> bool {
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => RSA.contains(&rsa.key_size()),
        Ok(PublicKey::EC(point)) => matches!(point.key_size(), 256 | 384),
        Ok(_) | Err(_) => false,
    }
}

/// A certificate for `id` over the key that was asked for, in PEM.
pub(super) fn leaf(
    signer: &Signer,
    id: &SpiffeId,
    asked: &Asked,
    (now, life): (SystemTime, Duration),
) -> Result<String, rcgen::Error> {
    let mut leaf = CertificateParams::default();
    leaf.distinguished_name = DistinguishedName::new();
    leaf.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    leaf.use_authority_key_identifier_extension = true;
    leaf.serial_number = Some(serial()?);
    leaf.not_before = OffsetDateTime::from(now - BACKDATED);
    leaf.not_after = OffsetDateTime::from((now + life).min(signer.ends()));
    Ok(leaf.signed_by(&asked.key, signer.issuer())?.pem())
}

/// A serial number by chance, positive (RFC 5280, 4.1.2.2).
pub(super) fn serial() -> Result<SerialNumber, rcgen::Error> {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_unspecified| rcgen::Error::RingUnspecified)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
