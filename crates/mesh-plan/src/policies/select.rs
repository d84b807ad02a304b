// SPDX-License-Identifier: Apache-2.0
//! Matches identities with the peers of rules; each distinct peer is evaluated once.

use std::collections::BTreeMap;
use std::rc::Rc;

use mesh_common::identity::IdentityId;

use crate::cluster::{Entity, NamespaceMatch, PeerMatch, Selector, ServiceAccountMatch};
use crate::identities::Identities;
use crate::plan::IdentityName;

/// The identities of a cluster, including entities, and the cached matches.
#[derive(Debug)]
pub(crate) struct Matcher<'i, 'a> {
    identities: &'i Identities,
    by_namespace: BTreeMap<&'i str, Vec<(IdentityId, &'i IdentityName)>>,
    known: BTreeMap<&'a PeerMatch, Rc<[IdentityId]>>,
}

impl<'i, 'a> Matcher<'i, 'a> {
    /// Creates the matcher of identities.
    pub(crate) fn new(identities: &'i Identities) -> Self {
        let mut by_namespace: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (id, content) in &identities.names {
            let of = by_namespace.entry(content.namespace.as_str()).or_default();
            of.push((*id, &**content));
        }
        Self {
            identities,
            by_namespace,
            known: BTreeMap::new(),
        }
    }

    /// The workloads with named ports.
    pub(crate) fn with_ports(&self) -> impl Iterator<Item = IdentityId> {
        let all = self.identities.names.iter();
        all.filter(|(_, content)| !content.ports.is_empty())
            .map(|(id, _)| *id)
    }

    /// Identities without a known meaning.
    pub(crate) fn collided(&self) -> impl Iterator<Item = IdentityId> {
        self.identities.collided.iter().copied()
    }

    /// The name of an identity; `None` for entities.
    pub(crate) fn content(&self, id: IdentityId) -> Option<&'i IdentityName> {
        self.identities.names.get(&id).map(|name| &**name)
    }

    /// The identities that a peer of a rule matches, other than by address.
    pub(crate) fn matching(&mut self, peer: &'a PeerMatch) -> Rc<[IdentityId]> {
        if let Some(known) = self.known.get(peer) {
            return Rc::clone(known);
        }
        let found: Rc<[IdentityId]> = match peer {
            PeerMatch::Pods {
                namespaces,
                pods,
                service_accounts,
            } => {
                let accounts = service_accounts.as_ref();
                let has_account = |content: &IdentityName| {
                    accounts.is_none_or(|all| all.iter().any(|a| account_matches(a, content)))
                };
                self.pods(namespaces, pods)
                    .filter(|(_, content)| has_account(content))
                    .map(|(id, _)| id)
                    .collect()
            }
            PeerMatch::Entity(entity) => self.entity(*entity),
            PeerMatch::Cidr { .. } | PeerMatch::Nodes(_) | PeerMatch::Nothing { .. } => Rc::new([]),
        };
        self.known.insert(peer, Rc::clone(&found));
        found
    }

    fn pods<'s>(
        &'s self,
        namespaces: &'s NamespaceMatch,
        pods: &'s Selector,
    ) -> impl Iterator<Item = (IdentityId, &'i IdentityName)> {
        let named = match namespaces {
            NamespaceMatch::Name(name) => self.by_namespace.get(name.as_str()),
            NamespaceMatch::Labels(_) => None,
        };
        let labelled = match namespaces {
            NamespaceMatch::Name(_) => None,
            NamespaceMatch::Labels(selector) => Some(selector),
        };
        let by_labels = labelled.into_iter().flat_map(|selector| {
            self.by_namespace.values().filter(move |of| {
                // All identities of a namespace have the same labels of the namespace.
                of.first()
                    .is_some_and(|(_, c)| selector.matches(&c.namespace_labels))
            })
        });
        named
            .into_iter()
            .chain(by_labels)
            .flatten()
            .copied()
            .filter(|(_, content)| pods.matches(&content.labels))
    }

    fn entity(&self, entity: Entity) -> Rc<[IdentityId]> {
        match entity {
            Entity::Host => Rc::new([IdentityId::HOST, IdentityId::HOST_API_SERVER]),
            Entity::RemoteNode => Rc::new([IdentityId::REMOTE_NODE]),
            Entity::KubeApiserver => {
                Rc::new([IdentityId::KUBE_APISERVER, IdentityId::HOST_API_SERVER])
            }
            Entity::World => Rc::new([IdentityId::WORLD]),
            Entity::Cluster => [
                IdentityId::HOST,
                IdentityId::HOST_API_SERVER,
                IdentityId::REMOTE_NODE,
                IdentityId::KUBE_APISERVER,
                IdentityId::UNKNOWN,
            ]
            .into_iter()
            .chain(self.identities.names.keys().copied())
            .collect(),
        }
    }
}

fn account_matches(account: &ServiceAccountMatch, content: &IdentityName) -> bool {
    let namespace = account.namespace.as_deref();
    let name = account.name.as_deref();
    namespace.is_none_or(|n| n == content.namespace)
        && name.is_none_or(|n| n == content.service_account)
}
