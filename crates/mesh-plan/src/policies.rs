// SPDX-License-Identifier: Apache-2.0
//! Compiles policies into the content of the policy maps.
//!
//! The policies that select a pod are its *set*; the rules of a set for one identity, or one
//! address block, are a *list* of answers by protocol and port. Sets and lists are immutable under
//! hashes of their content. An entry (set, identity) is a pure function of the set's rules and the
//! identity, so a new peer never changes a set. Modes and services are not involved.

pub(crate) mod cidrs;
pub(crate) mod fit;
pub(crate) mod lists;
pub(crate) mod ports;
pub(crate) mod rules;
pub(crate) mod select;
pub(crate) mod sets;
pub(crate) mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_common::Addr;
use mesh_common::policy::Direction;

use crate::cluster::{
    ClusterSnapshot, Entity, Labels, ObjectRef, PeerMatch, Pod, Policy, PortRange, Rejection, Rule,
    RuleAction, Subject, Tier,
};
use crate::digest::digest;
use crate::identities::{NamedPorts, named_ports};

/// A policy with the data that is derived from it and from the nodes.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) object: &'a ObjectRef,
    pub(crate) policy: &'a Policy,
    /// The digest of everything that affects the pods it selects.
    digest: [u8; 32],
}

/// The digests of a cluster's policies, in their order, if they depend on the policy alone; `None`
/// = the policy depends on addresses or ports of pods and nodes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Digests(Vec<Option<[u8; 32]>>);

impl Digests {
    /// The digests of the policies that did not change.
    pub(crate) fn carried(
        &self,
        before: &BTreeMap<ObjectRef, Arc<Policy>>,
        after: &BTreeMap<ObjectRef, Arc<Policy>>,
    ) -> Self {
        let mut known = before.iter().zip(&self.0).peekable();
        let carried = after.iter().map(|(object, policy)| {
            while known.next_if(|((other, _), _)| *other < object).is_some() {}
            let ((_, was), digest) = known.next_if(|((other, _), _)| *other == object)?;
            digest.filter(|_| was == policy)
        });
        Self(carried.collect())
    }
}

impl Entry<'_> {
    /// The rules of a direction.
    pub(crate) fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.policy.ingress.as_deref(),
            Direction::Egress => self.policy.egress.as_deref(),
        }
    }

    /// Whether it isolates the pods it selects: a policy of the namespaced tier that allows, or has
    /// no rules, does. A policy that only denies does not.
    pub(crate) fn isolates(&self, direction: Direction) -> bool {
        let allows =
            |rules: &[Rule]| rules.is_empty() || rules.iter().any(|r| r.action != RuleAction::Deny);
        self.policy.tier == Tier::Namespaced && self.rules(direction).is_some_and(allows)
    }

    /// The names of the selected pod's own ports that its rules use.
    fn own_names(&self) -> impl Iterator<Item = &str> {
        self.policy.ingress.iter().flatten().flat_map(names)
    }
}

/// A block of addresses, and the excluded blocks inside it.
pub(crate) type Net = (IpNet, BTreeSet<IpNet>);

/// The addresses behind peers of rules.
#[derive(Clone, Debug)]
pub(crate) struct Places<'a> {
    cluster: &'a ClusterSnapshot,
    /// API servers whose address is also that of a pod or another node, and which have its
    /// identity.
    api_servers: BTreeSet<IpAddr>,
}

impl<'a> Places<'a> {
    /// The places of a cluster, seen from a node. The node's own addresses are matched by identity,
    /// because packets of others may have them.
    pub(crate) fn of(cluster: &'a ClusterSnapshot, node: Option<&str>) -> Self {
        let servers = &cluster.api_servers;
        let of_pods: BTreeSet<&IpAddr> = pods(cluster)
            .flat_map(|pod| &pod.addresses)
            .filter(|address| servers.contains(address))
            .collect();
        Self::with(cluster, node, |server| of_pods.contains(server))
    }

