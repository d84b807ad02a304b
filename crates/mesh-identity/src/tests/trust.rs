// SPDX-License-Identifier: Apache-2.0
//! Trust domains that count as the same, clocks that differ, and roots that change under load.

use std::time::Duration;

use super::pki::{Agent, Leaf, id, impostor, shake, stranger};
use crate::{Refusal, SpiffeId};

const OLD: &str = "spiffe://old.example/ns/shop/sa";

#[tokio::test]
async fn an_alias_of_the_trust_domain_is_the_trust_domain() {
    let agent = Agent::with(|config, _| {
        config.aliases = vec!["old.example".parse().unwrap()];
    })
    .await;
    let now = agent.hand.now();
    for (uri, outcome) in [
        (format!("{OLD}/web"), Ok(id("web"))),
        (
            "spiffe://other.example/ns/shop/sa/web".to_owned(),
            Err(Refusal::WrongTrustDomain),
        ),
    ] {
        let pair = agent.root.sign(Leaf::of(&uri, now));
        let server = agent.identities.server(&id("db")).unwrap();
        let (_, server) = shake(stranger(Some(&pair)).into(), server).await;
        let who = server.and_then(|s| agent.identities.who(s.get_ref().1));
        assert_eq!(who, outcome, "{uri}");
    }
    // As a server it is whom the client expects, and nobody else.
    for (name, good) in [("db", true), ("cron", false)] {
        let pair = agent.root.sign(Leaf::of(&format!("{OLD}/{name}"), now));
        let client = agent.identities.client(&id("web"), &id("db")).unwrap();
        let (client, _) = shake(client, impostor(&pair).into()).await;
        assert_eq!(client.err(), (!good).then_some(Refusal::WrongIdentity));
    }
}

#[tokio::test]
async fn without_the_alias_it_is_another_trust_domain() {
    let agent = Agent::start().await;
    let uri = format!("{OLD}/web");
    assert!(SpiffeId::parse(&uri).is_ok());
    let pair = agent.root.sign(Leaf::of(&uri, agent.hand.now()));
    let server = agent.identities.server(&id("db")).unwrap();
    let (_, server) = shake(stranger(Some(&pair)).into(), server).await;
    assert_eq!(server.err(), Some(Refusal::WrongTrustDomain));
}

#[tokio::test]
async fn a_clock_that_is_a_little_behind_is_borne_and_reported() {
    let agent = Agent::start().await;
    let now = agent.hand.now();
    assert_eq!(agent.identities.clock_skew(), Duration::ZERO);
    for (minutes, outcome) in [(4, None), (6, Some(Refusal::NotYetValid))] {
        let pair = agent.root.sign(Leaf {
            not_before: now + Duration::from_secs(60 * minutes),
            ..Leaf::good("web", now)
        });
        let server = agent.identities.server(&id("db")).unwrap();
        let (_, server) = shake(stranger(Some(&pair)).into(), server).await;
        assert_eq!(server.err(), outcome, "{minutes} minutes");
    }
    assert_eq!(agent.identities.clock_skew(), Duration::from_secs(240));
}
