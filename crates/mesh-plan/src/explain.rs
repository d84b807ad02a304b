// SPDX-License-Identifier: Apache-2.0
//! Explains a policy decision: the tiers in their order, each rule and whether it matches, and the
//! rule that decides.
//!
//! The rules are evaluated as they are written, independently of the compiler, and can be compared
//! with the verdict of the compiled policy.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_common::identity::IdentityId;
use mesh_common::policy::{Direction, Question, RuleId};
use mesh_common::{Addr, Protocol, Reason, Verdict};

use crate::cluster::{
    ClusterSnapshot, Entity, NamespaceMatch, ObjectRef, PeerMatch, Pod, PortRange, Rule,
    RuleAction, Transport,
};
use crate::compile::Options;
use crate::policies::rules::{Place, Ranked, ranked};
use crate::policies::{Digests, Places, Table};

/// The conclusion of a walk over the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conclusion {
    /// No policy applies.
    AllowedByNothing,
    /// The node's own traffic is allowed.
    AllowedAsNodeLocal,
    /// A rule allows it.
    Allowed(ObjectRef, String),
    /// A rule denies it.
    Denied(ObjectRef, String),
    /// A policy isolates the pod, and no rule allows it.
    DeniedByDefault(ObjectRef),
    /// The pod is isolated.
    Isolated,
}

impl Conclusion {
    /// Whether traffic is allowed.
    #[must_use]
    pub const fn allows(&self) -> bool {
        match self {
            Self::AllowedByNothing | Self::AllowedAsNodeLocal | Self::Allowed(..) => true,
            Self::Denied(..) | Self::DeniedByDefault(_) | Self::Isolated => false,
        }
    }
}

impl fmt::Display for Conclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllowedByNothing => write!(f, "allowed: no policy applies to it"),
            Self::AllowedAsNodeLocal => {
                write!(f, "allowed: a node may reach its own pods (node-local)")
            }
            Self::Allowed(object, rule) => write!(f, "allowed by {object} {rule}"),
            Self::Denied(object, rule) => write!(f, "denied by {object} {rule}"),
            Self::DeniedByDefault(object) => {
                write!(
                    f,
                    "denied by default: {object} isolates the pod and no rule allows it"
                )
            }
            Self::Isolated => write!(f, "denied: the pod is isolated; see the rejections"),
        }
    }
}

/// Walks the rules for one question of a pod: a line for each rule, and the conclusion. `verdict`
/// is the one of the compiled policy.
#[must_use]
pub fn walk(
    cluster: &ClusterSnapshot,
    pod: &Pod,
    peer: Option<&Pod>,
    question: Question,
    verdict: Verdict,
) -> (Vec<String>, Conclusion) {
    let places = Places::of(cluster, None);
    let table = Table::of(cluster, &places, &mut Digests::default());
    let walk = Walk {
        cluster,
        table: &table,
        places: &places,
        pod,
        peer,
        question,
        rule: verdict.rule,
    };
    walk.all(verdict)
}

struct Walk<'w, 'a> {
    cluster: &'a ClusterSnapshot,
    table: &'w Table<'a>,
    places: &'w Places<'a>,
    pod: &'a Pod,
    peer: Option<&'a Pod>,
    question: Question,
    /// The rule that the compiled policy names.
    rule: RuleId,
}

/// Whether and why a rule matches.
enum Matching {
    Yes,
    OtherPeers,
    OtherPorts,
    NeedsProof,
}

impl Walk<'_, '_> {
    fn all(&self, verdict: Verdict) -> (Vec<String>, Conclusion) {
        let mut steps = Vec::new();
        let conclusion = if verdict.reason == Reason::PolicyMissing {
            Conclusion::Isolated
        } else {
            self.walk(&mut steps)
        };
        (steps, conclusion)
    }

