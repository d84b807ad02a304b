// SPDX-License-Identifier: Apache-2.0
//! Policy evaluated without agents, and explanations that agree with it.

use std::net::IpAddr;

use mesh_common::{Direction, Evidence, Protocol, Reason, Verdict};
use mesh_plan::evaluate::{Connection, Evaluator};
use mesh_plan::explain::{Conclusion, walk};

use crate::random::{ADDRESSES, world};
use crate::support::*;

fn tcp<'a>(evaluator: &'a Evaluator, from: &str, to: &str, port: u16) -> Connection<'a> {
    evaluator.connection([ip(from), ip(to)], Protocol::TCP, port)
}

/// The steps and the conclusion of one side, and the verdict and rule of the compiled policy.
struct Side {
    steps: Vec<String>,
    conclusion: Conclusion,
    verdict: Verdict,
    rule: String,
}

fn side(
    evaluator: &Evaluator,
    connection: &Connection<'_>,
    direction: Direction,
    evidence: Evidence,
) -> Option<Side> {
    let (pod, question) = evaluator.question(connection, direction, evidence)?;
    let index = evaluator.index(pod).expect("a pod of the cluster");
    let verdict = mesh_common::policy::decide(index, &question);
    let peer = match direction {
        Direction::Ingress => connection.from,
        Direction::Egress => connection.to,
    };
    let (steps, conclusion) = walk(evaluator.cluster(), pod, peer, question, verdict);
    Some(Side {
        steps,
        conclusion,
        verdict,
        rule: mesh_plan::text::rule(index, verdict.rule),
    })
}

#[test]
fn evaluation_covers_both_endpoints() {
    let world = World::new()
        .namespace("shop", "")
        .pod("shop/web", "10.1.1.1,fd01::1", "app=web")
        .pod("shop/db", "10.1.2.2", "app=db")
        .policy(
            "NetworkPolicy shop/in",
            policy("shop", "app=db").ingress([allow("pods(app=web)")]),
        )
        .policy(
            "NetworkPolicy shop/out",
            policy("shop", "app=web").egress([allow("* : tcp/1")]),
        );
    let evaluator = Evaluator::new(world.0);
    assert_eq!(evaluator.rejections(), []);
    let ask = |from: &str, to: &str, port| {
        let connection = tcp(&evaluator, from, to, port);
        let verdicts = evaluator.verdicts(&connection, evaluator.evidence(&connection));
        let word = |side: Option<Verdict>| side.map(|v| v.allowed);
        (
            word(verdicts.egress),
            word(verdicts.ingress),
            verdicts.allowed(),
        )
    };
    let (web, db) = ("10.1.1.1", "10.1.2.2");
    assert_eq!(ask(web, db, 1), (Some(true), Some(true), true));
    assert_eq!(ask(web, db, 2), (Some(false), Some(true), false));
    assert_eq!(ask(db, web, 2), (Some(true), Some(true), true));
    assert_eq!(ask("8.8.8.8", db, 1), (None, Some(false), false));
    assert_eq!(ask("10.0.0.2", db, 1), (None, Some(true), true));
    assert_eq!(ask("10.0.0.1", db, 1), (None, Some(false), false));
}

#[test]
fn explanation_names_the_rule() {
    let world = World::new()
        .namespace("shop", "")
        .pod("shop/web", "10.1.1.1", "app=web")
        .pod("shop/db", "10.1.2.2", "app=db")
        .policy(
            "NetworkPolicy shop/in",
            policy("shop", "app=db").ingress([allow("sa(shop/x)"), allow("pods(app=web) : tcp/1")]),
        );
    let evaluator = Evaluator::new(world.0);
    let connection = tcp(&evaluator, "10.1.1.1", "10.1.2.2", 2);
    let evidence = evaluator.evidence(&connection);
    assert_eq!(evidence, Evidence::Address);
    let explain = |direction| {
        let side = side(&evaluator, &connection, direction, evidence).expect("a pod");
        let mut lines = side.steps;
        lines.push(format!("=> {}", side.conclusion));
        lines
    };
    assert_eq!(
        explain(Direction::Egress),
        ["=> allowed: no policy applies to it"]
    );
    assert_eq!(
        explain(Direction::Ingress),
        [
            "namespaced tier: NetworkPolicy shop/in ingress[0] (allow) is about other peers",
            "namespaced tier: NetworkPolicy shop/in ingress[1] (allow) is about other ports",
            "=> denied by default: NetworkPolicy shop/in isolates the pod and no rule allows it",
        ]
    );
}

/// The walk over the rules as they are written and the compiled policy of the pod's node agree.
#[test]
fn explanation_agrees_with_the_compiled_policy() {
    let mut r = Random(2_026);
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..40 {
        let evaluator = Evaluator::new(world(&mut r).0);
        for _ in 0..250 {
            let address = |r: &mut Random| -> IpAddr { ip(ADDRESSES[r.below(ADDRESSES.len())]) };
            let ends = [address(&mut r), address(&mut r)];
            let protocol = *r.pick(&[Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::ICMP]);
            let port = *r.pick(&[0, 5, 53, 80, 85, 90, 1023, 1024, 8080]);
            let connection = evaluator.connection(ends, protocol, port);
            let assumed = *r.pick(&[None, Some(Evidence::Address), Some(Evidence::Tls)]);
            let evidence = assumed.unwrap_or_else(|| evaluator.evidence(&connection));
            for direction in [Direction::Egress, Direction::Ingress] {
                let Some(side) = side(&evaluator, &connection, direction, evidence) else {
                    continue;
                };
                let (verdict, walked) = (side.verdict, &side.conclusion);
                let explanation = format!("{direction:?} {connection:?}: {:#?}", side.steps);
                assert_eq!(
                    verdict.allowed,
                    walked.allows(),
                    "{explanation}{walked}{verdict:?}"
                );
                #[expect(clippy::wildcard_enum_match_arm, reason = "they name no rule")]
                match verdict.reason {
                    Reason::Policy => {
                        let word = if verdict.allowed { "allow" } else { "deny" };
                        let step = format!(": {} ({word}) matches", side.rule);
                        assert!(
                            side.steps.iter().any(|s| s.ends_with(&step)),
                            "{explanation}"
                        );
                    }
                    Reason::DefaultDeny => {
                        let named = format!("denied by default: {} ", side.rule);
                        assert!(
                            walked.to_string().starts_with(&named),
                            "{explanation}{named}"
                        );
                    }
                    _ => {}
                }
                *seen.entry(verdict.reason).or_insert(0) += 1;
            }
        }
    }
    for reason in [
        Reason::Policy,
        Reason::DefaultDeny,
        Reason::NoPolicy,
        Reason::NodeLocal,
    ] {
        assert!(seen.get(&reason).is_some_and(|n| *n > 50), "{seen:?}");
    }
}
