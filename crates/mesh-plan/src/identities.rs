// SPDX-License-Identifier: Apache-2.0
//! Workload identities. Pods that no policy can distinguish as peers share one.
//!
//! An identity is a hash of the namespace, the service account, the labels of pod and namespace
//! that peers of policies use, and the named ports that egress rules use. It does not depend on the
//! policies that select the pod itself.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_common::identity::IdentityId;

use crate::cluster::{
    ClusterSnapshot, Labels, NamespaceMatch, PeerMatch, Pod, Policy, PortRange, Rejection, Rule,
    Selector, Transport,
};
use crate::compile::{Options, pod_ref};
use crate::plan::IdentityName;
use crate::shared::Shared;

/// The labels and ports that policies use to match peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Relevant {
    /// Keys of pod labels.
    pub(crate) pods: BTreeSet<String>,
    /// Keys of namespace labels.
    pub(crate) namespaces: BTreeSet<String>,
    /// Names of ports.
    pub(crate) ports: BTreeSet<String>,
}

impl Relevant {
    /// Collects the labels and ports of policies.
    pub(crate) fn of<'a>(policies: impl Iterator<Item = &'a Arc<Policy>>) -> Self {
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

    fn add_peers(&mut self, rule: &Rule) {
        for peer in rule.peers.iter().flatten() {
            let PeerMatch::Pods {
                namespaces, pods, ..
            } = peer
            else {
                continue;
            };
            add(&mut self.pods, keys(pods));
            if let NamespaceMatch::Labels(selector) = namespaces {
                add(&mut self.namespaces, keys(selector));
            }
        }
    }

    fn add_ports(&mut self, rule: &Rule) {
        let named = rule
            .ports
            .iter()
            .flatten()
            .filter_map(|port| match &port.ports {
                PortRange::Named(name) => Some(name.as_str()),
                PortRange::All | PortRange::Range(..) => None,
            });
        add(&mut self.ports, named);
    }
}

/// Adds missing words. Most policies use the same few keys, so most words are known.
fn add<'a>(set: &mut BTreeSet<String>, words: impl Iterator<Item = &'a str>) {
    for word in words {
        if !set.contains(word) {
            set.insert(word.to_owned());
        }
    }
}

fn keys(selector: &Selector) -> impl Iterator<Item = &str> {
    selector.requirements.iter().map(|r| r.key.as_str())
}

/// Labels as sorted pairs.
type Pairs<'a> = Vec<(&'a str, &'a str)>;

/// The content of an identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Content<'a> {
    namespace: &'a str,
    service_account: &'a str,
    labels: Pairs<'a>,
    namespace_labels: &'a [(&'a str, &'a str)],
    ports: NamedPorts<'a>,
}

/// Named ports as sorted triples.
pub(crate) type NamedPorts<'a> = Vec<(&'a str, Transport, u16)>;

impl Content<'_> {
    fn name(&self) -> IdentityName {
        let port = |(name, transport, number): &(&str, Transport, u16)| {
            (((*name).to_owned(), *transport), *number)
        };
        IdentityName {
            namespace: self.namespace.to_owned(),
            service_account: self.service_account.to_owned(),
            labels: owned(&self.labels),
            namespace_labels: owned(self.namespace_labels),
            ports: self.ports.iter().map(port).collect(),
        }
    }

    fn is(&self, name: &IdentityName) -> bool {
        let equal = |pairs: &[(&str, &str)], labels: &Labels| {
            let labels = labels.iter().map(|(k, v)| (k.as_str(), v.as_str()));
            pairs.iter().copied().eq(labels)
        };
        let ports = name
            .ports
            .iter()
            .map(|((n, t), number)| (n.as_str(), *t, *number));
        self.namespace == name.namespace
            && self.service_account == name.service_account
            && equal(&self.labels, &name.labels)
            && equal(self.namespace_labels, &name.namespace_labels)
            && self.ports.iter().copied().eq(ports)
    }
}

fn owned(pairs: &[(&str, &str)]) -> Labels {
    let pair = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
    pairs.iter().map(pair).collect()
}

fn pairs<'a>(labels: &'a Labels, keys: &BTreeSet<String>) -> Pairs<'a> {
    if keys.is_empty() {
        return Vec::new();
    }
    labels
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .filter(|(k, _)| keys.contains(*k))
        .collect()
}

/// The named ports of a pod that have one of the given names.
pub(crate) fn named_ports<'a, N: Borrow<str> + Ord>(
    pod: &'a Pod,
    names: &BTreeSet<N>,
) -> NamedPorts<'a> {
    if names.is_empty() {
        return Vec::new();
    }
    pod.named_ports
        .iter()
        .filter(|((name, _), _)| names.contains(name.as_str()))
        .map(|((name, transport), number)| (name.as_str(), *transport, *number))
        .collect()
}

