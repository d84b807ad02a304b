// SPDX-License-Identifier: Apache-2.0
//! Random small clusters that are dense in what can go wrong: few labels, few addresses, many
//! policies that overlap.

use std::sync::Arc;

use mesh_plan::cluster::*;

use crate::support::*;

const NAMESPACES: [&str; 3] = ["shop", "other", "kube-system"];
const SELECTORS: [&str; 9] = [
    "",
    "app=a",
    "app=b",
    "app=a|b",
    "app!=a",
    "tier",
    "!tier",
    "app=c,tier=x",
    "tier=x|y",
];
const OF_NAMESPACES: [&str; 5] = ["", "team=a", "team!=a", "team", "!team"];
pub(crate) const BLOCKS: [&str; 9] = [
    "10.0.0.0/8",
    "10.1.0.0/16-10.1.1.0/24",
    "10.1.2.0/24-10.1.2.1/32-10.1.2.8/29",
    "10.1.2.1/32",
    "0.0.0.0/0",
    "::/0",
    "fd00::/8-fd01::/64",
    "0.0.0.0/0-10.0.0.0/8",
    "10.0.0.2/32",
];
const PORTS: [&str; 12] = [
    "*",
    "*",
    "*",
    "tcp/80",
    "tcp/80-90",
    "tcp/85 udp/53",
    "tcp",
    "udp",
    "sctp/5",
    "tcp/1024-65535",
    "tcp/http",
    "any",
];
const ENTITIES: [&str; 5] = [
    "@host",
    "@remote-node",
    "@kube-apiserver",
    "@cluster",
    "@world",
];

/// Addresses to ask about: pods of [`world`], nodes, servers, unknown, outside.
pub(crate) const ADDRESSES: [&str; 16] = [
    "10.1.1.1",
    "10.1.1.2",
    "10.1.1.3",
    "10.1.2.1",
    "10.1.2.2",
    "10.1.2.3",
    "10.1.2.9",
    "10.0.0.1",
    "10.0.0.2",
    "10.9.9.9",
    "10.1.2.77",
    "8.8.8.8",
    "fd00::2",
    "fd01::1",
    "fd01::2",
    "2001:db8::1",
];

pub(crate) fn world(r: &mut Random) -> World {
    let mut world = World::new();
    for _ in 0..r.below(60) {
        world = change(r, world);
    }
    world
}

/// The same with one random change.
pub(crate) fn change(r: &mut Random, world: World) -> World {
    match r.below(20) {
        0..2 => {
            let labels = *r.pick(&["", "team=a", "team=b", "team=a,mesh.rs/dataplane=enabled"]);
            world.namespace(word(r, &NAMESPACES), labels)
        }
        2..9 => pod(r, world),
        9 => remove(r, world),
        10 => {
            let mut world = world;
            let server = ip(word(r, &["10.9.9.9", "10.0.0.2", "10.1.2.1"]));
            if !world.0.api_servers.remove(&server) {
                world.0.api_servers.insert(server);
            }
            world
        }
        11 => authentication(r, world),
        _ => {
            let (name, policy) = policy_of(r);
            world.policy(&name, policy)
        }
    }
}

/// The same with a pod that is new, changed or gone.
pub(crate) fn pod(r: &mut Random, world: World) -> World {
    let address = ADDRESSES[r.below(7)];
    if r.chance(15) {
        let mut world = world;
        world.0.pods.remove(&*format!("uid-{address}"));
        return world;
    }
    let namespace = *r.pick(&NAMESPACES[..2]);
    let app = *r.pick(&[
        "",
        "app=a",
        "app=b",
        "app=c",
        "app=a,tier=x",
        "app=c,tier=y",
    ]);
    let both = format!("{address},fd01::{}", r.below(3));
    let addresses = if r.chance(30) { both.as_str() } else { address };
    let (account, named, ending) = (r.below(2), r.below(3), r.chance(5));
    // One pod for each IPv4 address, so that disputes are rare but do happen (IPv6).
    world.pod_with(
        &format!("{namespace}/{}", address.replace('.', "-")),
        addresses,
        app,
        |pod| {
            pod.uid = format!("uid-{address}").into();
            pod.service_account = ["default", "x"][account].into();
            pod.terminating = ending;
            if named > 0 {
                let number = [80, 8080][named - 1];
                pod.named_ports = Arc::new([(("http".into(), Transport::Tcp), number)].into());
            }
        },
    )
}

