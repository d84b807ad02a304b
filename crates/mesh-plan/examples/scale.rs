// SPDX-License-Identifier: Apache-2.0
//! How long compiling and comparing take, and how many entries come out:
//! `cargo run --release -p mesh-plan --example scale -- [PODS [POLICIES]]`, or `-- --json PATH` for
//! the rows of `cargo xtask bench policy`.
#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a tool for people"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use mesh_common::path::{self, Arrival, Origin};
use mesh_common::{Endpoint, Port, Protocol};
use mesh_plan::cluster::*;
use mesh_plan::compile::Compiler;
use mesh_plan::{Index, Plan, compile, diff};

const NODES: usize = 100;
const NAMESPACES: usize = 50;
const ROUNDS: usize = 5;

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    if let Some(path) = arguments
        .next_if(|a| a == "--json")
        .and_then(|_| arguments.next())
    {
        return rows(&path);
    }
    let mut numbers = arguments.map(|n| n.parse::<usize>().expect("a number"));
    let pods = numbers.next().unwrap_or(10_000);
    let policies = numbers.next().unwrap_or(500);
    let mut cluster = cluster(pods, policies);
    let node = "node-3";
    let (mut plan, rejections) = timed("compile", || compile(&cluster, node));
    println!(
        "peers {} identities {} sets {} selects {} cidrs {} ports {} rejections {}",
        plan.peers.len(),
        plan.names.identities.len(),
        plan.sets.len(),
        plan.selects.len(),
        plan.cidrs.len(),
        plan.ports.len(),
        rejections.len()
    );
    let mut compiler = Compiler::new(node);
    timed("first of a compiler", || {
        compiler.compile(&Arc::new(cluster.clone()), &BTreeSet::new())
    });
    for round in 0..ROUNDS {
        change(&mut cluster, pods, round);
        let shared = Arc::new(cluster.clone());
        let start = Instant::now();
        let (next, _) = compiler.compile(&shared, &BTreeSet::new());
        let compiled = start.elapsed();
        let ops = diff(&plan, &next);
        println!(
            "one change: compile {compiled:?}, with diff {:?}, {} operations",
            start.elapsed(),
            ops.len()
        );
        assert!(
            compile(&cluster, node).0 == next,
            "the compiler differs from compile()"
        );
        plan = next;
    }
    println!("{:?}", Decisions::of(&plan));
}

fn cluster(pods: usize, policies: usize) -> ClusterSnapshot {
    let mut cluster = ClusterSnapshot::default();
    for n in 0..NODES {
        let node = Node {
            addresses: [address(100, n)].into(),
            ..Node::default()
        };
        cluster.nodes.insert(format!("node-{n}"), node);
    }
    for n in 0..NAMESPACES {
        let name = format!("ns-{n}");
        let labels = labels(&[
            ("kubernetes.io/metadata.name", &name),
            ("team", &format!("t{}", n % 7)),
        ]);
        let uid = format!("uid-{name}");
        cluster.namespaces.insert(name, Namespace { uid, labels });
    }
    cluster.ready = Some(BTreeSet::new().into());
    for n in 0..pods {
        let pod = pod(n);
        cluster.pods.insert(Arc::clone(&pod.uid), pod.into());
    }
    for n in 0..policies {
        let namespace = format!("ns-{}", n % NAMESPACES);
        let name = format!("p{n}");
        let object = ObjectRef::new("NetworkPolicy", &*namespace, &*name);
        cluster.policies.insert(object, policy(n, namespace).into());
    }
    cluster
}

/// A pod of the node gets another label; every other time a pod elsewhere comes, too.
fn change(cluster: &mut ClusterSnapshot, pods: usize, round: usize) {
    let changed = pod(3 + NODES * round);
    let mut labels = Labels::clone(&changed.labels);
    labels.insert("app".into(), format!("app-{round}"));
    let labels = labels.into();
    cluster
        .pods
        .insert(Arc::clone(&changed.uid), Pod { labels, ..changed }.into());
    if round % 2 == 1 {
        let other = pod(pods + round);
        cluster.pods.insert(Arc::clone(&other.uid), other.into());
    }
}

