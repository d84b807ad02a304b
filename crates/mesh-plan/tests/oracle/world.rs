// SPDX-License-Identifier: Apache-2.0
//! Random clusters and random packets, from small vocabularies so that rules meet each other often.
//! What it makes is what the API admits, in every form that the kinds can be parsed to; it knows
//! nothing of how policies are compiled or decided.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_plan::cluster::{
    ClusterSnapshot, Labels, Namespace, Node, ObjectName, Pod, PortRange, Transport,
};

use crate::naive::{Packet, Side, Via};
use crate::rules;

/// SplitMix64: a seed gives the same cluster everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).expect("a small number"))
            .expect("below a usize")
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Up to `most` times what `make` makes.
    pub(crate) fn some<T>(
        &mut self,
        least: usize,
        most: usize,
        mut make: impl FnMut(&mut Self) -> T,
    ) -> Vec<T> {
        let count = least + self.below(most - least + 1);
        (0..count).map(|_| make(self)).collect()
    }
}

pub(crate) const NAMESPACES: [&str; 4] = ["shop", "data", "ops", "kube-system"];
pub(crate) const LABELS: [(&str, [&str; 3]); 3] = [
    ("app", ["web", "api", "db"]),
    ("tier", ["front", "back", "edge"]),
    ("env", ["prod", "test", "dev"]),
];
pub(crate) const ACCOUNTS: [&str; 3] = ["default", "api", "job"];
pub(crate) const PORT_NAMES: [&str; 3] = ["http", "dns", "admin"];
pub(crate) const PORTS: [u16; 7] = [53, 80, 443, 8080, 8081, 9090, 65535];
pub(crate) const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::Sctp];
/// Addresses of nobody: outside, and inside pod CIDRs.
const STRANGERS: [&str; 6] = [
    "203.0.113.7",
    "198.51.100.20",
    "2001:db8::7",
    "10.1.1.250",
    "10.9.0.9",
    "fd00:1:2::fa",
];
const DATAPLANE: &str = "mesh.rs/dataplane";

/// A cluster with policies of every kind.
pub(crate) fn cluster(random: &mut Random) -> ClusterSnapshot {
    let mut cluster = ClusterSnapshot::default();
    for name in NAMESPACES {
        let namespace = namespace(random, name);
        cluster.namespaces.insert(name.to_owned(), namespace);
    }
    for index in 1..=3 {
        let node = node(random, index);
        cluster.nodes.insert(format!("node-{index}"), node);
    }
    if random.one_in(3) {
        cluster.pod_cidrs.insert(net("10.9.0.0/16"));
    }
    for index in 0..4 + random.below(8) {
        let pod = pod(random, index);
        cluster.pods.insert(Arc::clone(&pod.uid), pod.into());
    }
    if random.one_in(2) {
        let places = ["192.168.0.1", "192.168.0.2", "fd00:a::3", "203.0.113.7"];
        for address in random.some(1, 2, |r| *r.pick(&places)) {
            cluster.api_servers.insert(ip(address));
        }
    }
    let addresses = addresses(&cluster);
    let policies = if random.one_in(20) {
        30
    } else {
        1 + random.below(9)
    };
    for index in 0..policies {
        let (object, policy) = rules::policy(random, index, &addresses);
        cluster.policies.insert(object, policy.into());
    }
    cluster
}

fn namespace(random: &mut Random, name: &str) -> Namespace {
    let mut labels = labels(random);
    labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
    if name != "kube-system" && !random.one_in(6) {
        let values = [
            "enabled", "enabled", "enabled", "enabled", "disabled", "required",
        ];
        labels.insert(DATAPLANE.to_owned(), (*random.pick(&values)).to_owned());
    }
    Namespace {
        uid: format!("uid-of-{name}"),
        labels,
    }
}

fn node(random: &mut Random, index: usize) -> Node {
    let mut addresses = BTreeSet::from([ip(&format!("192.168.0.{index}"))]);
    if !random.one_in(3) {
        addresses.insert(ip(&format!("fd00:a::{index}")));
    }
    Node {
        labels: labels(random),
        addresses,
        pod_cidrs: BTreeSet::from([
            net(&format!("10.1.{index}.0/24")),
            net(&format!("fd00:1:{index}::/64")),
        ]),
    }
}

