// SPDX-License-Identifier: Apache-2.0
//! Revoked certificates are refused, and peers that were accepted before are known as revoked.

use std::{path::Path, sync::Arc, time::Duration};

use rustls::crypto::aws_lc_rs::sign::any_supported_type;

use super::pki::{Agent, DAY, Hand, Leaf, Pair, Root, config, id, impostor, shake, stranger, want};
use crate::{
    Ca, Error, Identities, Refusal, SpiffeId,
    issuer::{BoxFuture, IssueError, Issued, Issuer, Version},
    revocation,
};

/// An agent that asks a list on which nobody is.
async fn agent() -> Agent {
    Agent::with(|config, dir| {
        let path = dir.join("crl.pem");
        let other = Root::new(config.clock.now());
        std::fs::write(&path, other.revoke(&[], config.clock.now() + DAY)).unwrap();
        config.crls = vec![path];
    })
    .await
}

/// Puts a list where the agent looks, and waits until it is in force.
async fn publish(agent: &Agent, list: &str) {
    let mut changes = agent.identities.subscribe();
    let before = changes.borrow_and_update().bundle().revision();
    std::fs::write(agent.dir.path().join("crl.pem"), list).unwrap();
    let changed = changes.wait_for(|now| now.bundle().revision() != before);
    drop(changed.await.unwrap());
}

async fn as_client(agent: &Agent, pair: &Pair) -> Result<(), Refusal> {
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, server) = shake(stranger(Some(pair)).into(), server).await;
    agent.identities.who(server?.get_ref().1).map(|_| ())
}

async fn as_server(agent: &Agent, pair: &Pair) -> Result<(), Refusal> {
    let client = agent.identities.client(&id("web"), &id("db")).unwrap();
    let (client, _) = shake(client, impostor(pair).into()).await;
    agent.identities.who(client?.get_ref().1).map(|_| ())
}

#[tokio::test(start_paused = true)]
async fn a_revoked_certificate_is_refused_at_both_ends_and_known_where_it_was_believed() {
    let agent = agent().await;
    let now = agent.hand.now();
    let (web, db) = (
        agent.root.sign(Leaf::good("web", now)),
        agent.root.sign(Leaf::good("db", now)),
    );
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, believed) = shake(stranger(Some(&web)).into(), server).await;
    let proof = agent
        .identities
        .peer(believed.unwrap().get_ref().1)
        .unwrap();
    assert_eq!(as_server(&agent, &db).await, Ok(()));

    publish(&agent, &agent.root.revoke(&[&web, &db], now + DAY)).await;
    assert_eq!(as_client(&agent, &web).await, Err(Refusal::Revoked));
    assert_eq!(as_server(&agent, &db).await, Err(Refusal::Revoked));
    assert!(agent.identities.is_revoked(&proof));
    let others = agent.root.sign(Leaf::good("web", now));
    assert_eq!(as_client(&agent, &others).await, Ok(()));

    // One who was revoked by mistake.
    publish(&agent, &agent.root.revoke(&[&db], now + DAY)).await;
    assert_eq!(as_client(&agent, &web).await, Ok(()));
    assert!(!agent.identities.is_revoked(&proof));
}

#[tokio::test(start_paused = true)]
async fn a_session_of_a_revoked_client_is_not_resumed() {
    let agent = agent().await;
    let web = agent.root.sign(Leaf::good("web", agent.hand.now()));
    let client = Arc::new(stranger(Some(&web)));
    let shake_hands = async || {
        let server = agent.identities.server(&id("db")).unwrap();
        let (_, server) = shake(Arc::clone(&client), server).await;
        agent.identities.who(server?.get_ref().1)
    };
    assert_eq!(shake_hands().await, Ok(id("web")));
    assert_eq!(shake_hands().await, Ok(id("web")));
    let list = agent.root.revoke(&[&web], agent.hand.now() + DAY);
    publish(&agent, &list).await;
    assert_eq!(shake_hands().await, Err(Refusal::Revoked));
}

#[tokio::test(start_paused = true)]
async fn the_list_of_another_ca_with_the_same_name_takes_nobodys_certificate_away() {
    let agent = agent().await;
    let now = agent.hand.now();
    let web = agent.root.sign(Leaf::good("web", now));
    let foreign = Root::new(now).revoke(&[&web], now + DAY);
    publish(&agent, &foreign).await;
    assert_eq!(as_client(&agent, &web).await, Ok(()));
    // Beside it the CA's own counts, although it has expired.
    let own = agent.root.revoke(&[&web], now - Duration::from_secs(1));
    publish(&agent, &(foreign + &own)).await;
    assert_eq!(as_client(&agent, &web).await, Err(Refusal::Revoked));
}