/// One pod, every other time of the node.
#[derive(Clone, Copy, Debug)]
enum Change {
    Add,
    Ready,
    Label,
    Delete,
}

impl Change {
    const ALL: [Self; 4] = [Self::Add, Self::Ready, Self::Label, Self::Delete];

    fn apply(self, cluster: &mut ClusterSnapshot, pods: usize, round: usize) {
        let of_node = round.is_multiple_of(2);
        let mut pod = pod(pods + 3 + if of_node { NODES * round } else { round });
        let uid = Arc::clone(&pod.uid);
        match self {
            Self::Add => drop(cluster.pods.insert(uid, pod.into())),
            Self::Ready => {
                cluster.ready.as_mut().expect("a cluster").insert(uid);
            }
            Self::Label => {
                Arc::make_mut(&mut pod.labels).insert("app".into(), format!("app-{}", round % 20));
                cluster.pods.insert(uid, pod.into());
            }
            Self::Delete => drop(cluster.pods.remove(&uid)),
        }
    }
}

/// One row for each size: pods, policies, milliseconds to compile and compare (at first, and after one
/// change of each kind), the cost of decisions, and entries.
fn rows(path: &str) {
    let mut rows = Vec::new();
    let sizes = [100, 1000, 10_000];
    let pairs = sizes.map(|n| (n, n)).into_iter();
    // The same pods, and more and more policies: what a decision costs.
    for (pods, policies) in pairs.chain([(10_000, 500), (1000, 10), (1000, 10_000)]) {
        let mut cluster = cluster(pods, policies);
        let node = "node-3";
        let mut compiler = Compiler::new(node);
        let start = Instant::now();
        let (mut plan, _) = compiler.compile(&Arc::new(cluster.clone()), &BTreeSet::new());
        let first = start.elapsed();
        let mut changes = Vec::new();
        for kind in Change::ALL {
            let mut took = Vec::new();
            for round in 0..4 * ROUNDS {
                kind.apply(&mut cluster, pods, round);
                let shared = Arc::new(cluster.clone());
                let start = Instant::now();
                let (next, _) = compiler.compile(&shared, &BTreeSet::new());
                std::hint::black_box(diff(&plan, &next));
                took.push(start.elapsed().as_secs_f64() * 1e3);
                plan = next;
            }
            took.sort_by(f64::total_cmp);
            let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
            changes.push(format!(
                "\"{kind:?}\":{{\"median\":{median:.3},\"max\":{most:.3}}}"
            ));
        }
        let changes = changes.join(",").to_lowercase();
        let cost = Decisions::of(&plan);
        let row = format!(
            "{{\"pods\":{pods},\"policies\":{policies},\"first_compile_ms\":{:.3},\
             \"change_ms\":{{{changes}}},\
             \"index_us\":{:.0},\"next_index_us\":{:.0},\
             \"connection_ns\":{{\"outbound\":{:.0},\"inbound\":{:.0}}},\"entries\":{{\"peers\":{},\"sets\":{},\"selects\":{},\
             \"cidrs\":{},\"ports\":{}}}}}",
            first.as_secs_f64() * 1e3,
            cost.index_us,
            cost.next_index_us,
            cost.outbound_ns,
            cost.inbound_ns,
            plan.peers.len(),
            plan.sets.len(),
            plan.selects.len(),
            plan.cidrs.len(),
            plan.ports.len(),
        );
        println!("{row}");
        rows.push(row);
    }
    std::fs::write(path, format!("[\n{}\n]\n", rows.join(",\n"))).expect("it can be written");
}

/// The cost of decisions in user space, for connections of the node's pods with pods of the cluster.
#[derive(Clone, Copy, Debug)]
struct Decisions {
    /// Microseconds to index a plan, without the index of an earlier one.
    index_us: f64,
    /// Microseconds to index a plan after one that differs in a peer only.
    next_index_us: f64,
    /// Nanoseconds for a connection that a pod opens.
    outbound_ns: f64,
    /// Nanoseconds for a connection that a pod accepts.
    inbound_ns: f64,
}

impl Decisions {
    /// Decisions of each measurement.
    const COUNT: usize = 200_000;