/// Computes the identities of pods.
pub(crate) struct Identifier<'c> {
    relevant: &'c Relevant,
    namespaces: HashMap<&'c str, Pairs<'c>>,
    options: &'c Options,
}

impl<'c> Identifier<'c> {
    /// Creates the identifier of a cluster; `relevant` is of its policies.
    pub(crate) fn of(
        cluster: &'c ClusterSnapshot,
        relevant: &'c Relevant,
        options: &'c Options,
    ) -> Self {
        let namespaces = cluster
            .namespaces
            .iter()
            .map(|(name, n)| (name.as_str(), pairs(&n.labels, &relevant.namespaces)))
            .collect();
        Self {
            relevant,
            namespaces,
            options,
        }
    }

    fn content<'s>(&'s self, pod: &'s Pod) -> Content<'s> {
        let namespace = pod.name.namespace.as_str();
        Content {
            namespace,
            service_account: &pod.service_account,
            labels: pairs(&pod.labels, &self.relevant.pods),
            namespace_labels: self.namespaces.get(namespace).map_or(&[], Vec::as_slice),
            ports: named_ports(pod, &self.relevant.ports),
        }
    }

    /// The identity of a pod.
    pub(crate) fn id_of(&self, pod: &Pod) -> IdentityId {
        self.id(&self.content(pod))
    }

    fn id(&self, content: &Content<'_>) -> IdentityId {
        let first = IdentityId::FIRST_WORKLOAD.0;
        IdentityId(self.options.ids.id("identity", first, content))
    }
}

/// The identities of pods by UID, without those in the host network.
pub(crate) type OfPods<'a> = HashMap<&'a str, IdentityId>;

/// Every identity of the cluster's workloads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identities {
    /// The name of each identity.
    pub(crate) names: Shared<BTreeMap<IdentityId, Arc<IdentityName>>>,
    /// The number of pods with each identity.
    counts: HashMap<IdentityId, usize>,
    /// Ids with two contents; they are not in `names`, and every set refuses them.
    pub(crate) collided: BTreeSet<IdentityId>,
}

impl Identities {
    /// The identities of a cluster's pods, and the identity of each pod.
    pub(crate) fn of<'a>(
        cluster: &'a ClusterSnapshot,
        identifier: &'a Identifier<'a>,
        rejections: &mut Vec<Rejection>,
    ) -> (Self, OfPods<'a>) {
        let mut all = Self::default();
        let mut of_pods = OfPods::new();
        let mut known: HashMap<Content<'a>, IdentityId> = HashMap::new();
        let mut collided: BTreeMap<IdentityId, &'a Pod> = BTreeMap::new();
        for (uid, pod) in cluster.pods.iter().filter(|(_, pod)| !pod.host_network) {
            let content = identifier.content(pod);
            let id = match known.get(&content) {
                Some(id) => *id,
                None => {
                    let id = identifier.id(&content);
                    if all.names.contains_key(&id) {
                        collided.insert(id, pod);
                    }
                    all.names
                        .entry(id)
                        .or_insert_with(|| Arc::new(content.name()));
                    known.insert(content, id);
                    id
                }
            };
            *all.counts.entry(id).or_default() += 1;
            of_pods.insert(uid, id);
        }
        for (id, pod) in collided {
            all.names.remove(&id);
            all.collided.insert(id);
            rejections.push(collision(id, pod));
        }
        (all, of_pods)
    }

    /// Adds a pod; `None` = the id of its identity collides.
    pub(crate) fn add(&mut self, identifier: &Identifier<'_>, pod: &Pod) -> Option<IdentityId> {
        let content = identifier.content(pod);
        let id = identifier.id(&content);
        if self.collided.contains(&id) {
            return None;
        }
        *self.counts.entry(id).or_default() += 1;
        match self.names.get(&id) {
            Some(name) => content.is(name).then_some(id),
            None => {
                self.names.insert(id, Arc::new(content.name()));
                Some(id)
            }
        }
    }

    /// Removes a pod.
    pub(crate) fn remove(&mut self, identifier: &Identifier<'_>, pod: &Pod) {
        let id = identifier.id(&identifier.content(pod));
        let count = self.counts.entry(id).or_default();
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.counts.remove(&id);
            self.names.remove(&id);
        }
    }
}

fn collision(id: IdentityId, pod: &Pod) -> Rejection {
    Rejection {
        object: pod_ref(pod),
        field: "metadata.labels".to_owned(),
        why: format!(
            "hash collision: this pod's identity and another pod's identity have the hash {:#x}; \
             change a label that policies use",
            id.0
        ),
        consequence: "pods of both identities are isolated, and pods with policy refuse them"
            .to_owned(),
    }
}
