// SPDX-License-Identifier: Apache-2.0
//! Issues a certificate for a signing request.
//!
//! Only the public key of a request is used; the signature proves that the requester has the private
//! key. Names, usages and validity in the request are ignored: the identity is proven otherwise.

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
use super::outcome::Outcome;
use mesh_identity::SpiffeId;

/// Maximum size of a request in PEM. A request with an RSA key of 8192 bits and some names has 3 KiB.
const MAX_CSR_BYTES: usize = 8 << 10;
/// The time between the start of a certificate's validity and its issuance, for clocks that differ.
const BACKDATED: Duration = Duration::from_secs(600);
/// Accepted sizes of RSA keys, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// A verified signing request.
#[derive(Debug)]
pub(super) struct SigningRequest {
    key: SubjectPublicKeyInfo,
    /// SHA-256 of the public key.
    pub(super) digest: [u8; 32],
}

/// Parses and verifies a signing request in PEM.
pub(super) fn parse(pem: &str) -> Result<SigningRequest, Outcome> {
    if pem.len() > MAX_CSR_BYTES {
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
    Ok(SigningRequest {
        key: SubjectPublicKeyInfo::from_der(key.raw).map_err(|_unknown| Outcome::WeakKey)?,
        digest: hash,
    })
}

/// Tells whether every peer can verify the key: P-256, P-384, or RSA with at least 2048 bits.
fn is_strong(key: &ReadKey<'_>) -> bool {
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => RSA_BITS.contains(&rsa.key_size()),
        Ok(PublicKey::EC(point)) => matches!(point.key_size(), 256 | 384),
        Ok(_) | Err(_) => false,
    }
}

/// The validity of a certificate to issue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Validity {
    pub(super) now: SystemTime,
    pub(super) life: Duration,
}

/// Issues a certificate for `id` and the key of the request. Returns PEM.
pub(super) fn leaf(
    signer: &Signer,
    id: &SpiffeId,
    csr: &SigningRequest,
    Validity { now, life }: Validity,
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
    leaf.not_after = OffsetDateTime::from((now + life).min(signer.not_after()));
    Ok(leaf.signed_by(&csr.key, signer.issuer())?.pem())
}

/// Returns a random positive serial number (RFC 5280, 4.1.2.2).
pub(super) fn serial() -> Result<SerialNumber, rcgen::Error> {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_unspecified| rcgen::Error::RingUnspecified)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
