// SPDX-License-Identifier: Apache-2.0
//! Colliding hashes and full maps, which no input of the tests causes. Both fail closed.

use mesh_common::policy::{PolicySetId, Question, decide};
use mesh_common::{Addr, Direction, Evidence, Port, Protocol, Verdict};

use crate::compile::{Limits, Options, compile_with};
use crate::digest::Ids;
use crate::index::Index;
use crate::plan::Plan;
use crate::random::{ADDRESSES, world};
use crate::support::{Random, World, allow, ip, policy};

fn verdicts(plan: &Plan) -> Vec<(String, Verdict)> {
    let plan = &Index::new(plan.clone());
    let mut all = Vec::new();
    for (uid, pod) in &plan.pods {
        for address in ADDRESSES {
            let addr = Addr::from(ip(address));
            let peer = mesh_common::path::who(plan, &addr);
            for direction in [Direction::Ingress, Direction::Egress] {
                for evidence in [peer.evidence, Evidence::Tls] {
                    for port in [53, 80, 85, 8080] {
                        let question = Question {
                            set: pod.view.set,
                            direction,
                            peer: peer.id,
                            addr,
                            evidence,
                            protocol: Protocol::TCP,
                            port: Port::new(port),
                        };
                        let what = format!("{uid} {address} {direction:?} {evidence:?} {port}");
                        all.push((what, decide(plan, &question)));
                    }
                }
            }
        }
    }
    all
}

#[test]
fn pods_with_colliding_hashes_are_isolated() {
    let mut r = Random(5);
    let (mut isolated, mut kept) = (0, 0);
    for _ in 0..30 {
        let world = world(&mut r);
        let (whole, _) = compile_with(&world.0, "n1", &Options::default());
        let options = Options {
            ids: Ids::masked(0x1ff),
            ..Options::default()
        };
        let (plan, rejections) = compile_with(&world.0, "n1", &options);
        for (uid, pod) in &plan.pods {
            let was = whole.pods[uid].view.set;
            let closed = pod.view.set == PolicySetId::ISOLATED;
            assert!(closed || (pod.view.set == PolicySetId::NONE) == (was == PolicySetId::NONE));
            assert!(!closed || was == PolicySetId::ISOLATED || !rejections.is_empty());
            isolated += usize::from(closed);
            kept += usize::from(!closed && was != PolicySetId::NONE);
        }
    }
    assert!(isolated > 5 && kept > 5, "{isolated} {kept}");
}

#[test]
fn hash_collision_never_allows_denied_traffic() {
    let mut r = Random(6);
    let mut differences = 0;
    for _ in 0..30 {
        let world = world(&mut r);
        let (whole, _) = compile_with(&world.0, "n1", &Options::default());
        let (plan, _) = compile_with(
            &world.0,
            "n1",
            &Options {
                ids: Ids::masked(0x1ff),
                ..Options::default()
            },
        );
        for ((what, expected), (_, got)) in verdicts(&whole).iter().zip(verdicts(&plan)) {
            assert!(!got.allowed || expected.allowed, "{what}");
            differences += usize::from(got.allowed != expected.allowed);
        }
    }
    assert!(differences > 50, "{differences}");
}

fn busy() -> World {
    let mut world = World::new().namespace("shop", "");
    for n in 1..=6 {
        world = world.pod(
            &format!("shop/p{n}"),
            &format!("10.1.1.{n}"),
            &format!("app=p{n}"),
        );
    }
    world
        .policy(
            "NetworkPolicy shop/small",
            policy("shop", "app=p1").ingress([allow("pods(app=p2)")]),
        )
        .policy(
            "NetworkPolicy shop/big",
            policy("shop", "app=p3").ingress([allow("pods() : tcp/1 tcp/3 tcp/5-1000")]),
        )
}

#[test]
fn oversized_policy_set_isolates_only_its_own_pods() {
    let compile = |limits| {
        let options = Options {
            limits,
            ..Options::default()
        };
        compile_with(&busy().0, "n1", &options)
    };
    let (whole, rejections) = compile(Limits::default());
    assert_eq!(rejections, []);
    let small = Limits {
        selects: 2,
        ..Limits::default()
    };
    let few = Limits {
        ports: 12,
        ..Limits::default()
    };
    for limits in [small, few] {
        let (plan, rejections) = compile(limits);
        let set = |n: u8| plan.pods[&format!("uid-shop/p{n}")].view.set;
        assert_eq!(set(3), PolicySetId::ISOLATED);
        assert_eq!(set(1), whole.pods["uid-shop/p1"].view.set);
        assert_eq!(set(2), PolicySetId::NONE);
        assert!(plan.selects.len() <= limits.selects && plan.ports.len() <= limits.ports);
        let [rejection] = rejections.as_slice() else {
            panic!("{rejections:?}");
        };
        assert_eq!(rejection.object.to_string(), "NetworkPolicy shop/big");
        assert_eq!(rejection.consequence, "isolates shop/p3");
        let limit = if limits.selects == 2 {
            "holds at most 2"
        } else {
            "holds at most 12"
        };
        assert!(rejection.why.contains(limit), "{rejection}");
    }
}

#[test]
fn policy_set_over_the_work_limit_isolates_only_its_own_pods() {
    // Blocks in one another, each with all the rules of those around it.
    let blocks = (8..=24).map(|bits| allow(&format!("10.0.0.0/{bits} : tcp/{bits}")));
    let world = busy().policy(
        "NetworkPolicy shop/deep",
        policy("shop", "app=p5").ingress(blocks),
    );
    let compile = |steps| {
        let limits = Limits {
            steps,
            ..Limits::default()
        };
        let options = Options {
            limits,
            ..Options::default()
        };
        compile_with(&world.0, "n1", &options)
    };
    let (whole, rejections) = compile(Limits::default().steps);
    assert_eq!(rejections, []);
    let (plan, rejections) = compile(500);
    for n in [1, 2, 3, 5] {
        let uid = format!("uid-shop/p{n}");
        let expected = match n {
            5 => PolicySetId::ISOLATED,
            _ => whole.pods[&uid].view.set,
        };
        assert_eq!(plan.pods[&uid].view.set, expected, "{uid}");
    }
    let [rejection] = rejections.as_slice() else {
        panic!("{rejections:?}");
    };
    assert_eq!(rejection.object.to_string(), "NetworkPolicy shop/deep");
    assert!(rejection.why.contains("more than 500"), "{rejection}");
}

#[test]
fn pods_and_addresses_over_the_limits_are_rejected() {
    let limits = Limits {
        pods: 5,
        peers: 6,
        pod_cidrs: 1,
        ..Limits::default()
    };
    let options = Options {
        limits,
        ..Options::default()
    };
    let (plan, rejections) = compile_with(&busy().0, "n1", &options);
    assert_eq!(
        (plan.pods.len(), plan.peers.len(), plan.pod_cidrs.len()),
        (5, 6, 1)
    );
    let own = Addr::from(ip("10.0.0.1"));
    assert!(plan.peers.contains_key(&own));
    let text: Vec<String> = rejections.iter().map(ToString::to_string).collect();
    assert!(
        text.iter()
            .any(|t| t.starts_with("Pod shop/p6: spec.nodeName")),
        "{text:?}"
    );
    assert!(
        text.iter()
            .any(|t| t.contains("10 entries needed, the map holds at most 6")),
        "{text:?}"
    );
    assert!(
        text.iter()
            .any(|t| t.contains("2 entries needed, the map holds at most 1")),
        "{text:?}"
    );
}