#[tokio::test(start_paused = true)]
async fn a_broken_list_leaves_the_last_good_one_in_force() {
    let agent = agent().await;
    let now = agent.hand.now();
    let web = agent.root.sign(Leaf::good("web", now));
    publish(&agent, &agent.root.revoke(&[&web], now + DAY)).await;
    let path = agent.dir.path().join("crl.pem");
    for broken in [
        "",
        "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    ] {
        std::fs::write(&path, broken).unwrap();
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(as_client(&agent, &web).await, Err(Refusal::Revoked));
    }
    std::fs::remove_file(&path).unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(as_client(&agent, &web).await, Err(Refusal::Revoked));
}

#[tokio::test]
async fn an_agent_does_not_start_without_the_list_it_is_to_ask() {
    for content in [None, Some("nothing of the kind")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crl.pem");
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let ca = crate::Ca::SelfSigned(dir.path().to_owned());
        let mut config = super::pki::config(ca, super::pki::Hand::new().clock());
        config.crls = vec![path.clone()];
        let (_wanted, ids) = super::pki::want(&["web"]);
        let started = crate::Identities::start(config, ids).await;
        let Err(why @ Error::Crl(_)) = started.map(drop) else {
            panic!("started");
        };
        assert!(names(&why.to_string(), &path), "{why}");
    }
}

fn names(text: &str, path: &Path) -> bool {
    text.contains(&path.display().to_string())
}

/// A CA that gives whatever it is asked for.
struct Signing(Root, Hand);

impl Issuer for Signing {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        let Self(root, hand) = self;
        let pair = root.sign(Leaf::of(&id.to_string(), hand.now()));
        let key = any_supported_type(&pair.key()).unwrap();
        let issued = Issued {
            chain: pair.chain,
            key,
            roots: vec![root.der.clone()],
            version: Version(0),
        };
        Box::pin(std::future::ready(Ok(issued)))
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_own_certificate_is_revoked_asks_for_another_at_once() {
    let hand = Hand::new();
    let root = Root::new(hand.now());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    let next = hand.now() + DAY;
    std::fs::write(&path, root.revoke(&[], next)).unwrap();
    let revoked = revocation::follow(vec![path.clone()]).await.unwrap();
    let config = config(Ca::SelfSigned(dir.path().to_owned()), hand.clock());
    let (_wanted, ids) = want(&["web", "db"]);
    let issuer = Arc::new(Signing(root, hand));
    let asked: Arc<dyn Issuer> = Arc::<Signing>::clone(&issuer);
    let identities = Identities::with(asked, config, ids, revoked);
    let first = identities.ready(&id("web")).await.unwrap();
    let other = identities.ready(&id("db")).await.unwrap();
    let mut changes = identities.subscribe();
    let list = issuer.0.revoke_leaves(&[first.leaf()], next);
    std::fs::write(&path, list).unwrap();
    // The clock of certificates stands still: it is not half life that brings another.
    let replaced = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let now = identities.certificate(&id("web")).unwrap();
            if now.leaf() != first.leaf() {
                return now;
            }
            changes.changed().await.unwrap();
        }
    });
    let second = replaced.await.expect("at once");
    let now = Arc::clone(&identities.subscribe().borrow());
    assert!(!now.is_revoked(&first), "it is no longer in use");
    assert!(!now.is_revoked(&second) && !now.is_revoked(&other));
    assert_eq!(
        identities.certificate(&id("db")).unwrap().leaf(),
        other.leaf()
    );
}

#[tokio::test(start_paused = true)]
async fn a_revoked_certificate_in_files_is_used_until_there_is_another_and_not_taken_anew() {
    let agent = agent().await;
    let now = agent.hand.now();
    let first = agent.identities.certificate(&id("web")).unwrap();
    let list = agent.root.revoke_leaves(&[first.leaf()], now + DAY);
    publish(&agent, &list).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let state = Arc::clone(&agent.identities.subscribe().borrow());
    assert!(state.is_revoked(&first), "and said to be");
    assert!(agent.identities.server(&id("web")).is_ok());
    agent
        .root
        .write(agent.dir.path(), "web", Leaf::good("web", now));
    tokio::time::sleep(Duration::from_secs(120)).await;
    let second = agent.identities.certificate(&id("web")).unwrap();
    assert_ne!(second.leaf(), first.leaf());
    let state = Arc::clone(&agent.identities.subscribe().borrow());
    assert!(!state.is_revoked(&second));
}