    fn walk(&self, steps: &mut Vec<String>) -> Conclusion {
        let direction = self.question.direction;
        let selecting = self.table.selecting(self.cluster, self.pod);
        let audited = |index: &usize| {
            self.table
                .entries
                .get(*index)
                .is_some_and(|e| e.policy.audit)
        };
        let (audit, enforced): (Vec<usize>, Vec<usize>) = selecting.into_iter().partition(audited);
        for entry in audit
            .iter()
            .filter_map(|index| self.table.entries.get(*index))
        {
            steps.push(format!("{} only audits", entry.object));
        }
        let rules = ranked(self.table, &enforced, direction, &Options::default());
        let of = |test: fn(&Place) -> bool| rules.iter().filter(move |r| test(&r.place));
        let admin = of(|place| matches!(place, Place::Admin(_)));
        if let Some(conclusion) = self.first("admin tier", admin, steps) {
            return conclusion;
        }
        if self.question.peer.is_host() && direction == Direction::Ingress {
            return Conclusion::AllowedAsNodeLocal;
        }
        let namespaced = of(|place| matches!(place, Place::Namespaced));
        if let Some(conclusion) = self.strictest("namespaced tier", namespaced, steps) {
            return conclusion;
        }
        let mut entries = enforced
            .iter()
            .filter_map(|index| self.table.entries.get(*index));
        if let Some(isolating) = entries.find(|entry| entry.isolates(direction)) {
            return Conclusion::DeniedByDefault(isolating.object.clone());
        }
        let baseline = of(|place| matches!(place, Place::Baseline(_)));
        let found = self.first("baseline tier", baseline, steps);
        found.unwrap_or(Conclusion::AllowedByNothing)
    }

