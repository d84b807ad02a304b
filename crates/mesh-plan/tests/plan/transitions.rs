// SPDX-License-Identifier: Apache-2.0
//! From plan to plan: the operations lead there, and between any two of them every reader sees
//! the old or the new verdict.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_common::path::who;
use mesh_common::policy::{Question, decide};
use mesh_common::service::route;
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Verdict};
use mesh_plan::compile::Compiler;
use mesh_plan::diff::apply;
use mesh_plan::plan::{Entry, Key};
use mesh_plan::{Index, MapOp, Plan, compile, diff};

use crate::random::{ADDRESSES, change, pod, world};
use crate::support::*;

/// A plan as maps hold it: without names.
fn maps(plan: &Plan) -> Plan {
    let mut maps = plan.clone();
    maps.names = Default::default();
    for pod in maps.pods.values_mut() {
        let view = pod.view;
        *pod = Default::default();
        pod.view = view;
    }
    maps
}

/// Returns the decision of a reader for a pod and an address.
fn verdict(
    state: &Index,
    uid: &str,
    addr: Addr,
    direction: Direction,
    at: (Protocol, u16),
) -> Verdict {
    let peer = who(state, &addr);
    let question = Question {
        set: state.pods[uid].view.set,
        direction,
        peer: peer.id,
        addr,
        evidence: peer.evidence,
        protocol: at.0,
        port: Port::new(at.1),
    };
    decide(state, &question)
}

const PORTS: [(Protocol, u16); 6] = [
    (Protocol::TCP, 80),
    (Protocol::TCP, 85),
    (Protocol::TCP, 8080),
    (Protocol::UDP, 53),
    (Protocol::SCTP, 5),
    (Protocol::ICMP, 0),
];

/// All questions that a hook may ask during an update. Pods that come or go have no traffic meanwhile: they
/// are attached after the update, and detached before it.
fn questions(old: &Plan, new: &Plan) -> Vec<(String, Addr, Direction, (Protocol, u16))> {
    let mut all = Vec::new();
    let steady = |addr: &Addr| {
        let of = |plan: &Plan| {
            let mut pods = plan.pods.iter();
            pods.find(|(_, pod)| pod.view.owns(addr))
                .map(|(uid, _)| uid.clone())
        };
        of(old) == of(new)
    };
    for uid in old.pods.keys().filter(|uid| new.pods.contains_key(*uid)) {
        for addr in ADDRESSES
            .map(|a| Addr::from(ip(a)))
            .into_iter()
            .filter(steady)
        {
            for direction in [Direction::Ingress, Direction::Egress] {
                for at in PORTS {
                    all.push((uid.clone(), addr, direction, at));
                }
            }
        }
    }
    all
}

struct Seen {
    operations: usize,
    switched: usize,
    bridged: usize,
}

fn follow(old: &Plan, new: &Plan) -> Seen {
    let ops = diff(old, new);
    let questions = questions(old, new);
    let ask = |state: &Plan| -> Vec<Verdict> {
        let state = Index::new(state.clone());
        let one = |(uid, addr, direction, at): &(String, Addr, Direction, (Protocol, u16))| {
            verdict(&state, uid, *addr, *direction, *at)
        };
        questions.iter().map(one).collect()
    };
    let (before, after) = (ask(old), ask(new));
    let mut state = maps(old);
    for (index, op) in ops.iter().enumerate() {
        apply(&mut state, op);
        for (n, now) in ask(&state).iter().enumerate() {
            assert!(
                *now == before[n] || *now == after[n],
                "after operation {index} of {} ({op:?}): {:?}: {:?} then {:?}, but {now:?}",
                ops.len(),
                questions[n],
                before[n],
                after[n],
            );
        }
    }
    state.pods.retain(|uid, _| new.pods.contains_key(uid));
    assert_eq!(state, maps(new));
    let is_bridge = |op: &&MapOp| match op {
        MapOp::Put(Entry::Select(key, _)) => !new.selects.contains_key(key),
        MapOp::Put(_) | MapOp::Remove(_) => false,
    };
    Seen {
        operations: ops.len(),
        switched: before.iter().zip(&after).filter(|(a, b)| a != b).count(),
        bridged: ops.iter().filter(is_bridge).count(),
    }
}

#[test]
fn update_exposes_only_the_old_or_the_new_verdict() {
    let mut r = Random(20_260_801);
    let (mut operations, mut switched, mut bridged) = (0, 0, 0);
    for _ in 0..18 {
        let mut at = world(&mut r);
        let mut old = at.on("n1").plan;
        for _ in 0..4 {
            for _ in 0..=r.below(4) {
                at = change(&mut r, at);
            }
            let new = at.on("n1").plan;
            let seen = follow(&old, &new);
            operations += seen.operations;
            switched += seen.switched;
            bridged += usize::from(seen.bridged > 0);
            old = new;
        }
    }
    // The cases are worth something.
    assert!(
        operations > 1_000 && switched > 1_000 && bridged > 6,
        "{operations} {switched} {bridged}"
    );
}

#[test]
fn plan_is_built_from_empty_maps_and_removed_completely() {
    let mut r = Random(7);
    for _ in 0..6 {
        let full = world(&mut r).on("n1").plan;
        let nothing = Plan::default();
        follow(&nothing, &full);
        let ops = diff(&full, &nothing);
        assert!(ops.iter().all(|op| matches!(op, MapOp::Remove(_))));
        let mut state = maps(&full);
        ops.iter().for_each(|op| apply(&mut state, op));
        state.pods.clear();
        assert_eq!(state, nothing);
        assert_eq!(diff(&full, &full), []);
    }
}

