// SPDX-License-Identifier: Apache-2.0
//! Any bytes as what proves a peer: its chain, revocation lists, a CA's answer. Nobody guesses a
//! signature, so an input brings its own root, and leaves are also read by themselves.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prost::Message as _;
use rustls::{
    crypto::CryptoProvider,
    pki_types::{CertificateDer, UnixTime},
};
use webpki::KeyUsage;

use super::{
    Refusal, SpiffeId, TrustDomain,
    issuer::{IssueError, split, wire::CertificateResponse},
    revocation::{self, Revoked},
    tls,
    verify::{Bundle, Rules, Skew, Trust, read_leaf},
};
use mesh_fixtures::{Seen, pieces};

/// The moment of all inputs: certificates of a corpus must not end.
pub(super) const NOW: u64 = 1_800_000_000;

fn rules(bundle: Bundle) -> Rules {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let domain = |name| TrustDomain::new(name).expect("a trust domain");
    Rules {
        alpn: b"test",
        provider: Arc::clone(PROVIDER.get_or_init(tls::provider)),
        trust: Trust {
            domain: domain("cluster.local"),
            aliases: [domain("old.local")].into(),
        },
        bundle: Arc::new(bundle),
        skew: Arc::new(Skew::default()),
    }
}

/// A root, a file of revocation lists (or nothing), a leaf, and what is above it.
pub fn certificate(data: &[u8]) -> Seen {
    let mut seen = Seen::new();
    let mut pieces = pieces(data).into_iter();
    let (Some(root), Some(lists), Some(leaf)) = (pieces.next(), pieces.next(), pieces.next())
    else {
        return seen;
    };
    let above: Vec<_> = pieces.map(CertificateDer::from).collect();
    let leaf = CertificateDer::from(leaf);
    let (bundle, unreadable) = Bundle::new([CertificateDer::from(root.to_vec())]);
    if unreadable > 0 {
        seen.push("root_unreadable");
    }
    let lists = revocation::parse(lists).unwrap_or_default();
    let rules = rules(bundle.with(Arc::new(Revoked::of(Path::new("crl"), lists))));
    let read = read_leaf(&leaf);
    seen.push(read.as_ref().map_or_else(way, |_| "leaf"));
    if let Ok(read) = &read {
        assert_eq!(SpiffeId::parse(&read.id.to_string()).as_ref(), Ok(&read.id));
        assert!(read.id.namespace().len() <= 63 && read.id.service_account().len() <= 253);
    }
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW));
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        let proven = rules.prove(&leaf, &above, now, usage);
        seen.push(match &proven {
            Ok(_) => "proven",
            Err(Refusal::WrongUsage) => "chain_wrong_usage",
            Err(Refusal::BadCertificate) => "chain_bad_certificate",
            Err(why) => way(why),
        });
        if let Ok(proven) = proven {
            assert_eq!(proven.id.trust_domain(), &rules.trust.domain);
            assert!(read.is_ok_and(|read| read.not_after == proven.not_after));
            let chain: Vec<_> = std::iter::once(leaf.clone()).chain(above).collect();
            let revoked = rules.is_revoked_now(&chain, now);
            assert!(!revoked || usage_differs(&rules, &chain, now));
            break;
        }
    }
    seen
}

/// Whether a chain is good for one use and not for the other: only then may a use that is not
/// revoked stand beside one that is.
fn usage_differs(rules: &Rules, chain: &[CertificateDer<'_>], now: UnixTime) -> bool {
    let (leaf, above) = chain.split_first().expect("it has a leaf");
    let proven = |usage| rules.prove(leaf, above, now, usage).is_ok();
    proven(KeyUsage::client_auth()) != proven(KeyUsage::server_auth())
}

fn way(why: &Refusal) -> &'static str {
    Refusal::LABELS[why.index()]
}

/// A file of revocation lists.
pub fn crl(data: &[u8]) -> Seen {
    let lists = match revocation::parse(data) {
        Ok(lists) => lists,
        Err(why) => {
            assert!(!why.is_empty());
            return vec!["refused"];
        }
    };
    assert!(!lists.is_empty(), "no list is as wrong as a broken one");
    let seen = lists
        .iter()
        .map(|(_, next)| next.map_or("no_next_update", |_| "list"))
        .collect();
    let all = Revoked::of(Path::new("crl"), lists);
    assert!(all.naming(&CertificateDer::from(data), &[]).is_empty());
    seen
}

/// A CA's answer: behind a first byte of 0 as it comes over gRPC, else certificates in DER that are
/// put into one.
pub fn answer(data: &[u8]) -> Seen {
    let texts = match data.split_first() {
        None => return Seen::new(),
        Some((0, message)) => match CertificateResponse::decode(message) {
            Ok(response) => response.cert_chain,
            Err(_) => return vec!["undecodable"],
        },
        Some((_, ders)) => pieces(ders).into_iter().map(pem).collect(),
    };
    let (chain, roots) = match split(&texts) {
        Ok(parts) => parts,
        Err(IssueError::Empty) => return vec!["empty"],
        Err(_) => return vec!["no_pem"],
    };
    assert!(!chain.is_empty() && !roots.is_empty());
    let given = roots.len();
    let (bundle, unreadable) = Bundle::new(roots);
    assert!(bundle.roots().len() + unreadable <= given);
    let mut seen = vec![if unreadable > 0 {
        "root_unreadable"
    } else {
        "roots"
    }];
    seen.push(read_leaf(&chain[0]).map_or("no_leaf", |_| "leaf"));
    let (leaf, above) = chain.split_first().expect("it is not empty");
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW));
    let proven = rules(bundle).prove(leaf, above, now, KeyUsage::client_auth());
    seen.push(proven.map_or("not_proven", |_| "proven"));
    seen
}

fn pem(der: &[u8]) -> String {
    mesh_fixtures::pem("CERTIFICATE", der)
}
