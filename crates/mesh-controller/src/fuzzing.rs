// SPDX-License-Identifier: Apache-2.0
//! Fuzz target for requests to the CA: a certificate contains the requested identity and the key that
//! signed the request, and nothing else from the request.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message as _;

use super::authority::{Authority, Lifetimes, Material};
use super::outcome::Outcome;
use super::{service, sign};
use mesh_fixtures::{Seen, pem};
use mesh_identity::TrustDomain;
use mesh_identity::wire::{CertificateRequest, IMPERSONATED, Struct, Value};

const LEAF: Duration = Duration::from_secs(3600);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| {
        let lifetimes = Lifetimes {
            leaf: LEAF,
            overlap: LEAF,
        };
        let material = Material::new("cluster.local", now()).expect("a CA can be created");
        Authority::new(&material, &["ca.test".to_owned()], lifetimes, now())
            .expect("a new CA is valid")
    })
}

fn request(der: &[u8]) -> CertificateRequest {
    let identity = Value {
        string: Some("spiffe://cluster.local/ns/shop/sa/web".to_owned()),
    };
    CertificateRequest {
        csr: pem("CERTIFICATE REQUEST", der),
        validity_duration: 0,
        metadata: Some(Struct {
            fields: [(IMPERSONATED.to_owned(), identity)].into(),
        }),
    }
}

/// Reads a gRPC message after a first byte of 0, and a signing request in DER after any other byte.
pub fn csr(data: &[u8]) -> Seen {
    let request = match data.split_first() {
        None => return Seen::new(),
        Some((0, message)) => match CertificateRequest::decode(message) {
            Ok(request) => request,
            Err(_) => return vec!["undecodable"],
        },
        Some((_, der)) => request(der),
    };
    let domain = TrustDomain::new("cluster.local").expect("a trust domain");
    let id = match service::requested_identity(&request, &domain) {
        Ok(id) => id,
        Err((outcome, why)) => {
            assert!(!why.is_empty());
            return vec![outcome.label()];
        }
    };
    let csr = match sign::parse(&request.csr) {
        Ok(csr) => csr,
        Err(outcome) => return vec![outcome.label()],
    };
    let validity = sign::Validity {
        now: now(),
        life: LEAF,
    };
    let leaf = sign::leaf(&authority().signer, &id, &csr, validity);
    let leaf = leaf.expect("a parsed request can be signed");
    assert_eq!(mesh_identity::identity_of(&leaf), Some(id));
    vec![Outcome::Issued.label()]
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, IsCa, KeyPair, SanType};

    use super::*;
    use mesh_fixtures::replay;

    const OUTCOMES: &[&str] = &[
        "issued",
        "undecodable",
        "no_identity",
        "foreign_identity",
        "oversized",
        "malformed",
        "weak_key",
    ];

    fn der(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::default();
        // The CA ignores these fields.
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "root");
        params.subject_alt_names = vec![SanType::URI(
            "spiffe://cluster.local/ns/kube-system/sa/admin"
                .try_into()
                .unwrap(),
        )];
        params.is_ca = IsCa::NoCa;
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    fn message(change: impl FnOnce(&mut CertificateRequest)) -> Vec<u8> {
        let mut message = request(&der(&rcgen::PKCS_ECDSA_P256_SHA256));
        change(&mut message);
        [vec![0], message.encode_to_vec()].concat()
    }

    fn with_identity(text: Option<&str>) -> Vec<u8> {
        message(|message| {
            let identity = Value {
                string: text.map(str::to_owned),
            };
            let fields = &mut message.metadata.as_mut().unwrap().fields;
            fields.insert(IMPERSONATED.to_owned(), identity);
        })
    }

    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let behind = |der: Vec<u8>| [vec![1], der].concat();
        let good = der(&rcgen::PKCS_ECDSA_P256_SHA256);
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        vec![
            ("message", message(|_| {})),
            ("message-cut", message(|_| {})[..40].to_vec()),
            ("message-empty", vec![0]),
            (
                "validity",
                message(|message| message.validity_duration = -1),
            ),
            (
                "two-requests",
                message(|message| message.csr = message.csr.repeat(2)),
            ),
            ("text", message(|message| message.csr = "no PEM".to_owned())),
            ("long", message(|message| message.csr = "x".repeat(9000))),
            ("no-text", with_identity(None)),
            (
                "no-spiffe",
                with_identity(Some("https://cluster.local/ns/shop/sa/web")),
            ),
            ("no-domain", with_identity(Some("spiffe:///ns/shop/sa/web"))),
            (
                "domain-in-capitals",
                with_identity(Some("spiffe://Cluster.local/ns/shop/sa/web")),
            ),
            ("no-path", with_identity(Some("spiffe://cluster.local"))),
            (
                "longer-path",
                with_identity(Some("spiffe://cluster.local/ns/shop/sa/web/")),
            ),
            (
                "namespace",
                with_identity(Some("spiffe://cluster.local/ns/-shop/sa/web")),
            ),
            (
                "account",
                with_identity(Some("spiffe://cluster.local/ns/shop/sa/web..a")),
            ),
            (
                "digits",
                with_identity(Some("spiffe://cluster.local/ns/shop-2/sa/web.2-b")),
            ),
            (
                "long-name",
                with_identity(Some(&"spiffe://cluster.local/".repeat(100))),
            ),
            (
                "foreign",
                with_identity(Some("spiffe://elsewhere/ns/shop/sa/web")),
            ),
            ("p256", behind(good.clone())),
            ("p384", behind(der(&rcgen::PKCS_ECDSA_P384_SHA384))),
            ("p521", behind(der(&rcgen::PKCS_ECDSA_P521_SHA512))),
            ("rsa-2048", behind(der(&rcgen::PKCS_RSA_SHA256))),
            ("ed25519", behind(der(&rcgen::PKCS_ED25519))),
            ("forged", behind(forged)),
            ("cut", behind(good[..good.len() - 1].to_vec())),
            ("trailing", behind([good, vec![0]].concat())),
        ]
    }

    #[test]
    fn corpus_reaches_every_outcome() {
        replay("csr", csr, OUTCOMES, seeds);
    }
}
