// SPDX-License-Identifier: Apache-2.0
//! Workload identities: pods that no policy can tell apart as peers have one.
//!
//! An identity is a hash of namespace, service account, the labels of pod and namespace that some
//! policy's peers name, and the named ports that some egress rule names. It says nothing about the
//! policies that select the pod itself.

use std::collections::{BTreeMap, BTreeSet, btree_map};

use mesh_common::identity::IdentityId;

use crate::cluster::{
    Cluster, Labels, NamespaceMatch, PeerMatch, Pod, Policy, PortRange, Rejection, Rule, Selector,
    Transport,
};
use crate::compile::{Options, pod_ref};
use crate::plan::IdentityName;

/// What of pods and namespaces policy asks about peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Relevant<'a> {
    /// Keys of pods' labels.
    pub(crate) pods: BTreeSet<&'a str>,
    /// Keys of namespaces' labels.
    pub(crate) namespaces: BTreeSet<&'a str>,
    /// Names of ports.
    pub(crate) ports: BTreeSet<&'a str>,
}

impl<'a> Relevant<'a> {
    /// What these policies ask about.
    pub(crate) fn of(policies: impl Iterator<Item = &'a Policy>) -> Self {
        let mut relevant = Self::default();
        for policy in policies {
            let ingress = policy.ingress.iter().flatten();
            let egress = policy.egress.iter().flatten();
            for rule in ingress.chain(egress.clone()) {
                relevant.add_peers(rule);
            }
            for rule in egress {
                relevant.add_ports(rule);
            }
        }
        relevant
    }

    fn add_peers(&mut self, rule: &'a Rule) {
        for peer in rule.peers.iter().flatten() {
            let PeerMatch::Pods {
                namespaces, pods, ..
            } = peer
            else {
                continue;
            };
            self.pods.extend(keys(pods));
            if let NamespaceMatch::Labels(selector) = namespaces {
                self.namespaces.extend(keys(selector));
            }
        }
    }

    fn add_ports(&mut self, rule: &'a Rule) {
        for port in rule.ports.iter().flatten() {
            if let PortRange::Named(name) = &port.ports {
                self.ports.insert(name);
            }
        }
    }
}

fn keys(selector: &Selector) -> impl Iterator<Item = &str> {
    selector.requirements.iter().map(|r| r.key.as_str())
}

/// Labels as sorted pairs.
type Pairs<'a> = Vec<(&'a str, &'a str)>;

/// What makes an identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Content<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) service_account: &'a str,
    pub(crate) labels: Pairs<'a>,
    pub(crate) namespace_labels: Pairs<'a>,
    pub(crate) ports: NamedPorts<'a>,
}

/// Named ports as sorted triples.
pub(crate) type NamedPorts<'a> = Vec<(&'a str, Transport, u16)>;

impl Content<'_> {
    /// The value of a label of the pod.
    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        value(&self.labels, key)
    }

    /// The value of a label of the namespace.
    pub(crate) fn namespace_label(&self, key: &str) -> Option<&str> {
        value(&self.namespace_labels, key)
    }

    fn name(&self) -> IdentityName {
        IdentityName {
            namespace: self.namespace.to_owned(),
            service_account: self.service_account.to_owned(),
            labels: owned(&self.labels),
            namespace_labels: owned(&self.namespace_labels),
            ports: self
                .ports
                .iter()
                .map(|(name, transport, number)| (((*name).to_owned(), *transport), *number))
                .collect(),
        }
    }
}

fn value<'a>(pairs: &Pairs<'a>, key: &str) -> Option<&'a str> {
    let at = pairs.binary_search_by(|(k, _)| (*k).cmp(key)).ok()?;
    pairs.get(at).map(|(_, v)| *v)
}

fn owned(pairs: &Pairs<'_>) -> Labels {
    let pair = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
    pairs.iter().map(pair).collect()
}

fn pairs<'a>(labels: &'a Labels, keys: &BTreeSet<&str>) -> Pairs<'a> {
    if keys.is_empty() {
        return Vec::new();
    }
    labels
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .filter(|(k, _)| keys.contains(k))
        .collect()
}

/// A pod's named ports that are among some names.
pub(crate) fn named_ports<'a>(pod: &'a Pod, names: &BTreeSet<&str>) -> NamedPorts<'a> {
    if names.is_empty() {
        return Vec::new();
    }
    pod.named_ports
        .iter()
        .filter(|((name, _), _)| names.contains(name.as_str()))
        .map(|((name, transport), number)| (name.as_str(), *transport, *number))
        .collect()
}

/// Every identity of the cluster's workloads, and whose it is.
#[derive(Debug, Default)]
pub(crate) struct Identities<'a> {
    /// By id.
    pub(crate) contents: BTreeMap<IdentityId, Content<'a>>,
    /// The identity of each pod that is not the node itself, by UID.
    pub(crate) of_pod: BTreeMap<&'a str, IdentityId>,
    /// Ids that stand for two contents; they are in `of_pod`, not in `contents`, and every set
    /// refuses them.
    pub(crate) collided: BTreeSet<IdentityId>,
}

impl<'a> Identities<'a> {
    /// The identities of a cluster's pods.
    pub(crate) fn of(
        cluster: &'a Cluster,
        relevant: &Relevant<'_>,
        options: &Options,
        rejections: &mut Vec<Rejection>,
    ) -> Self {
        let mut all = Self::default();
        let mut collided: BTreeMap<IdentityId, &'a Pod> = BTreeMap::new();
        let namespaces: BTreeMap<&str, Pairs<'a>> = cluster
            .namespaces
            .iter()
            .map(|(name, n)| (name.as_str(), pairs(&n.labels, &relevant.namespaces)))
            .collect();
        for (uid, pod) in cluster.pods.iter().filter(|(_, pod)| !pod.host_network) {
            let namespace = pod.name.namespace.as_str();
            let content = Content {
                namespace,
                service_account: &pod.service_account,
                labels: pairs(&pod.labels, &relevant.pods),
                namespace_labels: namespaces.get(namespace).cloned().unwrap_or_default(),
                ports: named_ports(pod, &relevant.ports),
            };
            let id = identity_id(options, &content);
            match all.contents.entry(id) {
                btree_map::Entry::Vacant(entry) => {
                    entry.insert(content);
                }
                btree_map::Entry::Occupied(entry) if *entry.get() == content => {}
                btree_map::Entry::Occupied(_) => {
                    collided.insert(id, pod);
                }
            }
            all.of_pod.insert(uid, id);
        }
        all.close(&collided, rejections);
        all
    }

    fn close(&mut self, collided: &BTreeMap<IdentityId, &Pod>, rejections: &mut Vec<Rejection>) {
        for (id, pod) in collided {
            self.contents.remove(id);
            self.collided.insert(*id);
            rejections.push(Rejection {
                object: pod_ref(pod),
                field: "metadata.labels".to_owned(),
                why: format!(
                    "this pod's identity and another's have the same hash {:#x}; change a label \
                     that policies use",
                    id.0
                ),
                consequence:
                    "the pods of both identities are isolated, and refused by every pod that has \
                              policy"
                        .to_owned(),
            });
        }
    }

    /// The names for people.
    pub(crate) fn names(&self) -> BTreeMap<IdentityId, IdentityName> {
        let name = |(id, content): (&IdentityId, &Content<'_>)| (*id, content.name());
        self.contents.iter().map(name).collect()
    }
}

fn identity_id(options: &Options, content: &Content<'_>) -> IdentityId {
    let first = IdentityId::FIRST_WORKLOAD.0;
    IdentityId(options.ids.id("identity", first, content))
}
