// SPDX-License-Identifier: Apache-2.0
//! The peers that a handshake accepts, and the reasons with which it refuses all others.

use std::{sync::Arc, time::Duration};

use rcgen::{ExtendedKeyUsagePurpose, KeyUsagePurpose};
use rustls::{CipherSuite, NamedGroup, ProtocolVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use super::pki::{Agent, Leaf, Pair, Root, id, impostor, shake, stranger};
use crate::{Error, Refusal};

const FOREIGN: &str = "spiffe://other.domain/ns/shop/sa/web";

#[tokio::test]
async fn both_ends_prove_who_they_are_with_the_algorithms_of_the_mesh() {
    let agent = Agent::start().await;
    let client = agent.identities.client(&id("web"), &id("db")).unwrap();
    let server = agent.identities.server(&id("db")).unwrap();
    let (client, server) = shake(client, server).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(agent.identities.who(client.get_ref().1), Ok(id("db")));
    assert_eq!(agent.identities.who(server.get_ref().1), Ok(id("web")));
    let connection = server.get_ref().1;
    assert_eq!(
        connection.protocol_version(),
        Some(ProtocolVersion::TLSv1_3)
    );
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    let group = connection.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(connection.server_name(), None);
}

type Row = (&'static str, Pair, Refusal);

/// Every bad certificate that a peer of either side may show.
fn bad_leaves(agent: &Agent) -> Vec<Row> {
    let now = agent.hand.now();
    let hour = Duration::from_secs(3600);
    let foreign = Root::new(now).sign(Leaf::good("web", now));
    let mut past = Leaf::good("web", now);
    (past.not_before, past.not_after) = (now - 2 * hour, now - hour);
    let mut future = Leaf::good("web", now);
    future.not_before = now + hour;
    let mut rows = vec![
        ("foreign CA of the same name", foreign, Refusal::UnknownCa),
        ("expired", agent.root.sign(past), Refusal::Expired),
        (
            "not yet valid",
            agent.root.sign(future),
            Refusal::NotYetValid,
        ),
    ];
    rows.extend(bad_names(agent));
    rows.extend(bad_usages(agent));
    rows
}

fn bad_names(agent: &Agent) -> impl Iterator<Item = Row> {
    let (web, db) = (id("web").to_string(), id("db").to_string());
    let malformed = format!("{web}/");
    let rows: [(_, &[&str], _); 6] = [
        ("wrong trust domain", &[FOREIGN], Refusal::WrongTrustDomain),
        ("two URI names", &[&web, &db], Refusal::SeveralNames),
        ("the same name twice", &[&web, &web], Refusal::SeveralNames),
        ("no name", &[], Refusal::NoSpiffeId),
        (
            "a web address",
            &["https://cluster.local/"],
            Refusal::NoSpiffeId,
        ),
        ("a malformed id", &[&malformed], Refusal::NoSpiffeId),
    ];
    rows.map(|(name, uris, reason)| {
        let mut leaf = Leaf::good("web", agent.hand.now());
        leaf.uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        (name, agent.root.sign(leaf), reason)
    })
    .into_iter()
}

fn bad_usages(agent: &Agent) -> impl Iterator<Item = Row> {
    use KeyUsagePurpose::{DigitalSignature, KeyAgreement, KeyCertSign};
    let good = || Leaf::good("web", agent.hand.now());
    let mut ca = good();
    ca.ca = true;
    let mut mail = good();
    mail.extended = vec![ExtendedKeyUsagePurpose::EmailProtection];
    let with = |usages: &[KeyUsagePurpose]| {
        let mut leaf = good();
        leaf.key_usages = usages.to_vec();
        leaf
    };
    [
        ("a CA", ca),
        ("for e-mail", mail),
        ("no key usage", with(&[])),
        ("other key usage", with(&[KeyAgreement])),
        (
            "may sign certificates",
            with(&[DigitalSignature, KeyCertSign]),
        ),
    ]
    .map(|(name, leaf)| (name, agent.root.sign(leaf), Refusal::WrongUsage))
    .into_iter()
}

#[tokio::test]
async fn each_bad_client_is_refused_with_its_own_reason() {
    let agent = Agent::start().await;
    let mut rows = bad_leaves(&agent);
    let server_only = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = Leaf {
        extended: server_only,
        ..Leaf::good("web", agent.hand.now())
    };
    rows.push((
        "for servers only",
        agent.root.sign(leaf),
        Refusal::WrongUsage,
    ));
    for (name, pair, reason) in rows {
        let server = agent.identities.server(&id("db")).unwrap();
        let (client, server) = shake(Arc::new(stranger(Some(&pair))), server).await;
        assert_eq!(server.err(), Some(reason), "{name}");
        assert!(
            matches!(client, Err(Refusal::RefusedByPeer(_))),
            "{name}: told so"
        );
    }
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, server) = shake(Arc::new(stranger(None)), server).await;
    assert_eq!(server.err(), Some(Refusal::NoCertificate));
}

#[tokio::test]
async fn each_bad_server_is_refused_with_its_own_reason() {
    let agent = Agent::start().await;
    let mut rows = bad_leaves(&agent);
    let client_only = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = Leaf {
        extended: client_only,
        ..Leaf::good("web", agent.hand.now())
    };
    rows.push((
        "for clients only",
        agent.root.sign(leaf),
        Refusal::WrongUsage,
    ));
    let other = agent.root.sign(Leaf::good("db", agent.hand.now()));
    rows.push(("right CA, other identity", other, Refusal::WrongIdentity));
    for (name, pair, reason) in rows {
        let client = agent.identities.client(&id("cron"), &id("web")).unwrap();
        let (client, server) = shake(client, Arc::new(impostor(&pair))).await;
        assert_eq!(client.err(), Some(reason), "{name}");
        assert!(
            matches!(server, Err(Refusal::RefusedByPeer(_))),
            "{name}: told so"
        );
    }
}

#[tokio::test]
async fn the_control_for_both_tables_is_accepted() {
    let agent = Agent::start().await;
    let pair = agent.root.sign(Leaf::good("web", agent.hand.now()));
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, server) = shake(Arc::new(stranger(Some(&pair))), server).await;
    assert_eq!(
        agent.identities.who(server.unwrap().get_ref().1),
        Ok(id("web"))
    );
    let client = agent.identities.client(&id("cron"), &id("web")).unwrap();
    let (client, _) = shake(client, Arc::new(impostor(&pair))).await;
    assert_eq!(
        agent.identities.who(client.unwrap().get_ref().1),
        Ok(id("web"))
    );
}

