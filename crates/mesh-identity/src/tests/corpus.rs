// SPDX-License-Identifier: Apache-2.0
//! The corpus of certificates, revocation lists and answers of a CA.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message as _;
use rcgen::{ExtendedKeyUsagePurpose, KeyUsagePurpose};
use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject as _};

use super::pki::{DAY, Leaf, Root};
use crate::{
    fuzzing::{self as fuzz, NOW},
    wire::CertificateResponse,
};
use mesh_fixtures::{join, replay};

type Seeds = Vec<(&'static str, Vec<u8>)>;

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

fn good() -> Leaf {
    Leaf::good("web", now())
}

/// The content of a leaf certificate, and the expected refusal, if any.
fn leaves() -> Vec<(&'static str, Leaf)> {
    let of = |uri: &str| Leaf::of(uri, now());
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    vec![
        ("good", good()),
        ("alias", of("spiffe://old.local/ns/shop/sa/web")),
        ("foreign-domain", of("spiffe://elsewhere/ns/shop/sa/web")),
        ("no-spiffe", of("https://cluster.local/")),
        (
            "no-name",
            Leaf {
                uris: Vec::new(),
                ..good()
            },
        ),
        ("two-names", {
            let mut leaf = good();
            leaf.uris.push(other.to_owned());
            leaf
        }),
        (
            "address-too",
            Leaf {
                address: Some([10, 0, 0, 1].into()),
                ..good()
            },
        ),
        ("ca", Leaf { ca: true, ..good() }),
        (
            "no-usage",
            Leaf {
                key_usages: Vec::new(),
                ..good()
            },
        ),
        (
            "signs-certificates",
            Leaf {
                key_usages: vec![
                    KeyUsagePurpose::DigitalSignature,
                    KeyUsagePurpose::KeyCertSign,
                ],
                ..good()
            },
        ),
        (
            "server-only",
            Leaf {
                extended: vec![ExtendedKeyUsagePurpose::ServerAuth],
                ..good()
            },
        ),
        (
            "signs-code",
            Leaf {
                extended: vec![ExtendedKeyUsagePurpose::CodeSigning],
                ..good()
            },
        ),
        (
            "expired",
            Leaf {
                not_after: now() - Duration::from_secs(1),
                ..good()
            },
        ),
        (
            "soon",
            Leaf {
                not_before: now() + Duration::from_secs(200),
                ..good()
            },
        ),
        (
            "future",
            Leaf {
                not_before: now() + DAY / 2,
                ..good()
            },
        ),
    ]
}

fn certificates() -> Seeds {
    let root = Root::new(now());
    let stranger = Root::new(now());
    let mut seeds: Seeds = leaves()
        .into_iter()
        .map(|(name, leaf)| {
            let chain = root.sign(leaf).chain;
            (name, join(&[&root.der, b"", &chain[0]]))
        })
        .collect();
    let pair = root.sign(good());
    let leaf = &pair.chain[0];
    let own = root.revoke(&[&pair], now() + DAY);
    let der = CertificateRevocationListDer::from_pem_slice(own.as_bytes()).unwrap();
    let foreign = stranger.revoke(&[&pair], now() + DAY);
    let mut forged = leaf.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let behind = [&leaf[..], &[0]].concat();
    seeds.extend([
        ("revoked", join(&[&root.der, &der, leaf])),
        (
            "revoked-by-somebody-else",
            join(&[&root.der, foreign.as_bytes(), leaf]),
        ),
        ("foreign-root", join(&[&stranger.der, b"", leaf])),
        ("forged", join(&[&root.der, b"", &forged])),
        ("with-its-root", join(&[&root.der, b"", leaf, &root.der])),
        ("behind", join(&[&root.der, b"", &behind])),
        ("cut", join(&[&root.der, b"", &leaf[..leaf.len() / 2]])),
        ("no-root", join(&[b"no root", b"", leaf])),
        ("nothing", Vec::new()),
    ]);
    seeds
}

#[test]
fn certificates_go_every_way() {
    let ways = [
        "leaf",
        "proven",
        "root_unreadable",
        "unknown_ca",
        "expired",
        "not_yet_valid",
        "revoked",
        "wrong_trust_domain",
        "no_spiffe_id",
        "several_names",
        "wrong_usage",
        "bad_certificate",
        "chain_wrong_usage",
        "chain_bad_certificate",
    ];
    replay("certificate", fuzz::certificate, &ways, certificates);
}

fn lists() -> Seeds {
    let root = Root::new(now());
    let pairs = [root.sign(good()), root.sign(good())];
    let two = root.revoke(&[&pairs[0], &pairs[1]], now() + DAY);
    let none = root.revoke(&[], now() + DAY);
    let der = CertificateRevocationListDer::from_pem_slice(two.as_bytes()).unwrap();
    vec![
        ("two-of-them", two.clone().into_bytes()),
        ("two-lists", (two.clone() + &none).into_bytes()),
        ("der", der.to_vec()),
        ("der-cut", der[..der.len() - 3].to_vec()),
        ("pem-cut", two.as_bytes()[..two.len() / 2].to_vec()),
        (
            "pem-of-nothing",
            b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".to_vec(),
        ),
        ("a-certificate", root.pem.into_bytes()),
        ("nothing", Vec::new()),
    ]
}

#[test]
fn revocation_lists_go_every_way() {
    replay("crl", fuzz::crl, &["list", "refused"], lists);
}

fn answers() -> Seeds {
    let root = Root::new(now());
    let pair = root.sign(good());
    let leaf = &pair.chain[0];
    let message = |texts: &[&str]| {
        let cert_chain = texts.iter().map(|text| (*text).to_owned()).collect();
        [vec![0], CertificateResponse { cert_chain }.encode_to_vec()].concat()
    };
    let der = |ders: &[&[u8]]| [vec![1], join(ders)].concat();
    let two_roots = root.pem.clone() + &Root::new(now()).pem;
    vec![
        ("leaf-and-root", message(&[&pair.chain_pem, &root.pem])),
        ("two-roots", message(&[&pair.chain_pem, &two_roots])),
        ("leaf-alone", message(&[&pair.chain_pem])),
        ("no-text", message(&[])),
        ("no-pem", message(&["leaf", "root"])),
        ("der", der(&[leaf, &root.der])),
        ("root-is-no-certificate", der(&[leaf, b"root"])),
        ("leaf-is-no-certificate", der(&[b"leaf", &root.der])),
        ("leaf-of-nobody", der(&[leaf, &Root::new(now()).der])),
        ("undecodable", vec![0, 0x0a, 0xff]),
        ("nothing", Vec::new()),
    ]
}

#[test]
fn answers_go_every_way() {
    let ways = [
        "undecodable",
        "empty",
        "no_pem",
        "roots",
        "root_unreadable",
        "leaf",
        "no_leaf",
        "proven",
        "not_proven",
    ];
    replay("answer", fuzz::answer, &ways, answers);
}
