// SPDX-License-Identifier: Apache-2.0
//! Policy asked offline: fast evaluation, and explanations that agree with it.

use mesh_common::{Evidence, Protocol, Reason};
use mesh_plan::evaluate::{Check, compile_policies};
use mesh_plan::explain::explain;

use crate::random::{ADDRESSES, world};
use crate::support::*;

#[test]
fn both_ends_are_asked() {
    let world = World::new()
        .namespace("shop", "")
        .pod("shop/web", "10.1.1.1,fd01::1", "app=web")
        .pod("shop/db", "10.1.2.2", "app=db")
        .pod_with("shop/pending", "", "app=web", |pod| pod.node = "n2".into())
        .policy(
            "NetworkPolicy shop/in",
            policy("shop", "app=db").ingress([allow("pods(app=web)")]),
        )
        .policy(
            "NetworkPolicy shop/out",
            policy("shop", "app=web").egress([allow("* : tcp/1")]),
        );
    let (compiled, rejections) = compile_policies(&world.0);
    assert_eq!(rejections, []);
    let ask = |from: &str, to: &str, port| {
        let check = Check {
            from: compiled.find(from).expect(from),
            to: compiled.find(to).expect(to),
            protocol: Protocol::TCP,
            port,
            evidence: None,
        };
        let outcome = compiled.evaluate(&check);
        let word = |side: Option<mesh_common::Verdict>| side.map(|v| v.allowed);
        (
            word(outcome.egress),
            word(outcome.ingress),
            outcome.allowed(),
        )
    };
    assert_eq!(
        ask("shop/web", "shop/db", 1),
        (Some(true), Some(true), true)
    );
    assert_eq!(
        ask("shop/web", "shop/db", 2),
        (Some(false), Some(true), false)
    );
    assert_eq!(
        ask("10.1.1.1", "10.1.2.2", 2),
        (Some(false), Some(true), false)
    );
    assert_eq!(
        ask("shop/pending", "shop/db", 1),
        (Some(true), Some(true), true)
    );
    assert_eq!(
        ask("shop/db", "shop/web", 2),
        (Some(true), Some(true), true)
    );
    assert_eq!(ask("8.8.8.8", "shop/db", 1), (None, Some(false), false));
    assert_eq!(ask("10.0.0.2", "shop/db", 1), (None, Some(true), true));
    assert_eq!(ask("10.0.0.1", "shop/db", 1), (None, Some(false), false));
    assert_eq!(compiled.find("shop/nobody"), None);
    assert_eq!(compiled.names().count(), 3);
}

#[test]
fn an_explanation_names_the_rule() {
    let world = World::new()
        .namespace("shop", "")
        .pod("shop/web", "10.1.1.1", "app=web")
        .pod("shop/db", "10.1.2.2", "app=db")
        .policy(
            "NetworkPolicy shop/in",
            policy("shop", "app=db").ingress([allow("sa(shop/x)"), allow("pods(app=web) : tcp/1")]),
        );
    let (compiled, _) = compile_policies(&world.0);
    let check = Check {
        from: compiled.find("shop/web").unwrap(),
        to: compiled.find("shop/db").unwrap(),
        protocol: Protocol::TCP,
        port: 2,
        evidence: None,
    };
    let text = explain(&world.0, &compiled, &check).to_string();
    let expected = "\
egress of Pod shop/web; the peer is Pod shop/db, shop/default{app=db}, known by address
  => allowed: no policy says anything about it
ingress of Pod shop/db; the peer is Pod shop/web, shop/default{app=web}, known by address
  namespaced tier: NetworkPolicy shop/in ingress[0] (allow) is about other peers
  namespaced tier: NetworkPolicy shop/in ingress[1] (allow) is about other ports
  => denied by default: NetworkPolicy shop/in isolates the pod and no rule allows it
";
    assert_eq!(text, expected);
}

/// The walk over the rules as they are written, and the compiled policy, of every node's plan and
/// of all nodes at once, come to the same.
#[test]
fn the_walk_and_the_compiled_policy_agree() {
    let mut r = Random(2_026);
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..40 {
        let world = world(&mut r);
        let (compiled, _) = compile_policies(&world.0);
        let of_nodes = [world.on("n1").plan, world.on("n2").plan];
        for _ in 0..250 {
            let end = |r: &mut Random| compiled.find(ADDRESSES[r.below(ADDRESSES.len())]).unwrap();
            let check = Check {
                from: end(&mut r),
                to: end(&mut r),
                protocol: *r.pick(&[Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::ICMP]),
                port: *r.pick(&[0, 5, 53, 80, 85, 90, 1023, 1024, 8080]),
                evidence: *r.pick(&[None, Some(Evidence::Address), Some(Evidence::Tls)]),
            };
            let explanation = explain(&world.0, &compiled, &check);
            for side in &explanation.sides {
                let (verdict, walked) = (side.verdict, &side.conclusion);
                assert_eq!(verdict.allowed, walked.allows(), "{explanation}{verdict:?}");
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
            let outcome = compiled.evaluate(&check);
            for (end, verdict) in [(check.from, outcome.egress), (check.to, outcome.ingress)] {
                let uid = compiled.uid(end);
                let pod = uid.and_then(|uid| of_nodes.iter().find_map(|p| p.pods.get(uid)));
                // A node's own API server is told by its identity there, by its address here.
                let same = world.0.api_servers.is_empty();
                if let (Some(pod), Some(_), true) = (pod, verdict, same) {
                    assert_eq!(
                        Some(pod.view.set),
                        uid.map(|uid| compiled.plan.pods[uid].view.set)
                    );
                }
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