fn pod(random: &mut Random, index: usize) -> Pod {
    let namespace = *random.pick(&NAMESPACES);
    let node = 1 + random.below(3);
    let host_network = random.one_in(10);
    let mut addresses = Vec::new();
    if !host_network {
        let families = random.below(4);
        if families != 0 {
            addresses.push(ip(&match random.below(8) {
                0 => format!("172.16.0.{}", 10 + index),
                _ => format!("10.1.{node}.{}", 10 + index),
            }));
        }
        if families < 2 {
            addresses.push(ip(&format!("fd00:1:{node}::{:x}", 16 + index)));
        }
    }
    let mut labels = labels(random);
    if random.one_in(4) {
        let values = ["enabled", "disabled"];
        labels.insert(DATAPLANE.to_owned(), (*random.pick(&values)).to_owned());
    }
    let mut named_ports = BTreeMap::new();
    for _ in 0..random.below(3) {
        let name = (*random.pick(&PORT_NAMES)).to_owned();
        let transport = *random.pick(&TRANSPORTS);
        named_ports.insert((name, transport), *random.pick(&PORTS));
    }
    Pod {
        name: ObjectName::new(namespace, format!("pod-{index}")),
        uid: format!("uid-of-pod-{index}").into(),
        labels: labels.into(),
        service_account: (*random.pick(&ACCOUNTS)).to_owned(),
        node: format!("node-{node}"),
        addresses: addresses.into(),
        host_network,
        named_ports: named_ports.into(),
        workload: ("Deployment".to_owned(), format!("app-{}", index % 3)),
        ready: !random.one_in(5),
        terminating: random.one_in(8),
        netns_path: None,
        static_uid: None,
    }
}

fn labels(random: &mut Random) -> Labels {
    let mut labels = Labels::new();
    for (key, values) in LABELS {
        if !random.one_in(4) {
            // The first value more often than the others, so that selectors select.
            let value = values[random.below(4).saturating_sub(1)];
            labels.insert(key.to_owned(), value.to_owned());
        }
    }
    labels
}

/// Every address that means something in the cluster, and some that mean nothing.
pub(crate) fn addresses(cluster: &ClusterSnapshot) -> Vec<IpAddr> {
    let pods = cluster.pods.values().flat_map(|pod| &pod.addresses);
    let nodes = cluster.nodes.values().flat_map(|node| &node.addresses);
    pods.chain(nodes)
        .chain(&cluster.api_servers)
        .copied()
        .chain(STRANGERS.iter().map(|text| ip(text)))
        .collect()
}

/// The endpoints of packets: the bounds of every range that rules name.
pub(crate) struct Places {
    subjects: Vec<Pod>,
    /// Addresses of pods: half of all packets.
    pods: Vec<IpAddr>,
    addresses: Vec<IpAddr>,
    ports: Vec<u16>,
}

impl Places {
    pub(crate) fn new(cluster: &ClusterSnapshot) -> Self {
        let mut places = Self {
            subjects: Vec::new(),
            pods: Vec::new(),
            addresses: addresses(cluster),
            ports: vec![1, 7777],
        };
        for pod in cluster.pods.values() {
            places.ports.extend(pod.named_ports.values());
            places.pods.extend(&pod.addresses);
            if !pod.addresses.is_empty() {
                places.subjects.push(Pod::clone(pod));
            }
        }
        for rule in rules::all(cluster) {
            for cidr in rule.peers.iter().flatten().flat_map(rules::blocks) {
                places.addresses.extend([cidr.network(), cidr.broadcast()]);
            }
            for ports in rule.ports.iter().flatten() {
                if let PortRange::Range(first, last) = ports.ports {
                    places.ports.extend([first, last, first / 2 + last / 2]);
                    places.ports.extend([first - 1, last.saturating_add(1)]);
                }
            }
        }
        // 15008 is the tunnels' and no matter of policy; 0 is no port.
        places.ports.retain(|port| *port != 15008 && *port != 0);
        places.addresses.retain(|address| {
            !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
        });
        places
    }

    /// A packet between a pod and anything; `None` if there is no pod with an address.
    pub(crate) fn packet(&self, random: &mut Random, cluster: &ClusterSnapshot) -> Option<Packet> {
        if self.subjects.is_empty() {
            return None;
        }
        let subject = random.pick(&self.subjects);
        let other = match random.one_in(2) {
            true => *random.pick(&self.pods),
            false => *random.pick(&self.addresses),
        };
        let side = *random.pick(&[Side::Ingress, Side::Egress]);
        let own_node = cluster
            .nodes
            .get(&subject.node)
            .is_some_and(|node| node.addresses.contains(&other));
        let mut packet = Packet {
            pod: subject.uid.to_string(),
            side,
            other,
            protocol: *random.pick(&[6, 6, 6, 17, 17, 132, 1, 47]),
            port: *random.pick(&self.ports),
            via: Via::Clear,
        };
        if !matches!(packet.protocol, 6 | 17 | 132) {
            packet.port = 0;
        }
        // An API server on the node has a case of its own.
        let api_server = cluster.api_servers.contains(&other);
        if side == Side::Ingress && own_node && !api_server && random.one_in(2) {
            packet.via = Via::Translated;
        }
        if side == Side::Ingress && packet.can_be_tunnelled(cluster) && random.one_in(2) {
            packet.via = Via::Tunnel;
        }
        Some(packet)
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}