    fn of(plan: &Plan) -> Self {
        let start = Instant::now();
        let index = Index::new(plan.clone());
        let index_us = start.elapsed().as_secs_f64() * 1e6;
        let next = {
            let mut next = plan.clone();
            next.peers.pop_last();
            next
        };
        let start = Instant::now();
        std::hint::black_box(Index::after(next, &index));
        let next_index_us = start.elapsed().as_secs_f64() * 1e6;
        let views: Vec<_> = plan.pods.values().map(|pod| pod.view).collect();
        let peers: Vec<_> = plan.names.workloads.keys().copied().collect();
        let each = |decide: &dyn Fn(usize) -> bool| {
            let start = Instant::now();
            let allowed = (0..Self::COUNT).filter(|n| decide(*n)).count();
            assert!(allowed > 0, "every connection is refused");
            start.elapsed().as_secs_f64() * 1e9 / Self::COUNT as f64
        };
        let ends = |n: usize| (&views[n % views.len()], &peers[n * 13 % peers.len()]);
        Self {
            index_us,
            next_index_us,
            outbound_ns: each(&|n| {
                let (view, peer) = ends(n);
                let to = Endpoint::new(*peer, Port::new(80));
                path::outbound(&index, view, view.set, to, Protocol::TCP)
                    .verdict
                    .allowed
            }),
            inbound_ns: each(&|n| {
                let (view, from) = ends(n);
                let arrival = Arrival {
                    from,
                    origin: Origin::Address,
                    protocol: Protocol::TCP,
                    port: Port::new(80),
                };
                path::inbound(&index, view, view.set, arrival)
                    .verdict
                    .allowed
            }),
        }
    }
}

fn timed<T>(what: &str, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = f();
    println!("{what}: {:?}", start.elapsed());
    result
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

fn address(second: u8, n: usize) -> IpAddr {
    let byte = |n: usize| u8::try_from(n % 256).expect("below 256");
    Ipv4Addr::new(10, second, byte(n / 256), byte(n)).into()
}

fn pod(n: usize) -> Pod {
    let app = format!("app-{}", n / NAMESPACES % 20);
    Pod {
        name: ObjectName::new(format!("ns-{}", n % NAMESPACES), format!("pod-{n}")),
        uid: format!("00000000-0000-0000-0000-{n:012}").into(),
        labels: labels(&[
            ("app", &app),
            ("pod-template-hash", &format!("{:x}", n % 977)),
            ("tier", ["front", "back"][n % 2]),
        ])
        .into(),
        service_account: app,
        node: format!("node-{}", n % NODES),
        addresses: [address(1, n)].into(),
        ready: true,
        workload: ("Deployment".into(), format!("w-{n}")),
        ..Pod::default()
    }
}

fn policy(n: usize, namespace: String) -> Policy {
    let app = |n: usize| Selector {
        requirements: vec![Requirement {
            key: "app".into(),
            test: LabelTest::In([format!("app-{}", n % 20)].into()),
        }],
    };
    let pods = |namespaces, pods| PeerMatch::Pods {
        namespaces,
        pods,
        service_accounts: None,
    };
    let team = Selector {
        requirements: vec![Requirement {
            key: "team".into(),
            test: LabelTest::In([format!("t{}", n % 7)].into()),
        }],
    };
    let port = |first, last| PortMatch {
        transport: Some(Transport::Tcp),
        ports: PortRange::Range(first, last),
    };
    let rule = |name: &str, peers, ports| Rule {
        name: name.into(),
        action: RuleAction::Allow,
        peers: Some(peers),
        ports: Some(ports),
    };
    let block = PeerMatch::Cidr {
        cidr: "192.168.0.0/16".parse().expect("a block"),
        except: BTreeSet::new(),
    };
    Policy {
        tier: Tier::Namespaced,
        subject: Subject::Pods {
            namespace: namespace.clone(),
            pods: app(n / NAMESPACES),
        },
        ingress: Some(vec![
            rule(
                "ingress[0]",
                vec![pods(NamespaceMatch::Name(namespace), app(n + 1))],
                vec![port(80, 80)],
            ),
            rule(
                "ingress[1]",
                vec![pods(NamespaceMatch::Labels(team), app(n + 2)), block],
                vec![port(8000, 8100)],
            ),
        ]),
        egress: None,
        audit: false,
    }
}
