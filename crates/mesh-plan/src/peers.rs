// SPDX-License-Identifier: Apache-2.0
//! Owners of addresses: pods, nodes and API servers.
//!
//! An address with two claimants has no owner: peers see it as `unknown`, and local pods that claim
//! it are isolated. Disputes are never decided, with two exceptions: a terminating pod yields to a
//! single pod that is not, and this node keeps its own addresses.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::sync::Arc;

use mesh_common::Addr;
use mesh_common::identity::{IdentityId, Peer};

use crate::authentication::{self, Enrolment};
use crate::cluster::{ClusterSnapshot, ObjectRef, Pod, Rejection};
use crate::compile::pod_ref;
use crate::identities::OfPods;

/// A claimant of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claimant<'a> {
    Pod(&'a Arc<Pod>),
    Node(&'a str),
}

impl Claimant<'_> {
    fn object(&self) -> ObjectRef {
        match self {
            Self::Pod(pod) => pod_ref(pod),
            Self::Node(name) => ObjectRef::new("Node", "", *name),
        }
    }
}

/// The owner of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner<'a> {
    Pod(&'a Arc<Pod>),
    /// A node; of several, this node if it is among them.
    Node(&'a str),
    /// Several claimants dispute it.
    Disputed,
}

/// The owners of all addresses of pods and nodes.
pub(crate) fn owners<'a>(
    cluster: &'a ClusterSnapshot,
    node: Option<&str>,
    rejections: &mut Vec<Rejection>,
) -> BTreeMap<Addr, Owner<'a>> {
    let pods = cluster.pods.values().filter(|pod| !pod.host_network);
    let of_pods = pods.flat_map(|pod| pod.addresses.iter().map(move |a| (*a, Claimant::Pod(pod))));
    let of_nodes = cluster.nodes.iter().flat_map(|(name, node)| {
        let claim = Claimant::Node(name.as_str());
        node.addresses.iter().map(move |a| (*a, claim))
    });
    let mut owners: BTreeMap<Addr, Owner<'a>> = BTreeMap::new();
    let mut several: BTreeMap<Addr, Vec<Claimant<'a>>> = BTreeMap::new();
    for (address, claim) in of_pods.chain(of_nodes) {
        let address = Addr::from(address);
        match owners.entry(address) {
            btree_map::Entry::Vacant(entry) => {
                entry.insert(match claim {
                    Claimant::Pod(pod) => Owner::Pod(pod),
                    Claimant::Node(name) => Owner::Node(name),
                });
            }
            btree_map::Entry::Occupied(mut entry) => {
                let first = match entry.insert(Owner::Disputed) {
                    Owner::Pod(pod) => Some(Claimant::Pod(pod)),
                    Owner::Node(name) => Some(Claimant::Node(name)),
                    Owner::Disputed => None,
                };
                let claims = several.entry(address).or_default();
                claims.extend(first);
                claims.push(claim);
            }
        }
    }
    for (address, claims) in several {
        owners.insert(address, settle(address, &claims, node, rejections));
    }
    owners
}

fn settle<'a>(
    address: Addr,
    claims: &[Claimant<'a>],
    this: Option<&str>,
    rejections: &mut Vec<Rejection>,
) -> Owner<'a> {
    let living: Vec<Claimant<'a>> = claims
        .iter()
        .copied()
        .filter(|c| !matches!(c, Claimant::Pod(pod) if pod.terminating))
        .collect();
    let only_nodes = living.iter().all(|c| matches!(c, Claimant::Node(_)));
    let own = living.iter().find_map(|c| match c {
        Claimant::Node(name) if Some(*name) == this => Some(*name),
        Claimant::Node(_) | Claimant::Pod(_) => None,
    });
    let owner = match (own, living.as_slice()) {
        (Some(name), _) => Owner::Node(name),
        (None, [Claimant::Pod(pod)]) => Owner::Pod(pod),
        // Several nodes with one address are one entity.
        (None, [Claimant::Node(name), ..]) if only_nodes => Owner::Node(name),
        (None, _) => Owner::Disputed,
    };
    if living.len() > 1 {
        let names: BTreeSet<ObjectRef> = claims.iter().map(Claimant::object).collect();
        let list: Vec<String> = names.iter().map(ToString::to_string).collect();
        let consequence = match owner {
            Owner::Node(_) => "the address is treated as a node address".to_owned(),
            Owner::Pod(_) | Owner::Disputed => {
                "the address is treated as unknown, and pods of this node that claim it are isolated".to_owned()
            }
        };
        for object in &names {
            rejections.push(Rejection {
                object: object.clone(),
                field: "status".to_owned(),
                why: format!("address {address} is claimed by {}", list.join(" and ")),
                consequence: consequence.clone(),
            });
        }
    }
    owner
}

/// The content of the map `PEERS` of a node.
pub(crate) fn peers(
    cluster: &ClusterSnapshot,
    node: &str,
    owners: &BTreeMap<Addr, Owner<'_>>,
    of_pods: &OfPods<'_>,
) -> BTreeMap<Addr, Peer> {
    let entity = |id| Peer {
        id,
        flags: 0,
        pad: 0,
    };
    let servers: BTreeSet<Addr> = cluster.api_servers.iter().map(|a| Addr::from(*a)).collect();
    let mut peers: BTreeMap<Addr, Peer> = owners
        .iter()
        .map(|(address, owner)| {
            let peer = match owner {
                Owner::Pod(pod) => Peer {
                    id: of_pods
                        .get(&*pod.uid)
                        .copied()
                        .unwrap_or(IdentityId::UNKNOWN),
                    flags: flags(cluster, pod),
                    pad: 0,
                },
                Owner::Node(name) if *name == node => match servers.contains(address) {
                    true => entity(IdentityId::HOST_API_SERVER),
                    false => entity(IdentityId::HOST),
                },
                Owner::Node(_) => entity(IdentityId::REMOTE_NODE),
                Owner::Disputed => entity(IdentityId::UNKNOWN),
            };
            (*address, peer)
        })
        .collect();
    for address in servers {
        peers
            .entry(address)
            .or_insert(entity(IdentityId::KUBE_APISERVER));
    }
    peers
}

/// The flags of a pod as a peer.
pub(crate) fn flags(cluster: &ClusterSnapshot, pod: &Pod) -> u32 {
    let enrolment = authentication::enrolment(cluster, pod);
    if enrolment == Enrolment::No {
        return Peer::POD;
    }
    let mut flags = Peer::POD | Peer::ENROLLED;
    if authentication::ready(cluster, pod, enrolment) {
        flags |= Peer::READY;
    }
    if authentication::modes(cluster, pod).any_strict() {
        flags |= Peer::STRICT;
    }
    flags
}

/// The pods by address, for addresses that one pod owns.
pub(crate) fn workloads(owners: &BTreeMap<Addr, Owner<'_>>) -> BTreeMap<Addr, Arc<Pod>> {
    let named = |(address, owner): (&Addr, &Owner<'_>)| match owner {
        Owner::Pod(pod) => Some((*address, Arc::clone(pod))),
        Owner::Node(_) | Owner::Disputed => None,
    };
    owners.iter().filter_map(named).collect()
}