fn remove(r: &mut Random, mut world: World) -> World {
    let cluster = &mut world.0;
    if r.chance(50) {
        let all: Vec<Arc<str>> = cluster.pods.keys().cloned().collect();
        if !all.is_empty() {
            cluster.pods.remove(r.pick(&all));
        }
    } else {
        let all: Vec<ObjectRef> = cluster.policies.keys().cloned().collect();
        if !all.is_empty() {
            cluster.policies.remove(r.pick(&all));
        }
    }
    world
}

fn authentication(r: &mut Random, world: World) -> World {
    let a = Authentication {
        pods: r.chance(50).then(|| selector(word(r, &SELECTORS))),
        mtls: r
            .chance(70)
            .then(|| *r.pick(&[Mtls::Strict, Mtls::Permissive])),
        ports: (0..r.below(2))
            .map(|n| ([80, 85][n], Mtls::Strict))
            .collect(),
        outbound: r.chance(30).then_some(OutboundMode::Required),
        udp: r.chance(30).then_some(UdpMode::SameNode),
    };
    world.authentication(word(r, &["shop/a", "shop/b", "mesh-system/default"]), a)
}

fn policy_of(r: &mut Random) -> (String, PolicyText) {
    let (name, subject) = match r.below(4) {
        0 => {
            let tier = match r.below(2) {
                0 => Tier::Admin(*r.pick(&[1, 2])),
                _ => Tier::Baseline(*r.pick(&[1, 2])),
            };
            let subject = wide(tier, word(r, &OF_NAMESPACES), word(r, &SELECTORS));
            (format!("ClusterNetworkPolicy c{}", r.below(4)), subject)
        }
        _ => {
            let namespace = *r.pick(&NAMESPACES[..2]);
            let subject = policy(namespace, word(r, &SELECTORS));
            (format!("MeshPolicy {namespace}/p{}", r.below(5)), subject)
        }
    };
    let admin = subject.0.tier != Tier::Namespaced;
    let mut made = subject;
    if r.chance(75) {
        made = made.ingress(rules(r, admin));
    }
    if r.chance(50) {
        made = made.egress(rules(r, admin));
    }
    if r.chance(10) {
        made = made.audit();
    }
    (name, made)
}

fn rules(r: &mut Random, admin: bool) -> Vec<Rule> {
    (0..r.below(4)).map(|_| rule_of(r, admin)).collect()
}

fn rule_of(r: &mut Random, admin: bool) -> Rule {
    let peers: Vec<String> = (0..=r.below(3)).map(|_| peer_of(r)).collect();
    let peers = if r.chance(15) {
        "*".to_owned()
    } else {
        peers.join(" ")
    };
    let text = format!("{peers} : {}", r.pick(&PORTS));
    match r.below(10) {
        0..3 => deny(&text),
        3..5 if admin => pass(&text),
        _ => allow(&text),
    }
}

fn peer_of(r: &mut Random) -> String {
    match r.below(8) {
        0..3 => format!("ns/{}({})", r.pick(&NAMESPACES), r.pick(&SELECTORS)),
        3 => format!("nss({};{})", r.pick(&OF_NAMESPACES), r.pick(&SELECTORS)),
        4..6 => (*r.pick(&BLOCKS)).to_owned(),
        6 => (*r.pick(&["sa(shop/x)", "sa(*/default)", "nodes(zone=z2)", "nodes()"])).to_owned(),
        _ => (*r.pick(&ENTITIES)).to_owned(),
    }
}

fn word(r: &mut Random, of: &[&'static str]) -> &'static str {
    of[r.below(of.len())]
}