#[tokio::test]
async fn nobody_without_the_protocol_is_a_peer() {
    let agent = Agent::start().await;
    let pair = agent.root.sign(Leaf::good("web", agent.hand.now()));
    let mut none = stranger(Some(&pair));
    none.alpn_protocols.clear();
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, server) = shake(Arc::new(none), server).await;
    assert_eq!(
        agent.identities.who(server.unwrap().get_ref().1),
        Err(Refusal::Protocol)
    );

    let mut other = stranger(Some(&pair));
    other.alpn_protocols = vec![b"h2".to_vec()];
    let server = agent.identities.server(&id("db")).unwrap();
    let (client, server) = shake(Arc::new(other), server).await;
    assert_eq!(
        (client.err(), server.err()),
        (Some(Refusal::Protocol), Some(Refusal::Protocol))
    );

    let mut server = impostor(&pair);
    server.alpn_protocols.clear();
    let client = agent.identities.client(&id("cron"), &id("web")).unwrap();
    let (client, _) = shake(client, Arc::new(server)).await;
    let proven = client.and_then(|client| agent.identities.who(client.get_ref().1));
    assert_eq!(proven, Err(Refusal::Protocol));
}

/// A ClientHello as TLS 1.2 has it: one suite, two extensions, no supported_versions.
fn tls12_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([9; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    let extensions = [0, 10, 0, 4, 0, 2, 0, 29, 0, 13, 0, 4, 0, 2, 4, 3];
    body.extend([0, 16]);
    body.extend(extensions);
    let length = u8::try_from(body.len()).unwrap();
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(body);
    record
}

#[tokio::test]
async fn what_is_not_tls_13_is_refused() {
    let agent = Agent::start().await;
    let rows: [(&str, Vec<u8>, Refusal); 5] = [
        ("TLS 1.2", tls12_hello(), Refusal::TlsVersion),
        (
            "HTTP",
            b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n".to_vec(),
            Refusal::NotTls,
        ),
        ("zeros", vec![0; 64], Refusal::NotTls),
        ("nothing", vec![], Refusal::Closed),
        (
            "half a hello",
            tls12_hello()[..20].to_vec(),
            Refusal::Closed,
        ),
    ];
    for (name, bytes, reason) in rows {
        let (mut near, far) = tokio::io::duplex(1 << 16);
        let server = agent.identities.server(&id("db")).unwrap();
        let accept = TlsAcceptor::from(server).accept(far);
        let talk = async {
            near.write_all(&bytes).await.unwrap();
            near.shutdown().await.unwrap();
            let mut answer = Vec::new();
            near.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let (result, answer) = tokio::join!(accept, talk);
        assert_eq!(
            result.err().map(|e| Refusal::of_io(&e)),
            Some(reason),
            "{name}"
        );
        // An alert at most: neither a certificate nor a name.
        assert!(answer.len() <= 7, "{name}: {answer:?}");
    }
}

#[tokio::test]
async fn names_that_nobody_can_prove_here_have_no_configuration() {
    let agent = Agent::start().await;
    let foreign = FOREIGN.parse().unwrap();
    let refused = agent.identities.client(&id("web"), &foreign);
    assert!(matches!(refused, Err(Error::Foreign(_))));
    assert!(matches!(
        agent.identities.client(&id("x"), &id("db")),
        Err(Error::NotReady(_))
    ));
    assert!(matches!(
        agent.identities.server(&id("x")),
        Err(Error::NotReady(_))
    ));
}

#[tokio::test]
async fn a_client_hello_says_nothing_of_who_is_called() {
    let agent = Agent::start().await;
    let client = agent.identities.client(&id("web"), &id("db")).unwrap();
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let name = crate::server_name([10, 1, 2, 3].into());
    let dial = tokio::spawn(tokio_rustls::TlsConnector::from(client).connect(name, near));
    let mut hello = vec![0; 1 << 14];
    let read = far.read(&mut hello).await.unwrap();
    hello.truncate(read);
    dial.abort();
    assert_eq!(hello.first(), Some(&22));
    for secret in ["shop", "web", "cluster", "spiffe", "10.1.2.3"] {
        let found = hello
            .windows(secret.len())
            .any(|window| window == secret.as_bytes());
        assert!(!found, "{secret}");
    }
    assert!(
        !hello.windows(4).any(|window| window == [10, 1, 2, 3]),
        "the address"
    );
}