#[test]
fn diff_works_from_a_plan_read_from_the_maps() {
    let mut r = Random(9);
    for _ in 0..20 {
        let first = world(&mut r);
        let old = Plan {
            pods: BTreeMap::new(),
            ..maps(&first.on("n1").plan)
        };
        let new = change(&mut r, first).on("n1").plan;
        let mut state = old.clone();
        diff(&old, &new).iter().for_each(|op| apply(&mut state, op));
        assert_eq!(state, maps(&new));
    }
}

#[test]
fn service_switches_only_after_its_backends_are_written() {
    use mesh_plan::cluster::{Service, ServiceEndpoint, ServicePort, Transport};
    let service = |backends: &[&str], ports: &[u16]| Service {
        cluster_ips: [ip("10.96.0.1")].into(),
        ports: ports
            .iter()
            .map(|port| ServicePort {
                name: format!("p{port}"),
                transport: Transport::Tcp,
                port: *port,
                node_port: None,
            })
            .collect(),
        endpoints: backends
            .iter()
            .flat_map(|address| ports.iter().map(move |port| (address, port)))
            .map(|(address, port)| ServiceEndpoint {
                port_name: format!("p{port}"),
                transport: Transport::Tcp,
                address: ip(address),
                port: 8000 + port,
                node: None,
                ready: true,
                serving: true,
                terminating: false,
            })
            .collect(),
        ..Service::default()
    };
    let plan = |s: Option<Service>| {
        let world = World::new();
        match s {
            Some(s) => world.service("shop/web", s).on("n1").plan,
            None => world.on("n1").plan,
        }
    };
    let steps = [
        None,
        Some(service(&["10.1.1.1"], &[80])),
        Some(service(&["10.1.1.1", "10.1.1.2"], &[80, 81])),
        Some(service(&["10.1.1.2"], &[81])),
        Some(service(&[], &[81])),
        None,
    ];
    for pair in steps.windows(2) {
        let (old, new) = (plan(pair[0].clone()), plan(pair[1].clone()));
        let mut state = old.plan().clone();
        for op in diff(&old, &new) {
            apply(&mut state, &op);
            for port in [80, 81, 82] {
                let to = Endpoint::new(Addr::from(ip("10.96.0.1")), Port::new(port));
                for random in 0..2 {
                    let at =
                        |plan: &Plan| route(&Index::new(plan.clone()), to, Protocol::TCP, random);
                    let now = at(&state);
                    assert!(now == at(&old) || now == at(&new), "{op:?}: {to}: {now:?}");
                }
            }
        }
    }
}

#[test]
fn content_is_removed_after_its_last_reference() {
    let with = World::new().pod("shop/web", "10.1.1.1", "app=web").policy(
        "NetworkPolicy shop/p",
        policy("shop", "").ingress([allow("8.0.0.0/8 : tcp/80")]),
    );
    let mut without = with.clone();
    without.0.policies.clear();
    let ops = diff(&with.on("n1").plan, &without.on("n1").plan);
    let position = |test: &dyn Fn(&MapOp) -> bool| ops.iter().position(test).unwrap();
    let pod = position(&|op| matches!(op, MapOp::Put(Entry::Pod(..))));
    let set = position(&|op| matches!(op, MapOp::Remove(Key::Set(_))));
    let block = position(&|op| matches!(op, MapOp::Remove(Key::Cidr(_))));
    let port = position(&|op| matches!(op, MapOp::Remove(Key::Port(_))));
    assert!(pod < set && set < block && block < port);
}

#[test]
fn plan_is_independent_of_object_order() {
    let mut r = Random(11);
    for _ in 0..10 {
        let one = world(&mut r);
        let mut other = World::new();
        for (name, policy) in one.0.policies.iter().rev() {
            other.0.policies.insert(name.clone(), Arc::clone(policy));
        }
        for (uid, pod) in one.0.pods.iter().rev() {
            other.0.pods.insert(Arc::clone(uid), Arc::clone(pod));
        }
        other.0.namespaces = one.0.namespaces.clone();
        other.0.authentications = one.0.authentications.clone();
        other.0.api_servers = one.0.api_servers.clone();
        assert_eq!(compile(&one.0, "n1"), compile(&other.0, "n1"));
        let (plan, _) = compile(&one.0, "n1");
        assert_eq!(
            mesh_plan::text::render(&plan),
            mesh_plan::text::render(&plan.clone())
        );
    }
}

#[test]
fn incremental_compilation_equals_full_compilation() {
    let mut r = Random(13);
    for _ in 0..30 {
        let mut at = world(&mut r);
        let mut compiler = Compiler::new("n1");
        for step in 0..25 {
            at = match r.below(10) {
                0..5 => pod(&mut r, at),
                5..7 => ready(&mut r, at),
                _ => change(&mut r, at),
            };
            let expected = compile(&at.0, "n1");
            let got = compiler.compile(&Arc::new(at.0.clone()), &Default::default());
            assert!(got == expected, "step {step}");
        }
    }
}

/// The same with a pod or a namespace whose node has, or has no longer, reported it.
fn ready(r: &mut Random, mut world: World) -> World {
    let cluster = &mut world.0;
    if r.chance(10) {
        cluster.ready = match cluster.ready {
            Some(_) => None,
            None => Some(Default::default()),
        };
    }
    let of_pods = cluster.pods.keys().cloned();
    let of_namespaces = cluster.namespaces.values();
    let of_namespaces = of_namespaces.map(|namespace| Arc::from(&*namespace.uid));
    let all: Vec<Arc<str>> = of_pods.chain(of_namespaces).collect();
    if let Some(ready) = &mut cluster.ready
        && !all.is_empty()
    {
        let uid = r.pick(&all);
        if !ready.remove(uid) {
            ready.insert(Arc::clone(uid));
        }
    }
    world
}
