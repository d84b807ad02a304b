// SPDX-License-Identifier: Apache-2.0
//! Sessions are resumed between the same two identities, under the same certificates, only.

use std::{sync::Arc, time::Duration};

use rustls::HandshakeKind::{Full, Resumed};

use super::pki::{Agent, DAY, Leaf, Root, id, impostor, shake, stranger};
use crate::{Error, Refusal};

async fn kind(agent: &Agent, own: &str, peer: &str) -> rustls::HandshakeKind {
    let client = agent.identities.client(&id(own), &id(peer)).unwrap();
    let server = agent.identities.server(&id(peer)).unwrap();
    let (client, server) = shake(client, server).await;
    assert_eq!(
        agent.identities.who(client.unwrap().get_ref().1),
        Ok(id(peer))
    );
    let server = server.unwrap();
    assert_eq!(agent.identities.who(server.get_ref().1), Ok(id(own)));
    server.get_ref().1.handshake_kind().unwrap()
}

#[tokio::test]
async fn four_connections_at_once_are_resumed_after_one() {
    let agent = Agent::start().await;
    assert_eq!(kind(&agent, "web", "db").await, Full);
    // None gives new tickets before all have taken one.
    let client = agent.identities.client(&id("web"), &id("db")).unwrap();
    let server = agent.identities.server(&id("db")).unwrap();
    let one = || shake(Arc::clone(&client), Arc::clone(&server));
    let (a, b, c, d) = tokio::join!(one(), one(), one(), one());
    for (_, server) in [a, b, c, d] {
        assert_eq!(server.unwrap().get_ref().1.handshake_kind(), Some(Resumed));
    }
}

#[tokio::test]
async fn no_pair_of_identities_takes_the_sessions_of_another() {
    let agent = Agent::start().await;
    assert_eq!(kind(&agent, "web", "db").await, Full);
    assert_eq!(kind(&agent, "web", "db").await, Resumed);
    assert_eq!(kind(&agent, "cron", "db").await, Full);
    assert_eq!(kind(&agent, "web", "cron").await, Full);
    assert_eq!(kind(&agent, "db", "web").await, Full);
    assert_eq!(kind(&agent, "web", "db").await, Resumed);
}

#[tokio::test]
async fn a_ticket_of_one_served_identity_is_nothing_to_another() {
    let agent = Agent::start().await;
    let pair = agent.root.sign(Leaf::good("web", agent.hand.now()));
    // One store for all: it offers to `cron` what it has from `db`.
    let client = Arc::new(stranger(Some(&pair)));
    let to = |name| {
        shake(
            Arc::clone(&client),
            agent.identities.server(&id(name)).unwrap(),
        )
    };
    let handshake = |(_, server): (_, Result<super::pki::Server, Refusal>)| {
        server.unwrap().get_ref().1.handshake_kind().unwrap()
    };
    assert_eq!(handshake(to("db").await), Full);
    assert_eq!(handshake(to("db").await), Resumed, "the control");
    assert_eq!(handshake(to("cron").await), Full);
}