    /// The places of a cluster in which every pod owns its addresses.
    pub(crate) fn among(
        cluster: &'a ClusterSnapshot,
        node: Option<&str>,
        workloads: &BTreeMap<Addr, Arc<Pod>>,
    ) -> Self {
        Self::with(cluster, node, |server| {
            workloads.contains_key(&Addr::from(*server))
        })
    }

    fn with(
        cluster: &'a ClusterSnapshot,
        node: Option<&str>,
        is_pod: impl Fn(&IpAddr) -> bool,
    ) -> Self {
        let others = cluster.nodes.iter();
        let others = others.filter(|(name, _)| Some(name.as_str()) != node);
        let of_others: BTreeSet<&IpAddr> = others.flat_map(|(_, node)| &node.addresses).collect();
        let servers = cluster.api_servers.iter();
        let taken = servers.filter(|server| is_pod(server) || of_others.contains(server));
        Self {
            cluster,
            api_servers: taken.copied().collect(),
        }
    }

    /// The blocks that a peer matches by address.
    pub(crate) fn blocks(&self, peer: &PeerMatch) -> Vec<Net> {
        let single = |a: &IpAddr| (IpNet::from(*a), BTreeSet::new());
        match peer {
            PeerMatch::Cidr { cidr, except } => vec![(*cidr, except.clone())],
            PeerMatch::Nodes(selector) => {
                let nodes = self.cluster.nodes.values();
                let selected = nodes.filter(|node| selector.matches(&node.labels));
                selected
                    .flat_map(|node| node.addresses.iter().map(single))
                    .collect()
            }
            PeerMatch::Entity(Entity::KubeApiserver) => {
                self.api_servers.iter().map(single).collect()
            }
            PeerMatch::Pods { .. } | PeerMatch::Entity(_) | PeerMatch::Nothing { .. } => Vec::new(),
        }
    }

    /// The pods that the peer of an egress rule matches by address and that have named ports of the
    /// rule, with these ports.
    pub(crate) fn named(&self, rule: &Rule, peer: &PeerMatch) -> Vec<(IpAddr, NamedPorts<'a>)> {
        let names: BTreeSet<&str> = names(rule).collect();
        if names.is_empty() {
            return Vec::new();
        }
        let blocks = self.blocks(peer);
        let meant = |address: &&IpAddr| {
            let holds = |net: &IpNet| net.contains(*address);
            blocks
                .iter()
                .any(|(net, except)| holds(net) && !except.iter().any(holds))
        };
        let mut found = Vec::new();
        for pod in pods(self.cluster).filter(|pod| !pod.named_ports.is_empty()) {
            let ports = named_ports(pod, &names);
            if !ports.is_empty() {
                let addresses = pod.addresses.iter().filter(meant);
                found.extend(addresses.map(|address| (*address, ports.clone())));
            }
        }
        found
    }
}

fn pods(cluster: &ClusterSnapshot) -> impl Iterator<Item = &Pod> {
    let pods = cluster.pods.values().map(|pod| &**pod);
    pods.filter(|pod| !pod.host_network)
}

/// The names of ports that a rule uses.
pub(crate) fn names(rule: &Rule) -> impl Iterator<Item = &str> {
    let ports = rule.ports.iter().flatten();
    ports.filter_map(|port| match &port.ports {
        PortRange::Named(name) => Some(name.as_str()),
        PortRange::All | PortRange::Range(..) => None,
    })
}

/// All policies, indexed to find those that select a pod.
#[derive(Debug, Default)]
pub(crate) struct Table<'a> {
    pub(crate) entries: Vec<Entry<'a>>,
    by_namespace: BTreeMap<&'a str, Vec<usize>>,
    wide: Vec<usize>,
}