    /// A tier in which the first match decides.
    fn first<'r, 'a: 'r>(
        &self,
        tier: &str,
        rules: impl Iterator<Item = &'r Ranked<'a>>,
        steps: &mut Vec<String>,
    ) -> Option<Conclusion> {
        for rule in rules {
            if !self.step(tier, rule, steps) {
                continue;
            }
            return match rule.rule.action {
                RuleAction::Allow => Some(allowed(rule)),
                RuleAction::Deny => Some(denied(rule)),
                RuleAction::Pass => None,
            };
        }
        None
    }

    /// The tier in which Deny beats Allow.
    fn strictest<'r, 'a: 'r>(
        &self,
        tier: &str,
        rules: impl Iterator<Item = &'r Ranked<'a>>,
        steps: &mut Vec<String>,
    ) -> Option<Conclusion> {
        // Of several rules with one action, name the one that records name.
        let (mut allow, mut deny) = (None, None);
        for rule in rules {
            if !self.step(tier, rule, steps) {
                continue;
            }
            let (found, conclusion) = match rule.rule.action {
                RuleAction::Deny => (&mut deny, denied(rule)),
                RuleAction::Allow => (&mut allow, allowed(rule)),
                RuleAction::Pass => continue,
            };
            if found.is_none() || rule.id == self.rule {
                *found = Some(conclusion);
            }
        }
        deny.or(allow)
    }

    fn step(&self, tier: &str, rule: &Ranked<'_>, steps: &mut Vec<String>) -> bool {
        let matching = self.matching(rule.rule);
        let result = match matching {
            Matching::Yes => "matches",
            Matching::OtherPeers => "is about other peers",
            Matching::OtherPorts => "is about other ports",
            Matching::NeedsProof => "needs a proven identity",
        };
        let action = match rule.rule.action {
            RuleAction::Allow => "allow",
            RuleAction::Deny => "deny",
            RuleAction::Pass => "pass",
        };
        steps.push(format!(
            "{tier}: {} {} ({action}) {result}",
            rule.object, rule.rule.name
        ));
        matches!(matching, Matching::Yes)
    }

    fn matching(&self, rule: &Rule) -> Matching {
        let proven = |peer: &PeerMatch| {
            let by_account = matches!(
                peer,
                PeerMatch::Pods {
                    service_accounts: Some(_),
                    ..
                }
            );
            !by_account || rule.action == RuleAction::Deny || self.question.evidence.is_proof()
        };
        if let Some(peers) = &rule.peers {
            let mut meant = peers
                .iter()
                .filter(|peer| self.is_meant(peer) || self.is_inside(peer));
            let Some(first) = meant.next() else {
                return Matching::OtherPeers;
            };
            if !proven(first) && !meant.any(proven) {
                return Matching::NeedsProof;
            }
        }
        match self.port_matches(rule) {
            true => Matching::Yes,
            false => Matching::OtherPorts,
        }
    }

    /// Whether a peer of a rule matches the identity of the peer.
    fn is_meant(&self, peer: &PeerMatch) -> bool {
        let id = self.question.peer;
        match peer {
            PeerMatch::Pods {
                namespaces,
                pods,
                service_accounts,
            } => self.peer.filter(|_| id.is_workload()).is_some_and(|pod| {
                let namespace = &pod.name.namespace;
                let in_namespace = match namespaces {
                    NamespaceMatch::Name(name) => name == namespace,
                    NamespaceMatch::Labels(selector) => {
                        let namespace = self.cluster.namespaces.get(namespace);
                        selector.matches(&namespace.map(|n| n.labels.clone()).unwrap_or_default())
                    }
                };
                let accounts = service_accounts.as_ref().is_none_or(|accounts| {
                    accounts.iter().any(|a| {
                        a.namespace.as_ref().is_none_or(|n| n == namespace)
                            && a.name.as_ref().is_none_or(|n| *n == pod.service_account)
                    })
                });
                in_namespace && pods.matches(&pod.labels) && accounts
            }),
            PeerMatch::Entity(entity) => match entity {
                Entity::Host => id.is_host(),
                Entity::RemoteNode => id == IdentityId::REMOTE_NODE,
                Entity::KubeApiserver => {
                    matches!(id, IdentityId::KUBE_APISERVER | IdentityId::HOST_API_SERVER)
                }
                Entity::Cluster => id != IdentityId::WORLD,
                Entity::World => id == IdentityId::WORLD,
            },
            PeerMatch::Cidr { .. } | PeerMatch::Nodes(_) | PeerMatch::Nothing { .. } => false,
        }
    }

    /// Whether a peer of a rule matches the address of the peer.
    fn is_inside(&self, peer: &PeerMatch) -> bool {
        let holds = |net: &IpNet| contains(net, self.question.addr);
        let blocks = self.places.blocks(peer);
        blocks
            .iter()
            .any(|(cidr, except)| holds(cidr) && !except.iter().any(holds))
    }

    /// Whether the ports of a rule contain the port; names are those of the destination.
    fn port_matches(&self, rule: &Rule) -> bool {
        let Some(ports) = &rule.ports else {
            return true;
        };
        let transport = match self.question.protocol {
            Protocol::TCP => Some(Transport::Tcp),
            Protocol::UDP => Some(Transport::Udp),
            Protocol::SCTP => Some(Transport::Sctp),
            _ => None,
        };
        let number = self.question.port.get();
        let destination = match self.question.direction {
            Direction::Ingress => Some(self.pod),
            Direction::Egress => self.peer,
        };
        let is_place = |peer: &PeerMatch| {
            matches!(peer, PeerMatch::Cidr { .. } | PeerMatch::Nodes(_)) && self.is_inside(peer)
        };
        let every = rule.action == RuleAction::Deny
            && self.question.direction == Direction::Egress
            && rule.peers.iter().flatten().any(is_place);
        let named = |name: &str, transport: Transport| {
            let key = (name.to_owned(), transport);
            every || destination.is_some_and(|pod| pod.named_ports.get(&key) == Some(&number))
        };
        ports
            .iter()
            .any(|port| match (&port.ports, port.transport) {
                (PortRange::All, None) => true,
                (_, None) => false,
                (range, wanted) => {
                    wanted == transport
                        && match range {
                            PortRange::All => true,
                            PortRange::Range(first, last) => (*first..=*last).contains(&number),
                            PortRange::Named(name) => wanted.is_some_and(|t| named(name, t)),
                        }
                }
            })
    }
}

fn contains(net: &IpNet, addr: Addr) -> bool {
    net.contains(&IpAddr::from(addr))
}

fn allowed(rule: &Ranked<'_>) -> Conclusion {
    Conclusion::Allowed(rule.object.clone(), rule.rule.name.clone())
}

fn denied(rule: &Ranked<'_>) -> Conclusion {
    Conclusion::Denied(rule.object.clone(), rule.rule.name.clone())
}