#[tokio::test]
async fn a_resumed_session_does_not_outlive_the_clients_certificate() {
    let agent = Agent::start().await;
    let hour = Duration::from_secs(3600);
    let now = agent.hand.now();
    let pair = agent.root.sign(Leaf {
        not_after: now + hour,
        ..Leaf::good("web", now)
    });
    let client = Arc::new(stranger(Some(&pair)));
    let once = || {
        shake(
            Arc::clone(&client),
            agent.identities.server(&id("db")).unwrap(),
        )
    };
    let (_, first) = once().await;
    assert_eq!(
        agent.identities.who(first.unwrap().get_ref().1),
        Ok(id("web"))
    );
    agent.hand.forward(2 * hour);
    let (_, again) = once().await;
    let again = again.unwrap();
    assert_eq!(
        again.get_ref().1.handshake_kind(),
        Some(Resumed),
        "TLS itself does not look"
    );
    assert_eq!(
        agent.identities.who(again.get_ref().1),
        Err(Refusal::Expired)
    );
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_stands_as_long_as_both_certificates_do() {
    let hour = Duration::from_secs(3600);
    // The lives of the own certificate and of the peer's.
    for (own, peer) in [(DAY, hour), (hour, DAY), (DAY, DAY)] {
        let agent = Agent::start().await;
        let start = agent.hand.now();
        let life = |life, name| Leaf {
            not_after: start + life,
            ..Leaf::good(name, start)
        };
        let mut changes = agent.identities.subscribe();
        let before = agent.identities.epoch(&id("web"));
        agent.root.write(agent.dir.path(), "web", life(own, "web"));
        let changed = changes.wait_for(|now| now.epoch(&id("web")) != before);
        drop(changed.await.unwrap());
        let pair = agent.root.sign(life(peer, "db"));
        let client = agent.identities.client(&id("web"), &id("db")).unwrap();
        let (client, _) = shake(client, impostor(&pair).into()).await;
        let proof = agent.identities.peer(client.unwrap().get_ref().1).unwrap();
        let stands = || agent.identities.stands(&id("web"), &proof);
        agent.hand.forward(hour - Duration::from_secs(1));
        assert!(stands(), "{own:?} {peer:?}");
        agent.hand.forward(Duration::from_secs(1));
        assert_eq!(stands(), own == peer, "{own:?} {peer:?}");
    }
}

#[tokio::test]
async fn tickets_end_with_the_certificate_that_they_were_made_under() {
    let agent = Agent::start().await;
    let server = agent.identities.server(&id("db")).unwrap();
    let long = server.ticketer.lifetime();
    assert!(long > 3600);
    let ticket = server.ticketer.encrypt(b"session").unwrap();
    agent.hand.forward(DAY - Duration::from_secs(100));
    assert!((1..=100).contains(&server.ticketer.lifetime()));
    assert_eq!(
        server.ticketer.decrypt(&ticket).as_deref(),
        Some(&b"session"[..])
    );
    agent.hand.forward(Duration::from_secs(100));
    assert_eq!(server.ticketer.lifetime(), 0);
    assert_eq!(server.ticketer.decrypt(&ticket), None);
    assert_eq!(server.ticketer.encrypt(b"session"), None);
    assert!(matches!(
        agent.identities.server(&id("db")),
        Err(Error::Expired(_))
    ));
    assert!(matches!(
        agent.identities.client(&id("db"), &id("web")),
        Err(Error::Expired(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn a_new_certificate_and_a_new_root_end_all_sessions() {
    let agent = Agent::start().await;
    let mut changes = agent.identities.subscribe();
    assert_eq!(kind(&agent, "web", "db").await, Full);
    assert_eq!(kind(&agent, "web", "db").await, Resumed);

    let before = agent.identities.epoch(&id("web")).unwrap();
    agent
        .root
        .write(agent.dir.path(), "web", Leaf::good("web", agent.hand.now()));
    changes
        .wait_for(|now| now.epoch(&id("web")) != Some(before))
        .await
        .unwrap();
    let after = agent.identities.epoch(&id("web")).unwrap();
    assert_eq!(after.bundle, before.bundle);
    assert_eq!(kind(&agent, "web", "db").await, Full);
    assert_eq!(kind(&agent, "web", "db").await, Resumed);

    // A second root that comes with one identity is believed by all, beside the first.
    let second = Root::new(agent.hand.now());
    let db = agent.identities.epoch(&id("db")).unwrap();
    second.write(
        agent.dir.path(),
        "cron",
        Leaf::good("cron", agent.hand.now()),
    );
    changes
        .wait_for(|now| now.epoch(&id("db")) != Some(db))
        .await
        .unwrap();
    assert_eq!(changes.borrow().bundle().roots().len(), 2);
    assert_eq!(kind(&agent, "web", "db").await, Full);
    assert_eq!(kind(&agent, "web", "cron").await, Full);
    assert_eq!(kind(&agent, "cron", "db").await, Full);

    // The first is forgotten with the last certificate that came with it.
    for name in ["web", "db"] {
        second.write(agent.dir.path(), name, Leaf::good(name, agent.hand.now()));
    }
    changes
        .wait_for(|now| now.bundle().roots() == [second.der.clone()])
        .await
        .unwrap();
    let old = agent.root.sign(Leaf::good("web", agent.hand.now()));
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, server) = shake(Arc::new(stranger(Some(&old))), server).await;
    assert_eq!(server.err(), Some(Refusal::UnknownCa));
}