impl<'a> Table<'a> {
    /// Creates the table of a cluster's policies. `known` are earlier digests of the same policies,
    /// or empty; they are updated.
    pub(crate) fn of(
        cluster: &'a ClusterSnapshot,
        places: &Places<'a>,
        known: &mut Digests,
    ) -> Self {
        let mut table = Self::default();
        known.0.resize(cluster.policies.len(), None);
        for (index, (object, policy)) in cluster.policies.iter().enumerate() {
            match &policy.subject {
                Subject::Pods { namespace, .. } | Subject::WholeNamespace(namespace) => {
                    table.by_namespace.entry(namespace).or_default().push(index);
                }
                Subject::Namespaces { .. } => table.wide.push(index),
            }
            let digest = match known.0.get_mut(index) {
                Some(Some(digest)) => *digest,
                slot => {
                    let digest = policy_digest(object, policy, places);
                    if let Some(slot) = slot {
                        *slot = speaks_for_itself(policy).then_some(digest);
                    }
                    digest
                }
            };
            table.entries.push(Entry {
                object,
                policy,
                digest,
            });
        }
        table
    }

    /// The policies that select a pod, in order.
    pub(crate) fn selecting(&self, cluster: &ClusterSnapshot, pod: &Pod) -> Vec<usize> {
        let namespace = pod.name.namespace.as_str();
        let own = self.by_namespace.get(namespace).into_iter().flatten();
        let mut selecting: Vec<usize> = own
            .chain(&self.wide)
            .copied()
            .filter(|index| {
                let subject = self.entries.get(*index).map(|e| &e.policy.subject);
                subject.is_some_and(|s| selects(cluster, s, pod))
            })
            .collect();
        selecting.sort_unstable();
        selecting
    }
}

fn policy_digest(object: &ObjectRef, policy: &Policy, places: &Places<'_>) -> [u8; 32] {
    let rules = policy.ingress.iter().chain(&policy.egress).flatten();
    let blocks: Vec<Vec<Net>> = rules
        .flat_map(|r| r.peers.iter().flatten())
        .filter(|p| !matches!(p, PeerMatch::Cidr { .. }))
        .map(|p| places.blocks(p))
        .collect();
    let egress = policy.egress.iter().flatten();
    let named: Vec<_> = egress
        .flat_map(|r| r.peers.iter().flatten().map(move |p| places.named(r, p)))
        .collect();
    let content = (
        (object, policy.tier, &policy.ingress, &policy.egress),
        (blocks, named),
    );
    digest("policy", &content)
}

/// Whether a policy is independent of [`Places`], in any cluster.
fn speaks_for_itself(policy: &Policy) -> bool {
    let rules = policy.ingress.iter().chain(&policy.egress).flatten();
    let mut peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    let is_placed = |peer: &PeerMatch| {
        matches!(
            peer,
            PeerMatch::Nodes(_) | PeerMatch::Entity(Entity::KubeApiserver)
        )
    };
    let mut egress = policy.egress.iter().flatten();
    !peers.any(is_placed) && !egress.any(|rule| names(rule).next().is_some())
}

/// Whether a policy's subject selects a pod.
pub(crate) fn selects(cluster: &ClusterSnapshot, subject: &Subject, pod: &Pod) -> bool {
    let namespace = pod.name.namespace.as_str();
    match subject {
        Subject::Pods {
            namespace: of,
            pods,
        } => of == namespace && pods.matches(&pod.labels),
        Subject::WholeNamespace(of) => of == namespace,
        Subject::Namespaces { namespaces, pods } => {
            let none = Labels::new();
            let namespace = cluster.namespaces.get(namespace);
            namespaces.matches(namespace.map_or(&none, |n| &n.labels)) && pods.matches(&pod.labels)
        }
    }
}

/// Rejects rules that cannot be enforced as they are written.
pub(crate) fn check(cluster: &ClusterSnapshot, rejections: &mut Vec<Rejection>) {
    let is_place = |peer: &PeerMatch| matches!(peer, PeerMatch::Cidr { .. } | PeerMatch::Nodes(_));
    for (object, policy) in &cluster.policies {
        for rule in policy.egress.iter().flatten() {
            if rule.action == RuleAction::Deny
                && names(rule).next().is_some()
                && rule.peers.iter().flatten().any(is_place)
            {
                rejections.push(Rejection {
                    object: object.clone(),
                    field: format!("spec.{}.ports", rule.name),
                    why: "named ports are supported for pod peers only: use the port number for CIDR \
                          and node peers"
                        .to_owned(),
                    consequence: "all ports of the protocol are denied for these peers".to_owned(),
                });
            }
        }
    }
}
