// SPDX-License-Identifier: Apache-2.0
//! Policies against their APIs' texts: random clusters are compiled and packets decided as the
//! kernel would, and a naive reading of the texts must give the same answers.
//!
//! `MESH_SEED=N cargo test -p mesh-plan --test oracle` runs the one cluster of a seed again.

mod cases;
mod naive;
mod rules;
mod shrink;
mod world;

use std::collections::BTreeMap;

use mesh_common::path::{Arrival, Origin, Outbound, inbound, outbound, tunnelled, who};
use mesh_common::{Addr, Endpoint, Port, Protocol};
use mesh_plan::{ClusterSnapshot, Index, compile};

use naive::{Packet, Side, Via, judge};
use world::{Places, Random};

const CLUSTERS: u64 = 2_000;
const PACKETS: usize = 50;

/// Returns the answer of the kernel programs with the plan of the pod's node.
fn decided(plan: &Index, packet: &Packet) -> Outbound {
    let view = plan.pods[&packet.pod].view;
    let other = Addr::from(packet.other);
    let protocol = Protocol(packet.protocol);
    let port = Port::new(packet.port);
    let origin = match packet.via {
        Via::Translated => Origin::Translated,
        Via::Clear | Via::Tunnel => Origin::Address,
    };
    match (packet.side, packet.via) {
        (Side::Egress, _) => {
            outbound(plan, &view, view.set, Endpoint::new(other, port), protocol).action
        }
        (Side::Ingress, Via::Clear | Via::Translated) => {
            inbound(
                plan,
                &view,
                view.set,
                Arrival {
                    from: &other,
                    origin,
                    protocol,
                    port,
                },
            )
            .action
        }
        (Side::Ingress, Via::Tunnel) => {
            let peer = who(plan, &other).id;
            match tunnelled(plan, view.set, peer, &other, port).allowed {
                true => Outbound::Direct,
                false => Outbound::Refuse,
            }
        }
    }
}

/// Whether the plan's answer is not among those that the texts admit.
fn disagrees(cluster: &ClusterSnapshot, packet: &Packet) -> bool {
    let Some(pod) = cluster.pods.get(&*packet.pod) else {
        return false;
    };
    if packet.via == Via::Tunnel && !packet.can_be_tunnelled(cluster) {
        return false;
    }
    let (plan, _) = compile(cluster, &pod.node);
    !agrees(cluster, packet, decided(&Index::new(plan), packet))
}

/// Allowed or not as the texts say; and what is allowed out is tunnelled exactly if both ends are
/// enrolled, on two nodes, and speak TCP.
fn agrees(cluster: &ClusterSnapshot, packet: &Packet, decided: Outbound) -> bool {
    let admitted = judge(cluster, packet);
    let tunnel = packet.side == Side::Egress && packet.can_be_tunnelled(cluster);
    match decided {
        Outbound::Refuse => admitted.deny,
        Outbound::Direct => admitted.allow && !tunnel,
        Outbound::Tunnel => admitted.allow && tunnel,
    }
}

/// The number of decided packets of each kind: a kind with too few packets is not tested.
#[derive(Debug, Default)]
struct Counts {
    refused: usize,
    direct: usize,
    tunnel: usize,
    proven: usize,
    translated: usize,
    open: usize,
}

/// One random cluster and its packets.
fn check(seed: u64, counts: &mut Counts) {
    let mut random = Random::new(seed);
    let cluster = world::cluster(&mut random);
    let places = Places::new(&cluster);
    let mut plans = BTreeMap::new();
    for _ in 0..PACKETS {
        let Some(packet) = places.packet(&mut random, &cluster) else {
            break;
        };
        let node = &cluster.pods[&*packet.pod].node;
        let plan = plans
            .entry(node.clone())
            .or_insert_with(|| Index::new(compile(&cluster, node).0));
        let answer = decided(plan, &packet);
        assert!(
            agrees(&cluster, &packet, answer),
            "MESH_SEED={seed}: {}",
            report(cluster.clone(), packet.clone())
        );
        match answer {
            Outbound::Refuse => counts.refused += 1,
            Outbound::Direct => counts.direct += 1,
            Outbound::Tunnel => counts.tunnel += 1,
        }
        let admitted = judge(&cluster, &packet);
        counts.open += usize::from(admitted.allow && admitted.deny);
        counts.proven += usize::from(packet.via == Via::Tunnel);
        counts.translated += usize::from(packet.via == Via::Translated);
    }
}

/// A disagreement for people, as small as it gets.
fn report(cluster: ClusterSnapshot, packet: Packet) -> String {
    let (cluster, packet) = shrink::shrink(cluster, packet, disagrees);
    let (plan, rejections) = compile(&cluster, &cluster.pods[&*packet.pod].node);
    let admitted = judge(&cluster, &packet);
    let decided = decided(&Index::new(plan), &packet);
    let mut text = format!("the texts admit {admitted:?}, decided {decided:?}\n");
    text += &shrink::text(&cluster, &packet);
    for rejection in rejections {
        text += &format!("rejected: {rejection}\n");
    }
    text
}

#[test]
fn plans_agree_with_the_api_specifications() {
    #[expect(
        clippy::disallowed_methods,
        reason = "a failing seed is run again by hand"
    )]
    let one = std::env::var("MESH_SEED").ok();
    let mut counts = Counts::default();
    if let Some(seed) = one {
        check(seed.parse().expect("MESH_SEED is a number"), &mut counts);
        println!("{counts:?}");
        return;
    }
    for seed in 0..CLUSTERS {
        check(seed, &mut counts);
    }
    println!("{counts:?}");
    let Counts {
        refused,
        direct,
        tunnel,
        proven,
        translated,
        open,
    } = counts;
    // Otherwise the clusters say too little to tell a right plan from a wrong one.
    assert!(refused > 20_000 && direct > 40_000, "{refused} {direct}");
    assert!(tunnel > 1_000 && proven > 500 && translated > 200);
    assert!(open < 2_000, "the texts admit anything of {open} packets");
}
