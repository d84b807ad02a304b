// SPDX-License-Identifier: Apache-2.0
//! Colliding hashes and full maps, which no input of the tests causes. Both fail closed.

use std::collections::BTreeSet;

use mesh_common::policy::{PolicySetId, Question, decide};
use mesh_common::service::ServiceKey;
use mesh_common::{Addr, Direction, Endpoint, Evidence, Port, Protocol, Verdict};

use crate::cluster::{Service, ServicePort, Transport};
use crate::compile::{Limits, Options, compile_with};
use crate::diff::{apply, diff, diff_within};
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

/// Random changes of a cluster, with maps that have just room for the larger of the two plans, or a little more.
#[test]
fn no_prefix_of_an_update_exceeds_a_map_or_allows_what_neither_plan_allows() {
    let mut r = Random(20_261_201);
    let (mut gradual, mut isolating) = (0, 0);
    for round in 0..60 {
        let mut random = || {
            let mut world = world(&mut r);
            // Pod CIDRs that overlap those of other worlds.
            let cidrs: &[&str] =
                [&["10.1.0.0/16"][..], &["10.1.1.0/25", "10.1.1.128/25"], &[]][r.below(3)];
            let node = world.0.nodes.get_mut("n1").unwrap();
            if r.below(2) == 0 {
                node.pod_cidrs = cidrs.iter().map(|it| it.parse().unwrap()).collect();
            }
            world.on("n1").plan.plan().clone()
        };
        let (old, new) = (random(), random());
        let slack = r.below(6) * r.below(6);
        let capacities = capacities(&old, &new, slack);
        let ops = diff_within(&old, &new, &capacities);
        if ops == diff(&old, &new) {
            gradual += 1;
        } else {
            isolating += 1;
        }
        // The verdicts of every state are slow to compute.
        let verdicts_of = (round % 3 == 0).then(|| [allowed(&old), allowed(&new)]);
        let mut state = old.clone();
        for op in &ops {
            apply(&mut state, op);
            assert!(capacities.have_room(&state, 0), "{op:?} of {ops:#?}");
            if let Some([before, after]) = &verdicts_of {
                let mut now = allowed(&state);
                now.retain(|what| !before.contains(what) && !after.contains(what));
                // Pods and addresses that come or go have no traffic during an update.
                let is_steady = |what: &String| {
                    let mut words = what.split(' ');
                    let [uid, address] = [words.next().unwrap(), words.next().unwrap()];
                    let address = Addr::from(ip(address));
                    let owner = |plan: &Plan| {
                        let mut pods = plan.pods.iter();
                        let owner = pods.find(|(_, pod)| pod.view.owns(&address));
                        owner.map(|(uid, _)| uid.clone())
                    };
                    old.pods.contains_key(uid)
                        && new.pods.contains_key(uid)
                        && owner(&old) == owner(&new)
                };
                now.retain(is_steady);
                assert!(now.is_empty(), "{op:?} allows {now:?}");
            }
        }
        state.pods.retain(|uid, _| new.pods.contains_key(uid));
        let views = |plan: &Plan| -> Vec<_> { plan.pods.values().map(|pod| pod.view).collect() };
        assert_eq!(views(&state), views(&new));
        state.pods.clone_from(&new.pods);
        state.names.clone_from(&new.names);
        assert_eq!(state, new);
    }
    assert!(gradual > 5 && isolating > 20, "{gradual} {isolating}");
}

/// Returns the questions that a plan answers with "allowed". They tell only whether the peer is proven by TLS: other
/// evidence can change during an update without a change of the verdict.
fn allowed(plan: &Plan) -> BTreeSet<String> {
    let all = verdicts(plan).into_iter();
    all.filter(|(_, verdict)| verdict.allowed)
        .map(|(what, _)| {
            let words: Vec<_> = what.split(' ').collect();
            let [uid, address, direction, evidence, port] = words[..] else {
                panic!("{what}");
            };
            let is_proven = evidence == "Tls";
            format!("{uid} {address} {direction} {is_proven} {port}")
        })
        .collect()
}

fn capacities(old: &Plan, new: &Plan, slack: usize) -> Limits {
    let of = |len: fn(&Plan) -> usize| len(old).max(len(new)) + slack;
    Limits {
        peers: of(|plan| plan.peers.len()),
        pod_cidrs: of(|plan| plan.pod_cidrs.len()),
        sets: of(|plan| plan.sets.len()),
        selects: of(|plan| plan.selects.len()),
        cidrs: of(|plan| plan.cidrs.len()),
        ports: of(|plan| plan.ports.len()),
        port_modes: of(|plan| plan.port_modes.len()),
        services: of(|plan| plan.services.len()),
        backends: of(|plan| plan.backends.len()),
        ..Limits::of_maps()
    }
}

/// A Service with one port, one cluster IP and any number of external addresses.
fn service(cluster_ip: &str, external: impl Iterator<Item = String>) -> Service {
    let port = ServicePort {
        name: "http".into(),
        transport: Transport::Tcp,
        port: 80,
        node_port: None,
    };
    Service {
        cluster_ips: [ip(cluster_ip)].into(),
        external_ips: external.map(|it| ip(&it)).collect(),
        ports: vec![port],
        ..Service::default()
    }
}

#[test]
fn tenant_that_needs_many_services_runs_out_alone() {
    let mut world = World::new();
    for n in 1..=30 {
        let external = (1..=9).map(|m| format!("192.0.2.{}", n * 8 + m % 8));
        world = world.service(
            &format!("a-big/s{n:02}"),
            service(&format!("10.96.1.{n}"), external),
        );
    }
    let small = service("10.96.2.1", ["198.51.100.1".to_owned()].into_iter());
    world = world.service("z-small/web", small);
    let options = Options {
        limits: Limits {
            services: 70,
            ..Limits::default()
        },
        ..Options::default()
    };
    let (plan, rejections) = compile_with(&world.0, "n1", &options);
    assert!(plan.services.len() <= 70);
    let has = |address: &str| {
        let at = Endpoint::new(Addr::from(ip(address)), Port::new(80));
        plan.services
            .contains_key(&ServiceKey::new(at, Protocol::TCP))
    };
    // Every cluster IP fits, and external addresses of the namespace with few.
    assert!((1..=30).all(|n| has(&format!("10.96.1.{n}"))) && has("10.96.2.1"));
    assert!(has("198.51.100.1"));
    let text: Vec<String> = rejections.iter().map(ToString::to_string).collect();
    assert!(
        text.iter()
            .any(|t| t.contains("a-big/s30") && t.contains("do not fit")),
        "{text:?}"
    );
    assert!(!text.iter().any(|t| t.contains("z-small")), "{text:?}");
}
