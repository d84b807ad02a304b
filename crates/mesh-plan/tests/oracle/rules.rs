// SPDX-License-Identifier: Apache-2.0
//! Random policies: each of the four kinds, as its own API admits it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_plan::cluster::{
    ClusterSnapshot, Entity, LabelTest, NamespaceMatch, ObjectRef, PeerMatch, Policy, PortMatch,
    PortRange, Requirement, Rule, RuleAction, Selector, ServiceAccountMatch, Subject, Tier,
};

use crate::naive::Side;
use crate::world::{ACCOUNTS, LABELS, NAMESPACES, PORT_NAMES, PORTS, Random, TRANSPORTS};

/// The kinds of policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Network,
    Mesh,
    ClusterNetwork,
    ClusterMesh,
}

impl Kind {
    const ALL: [Self; 4] = [
        Self::Network,
        Self::Mesh,
        Self::ClusterNetwork,
        Self::ClusterMesh,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Network => "NetworkPolicy",
            Self::Mesh => "MeshPolicy",
            Self::ClusterNetwork => "ClusterNetworkPolicy",
            Self::ClusterMesh => "ClusterMeshPolicy",
        }
    }

    const fn is_ours(self) -> bool {
        matches!(self, Self::Mesh | Self::ClusterMesh)
    }

    const fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::ClusterNetwork | Self::ClusterMesh)
    }
}

/// The parameters of a policy's rules.
struct Scope<'a> {
    kind: Kind,
    namespace: &'static str,
    tier: Tier,
    /// The action of every rule; `None` = each has its own.
    action: Option<RuleAction>,
    addresses: &'a [IpAddr],
}

/// A policy of any kind. `addresses` are those that its blocks are laid around.
pub(crate) fn policy(
    random: &mut Random,
    index: usize,
    addresses: &[IpAddr],
) -> (ObjectRef, Policy) {
    let kind = *random.pick(&Kind::ALL);
    // Few different priorities, so that equal ones meet.
    let priority = u32::try_from(random.below(3)).expect("below 3") * 500;
    let (namespace, tier) = if !kind.is_cluster_scoped() {
        (*random.pick(&NAMESPACES), Tier::Namespaced)
    } else if random.one_in(3) {
        ("", Tier::Baseline(priority))
    } else {
        ("", Tier::Admin(priority))
    };
    let action = match kind {
        Kind::Network => Some(RuleAction::Allow),
        Kind::Mesh => Some(*random.pick(&[RuleAction::Allow, RuleAction::Deny])),
        Kind::ClusterNetwork | Kind::ClusterMesh => None,
    };
    let scope = Scope {
        kind,
        namespace,
        tier,
        action,
        addresses,
    };
    let policy = Policy {
        tier,
        subject: subject(random, &scope),
        ingress: rules(random, &scope, Side::Ingress),
        egress: rules(random, &scope, Side::Egress),
        audit: kind.is_ours() && random.one_in(5),
    };
    let object = ObjectRef::new(kind.name(), namespace, format!("policy-{index}"));
    (object, policy)
}

fn subject(random: &mut Random, scope: &Scope<'_>) -> Subject {
    if scope.kind.is_cluster_scoped() {
        return Subject::Namespaces {
            namespaces: selector(random),
            pods: selector(random),
        };
    }
    if random.one_in(20) {
        return Subject::WholeNamespace(scope.namespace.to_owned());
    }
    Subject::Pods {
        namespace: scope.namespace.to_owned(),
        pods: selector(random),
    }
}

fn rules(random: &mut Random, scope: &Scope<'_>, side: Side) -> Option<Vec<Rule>> {
    if random.one_in(4) {
        return None;
    }
    // A list without rules isolates, which only what allows can do.
    let least = usize::from(scope.action == Some(RuleAction::Deny));
    let mut rules = random.some(least, 3, |r| rule(r, scope, side));
    for (index, rule) in rules.iter_mut().enumerate() {
        let direction = match side {
            Side::Ingress => "ingress",
            Side::Egress => "egress",
        };
        rule.name = format!("{direction}[{index}]");
    }
    Some(rules)
}

fn rule(random: &mut Random, scope: &Scope<'_>, side: Side) -> Rule {
    // CNP rules always name peers ("must be defined and contain at least one item").
    let everybody = scope.kind != Kind::ClusterNetwork && random.one_in(6);
    let peers = (!everybody).then(|| random.some(1, 3, |r| peer(r, scope, side)));
    let mut ports = (!random.one_in(2)).then(|| random.some(1, 3, ports));
    let of_tier: &[RuleAction] = match (scope.tier, scope.kind) {
        (Tier::Baseline(_), Kind::ClusterMesh) => &[RuleAction::Allow, RuleAction::Deny],
        _ => &[RuleAction::Allow, RuleAction::Deny, RuleAction::Pass],
    };
    let action = scope.action.unwrap_or_else(|| *random.pick(of_tier));
    let api_server = peers
        .iter()
        .flatten()
        .any(|peer| *peer == PeerMatch::Entity(Entity::KubeApiserver));
    if api_server && side == Side::Egress && action == RuleAction::Deny {
        // Named ports of the API server have a case of their own.
        ports = None;
    }
    Rule {
        name: String::new(),
        action,
        peers,
        ports,
    }
}

fn peer(random: &mut Random, scope: &Scope<'_>, side: Side) -> PeerMatch {
    let networks = match scope.kind {
        Kind::ClusterNetwork => side == Side::Egress,
        Kind::Network | Kind::Mesh | Kind::ClusterMesh => true,
    };
    match random.below(10) {
        0..3 if networks => block(random, scope),
        3 | 4 if scope.kind.is_ours() => PeerMatch::Entity(*random.pick(&[
            Entity::Host,
            Entity::RemoteNode,
            Entity::KubeApiserver,
            Entity::Cluster,
            Entity::World,
        ])),
        3 | 4 if scope.kind == Kind::ClusterNetwork && side == Side::Egress => {
            PeerMatch::Nodes(selector(random))
        }
        5 if random.one_in(4) => PeerMatch::Nothing {
            what: "domainNames".to_owned(),
        },
        _ => PeerMatch::Pods {
            namespaces: namespaces(random, scope),
            pods: selector(random),
            service_accounts: (scope.kind.is_ours() && random.one_in(2)).then(|| {
                random
                    .some(1, 2, |r| account(r, scope))
                    .into_iter()
                    .collect()
            }),
        },
    }
}

fn namespaces(random: &mut Random, scope: &Scope<'_>) -> NamespaceMatch {
    if scope.namespace.is_empty() || random.one_in(2) {
        NamespaceMatch::Labels(selector(random))
    } else {
        NamespaceMatch::Name(scope.namespace.to_owned())
    }
}

/// NAME, NAMESPACE/NAME, NAMESPACE/* or *.
fn account(random: &mut Random, scope: &Scope<'_>) -> ServiceAccountMatch {
    let name = Some((*random.pick(&ACCOUNTS)).to_owned());
    let namespace = Some((*random.pick(&NAMESPACES)).to_owned());
    match random.below(6) {
        0 => ServiceAccountMatch {
            namespace: None,
            name: None,
        },
        1 => ServiceAccountMatch {
            namespace,
            name: None,
        },
        2 | 3 => ServiceAccountMatch { namespace, name },
        _ => ServiceAccountMatch {
            namespace: (!scope.namespace.is_empty()).then(|| scope.namespace.to_owned()),
            name,
        },
    }
}

/// A block around one of the addresses; its exceptions, strictly inside it, around others.
fn block(random: &mut Random, scope: &Scope<'_>) -> PeerMatch {
    let centre = *random.pick(scope.addresses);
    let cidr = around(random, centre, 0);
    let mut except = BTreeSet::new();
    if scope.kind != Kind::ClusterNetwork {
        for _ in 0..random.below(3) {
            let inside: Vec<_> = scope
                .addresses
                .iter()
                .filter(|address| cidr.contains(*address))
                .collect();
            let centre = **random.pick(&inside);
            let hole = around(random, centre, cidr.prefix_len() + 1);
            if hole.prefix_len() > cidr.prefix_len() {
                except.insert(hole);
            }
        }
    }
    PeerMatch::Cidr { cidr, except }
}

fn around(random: &mut Random, address: IpAddr, least: u8) -> IpNet {
    let lengths: &[u8] = match address {
        IpAddr::V4(_) => &[0, 1, 8, 16, 23, 24, 27, 28, 29, 30, 31, 32],
        IpAddr::V6(_) => &[0, 1, 16, 32, 47, 48, 64, 96, 120, 124, 126, 127, 128],
    };
    let fit: Vec<u8> = lengths.iter().copied().filter(|l| *l >= least).collect();
    let length = if fit.is_empty() {
        0
    } else {
        *random.pick(&fit)
    };
    IpNet::new(address, length)
        .expect("a length that fits")
        .trunc()
}

fn ports(random: &mut Random) -> PortMatch {
    let transport = *random.pick(&TRANSPORTS);
    let port = *random.pick(&PORTS);
    let ports = match random.below(6) {
        0 if random.one_in(3) => {
            return PortMatch {
                transport: None,
                ports: PortRange::All,
            };
        }
        0 => PortRange::All,
        1 | 2 => PortRange::Named((*random.pick(&PORT_NAMES)).to_owned()),
        3 => {
            let other = *random.pick(&PORTS);
            PortRange::Range(port.min(other), port.max(other))
        }
        4 => {
            let length = u16::try_from(random.below(300)).expect("below 300");
            PortRange::Range(port, port.saturating_add(length))
        }
        _ => PortRange::Range(port, port),
    };
    PortMatch {
        transport: Some(transport),
        ports,
    }
}

fn selector(random: &mut Random) -> Selector {
    if !random.one_in(3) {
        return Selector::default();
    }
    let most = 1 + usize::from(random.one_in(3));
    Selector {
        requirements: random.some(1, most, |random| {
            let (key, values) = *random.pick(&LABELS);
            let some = |random: &mut Random| {
                random
                    .some(1, 2, |r| values[r.below(4).saturating_sub(1)].to_owned())
                    .into_iter()
                    .collect()
            };
            Requirement {
                key: key.to_owned(),
                test: match random.below(6) {
                    0 => LabelTest::Exists,
                    1 => LabelTest::DoesNotExist,
                    2 => LabelTest::NotIn(some(random)),
                    _ => LabelTest::In(some(random)),
                },
            }
        }),
    }
}

/// Every rule of every policy.
pub(crate) fn all(cluster: &ClusterSnapshot) -> impl Iterator<Item = &Rule> {
    cluster
        .policies
        .values()
        .flat_map(|policy| policy.ingress.iter().chain(&policy.egress).flatten())
}

/// The blocks that a peer names.
pub(crate) fn blocks(peer: &PeerMatch) -> Vec<IpNet> {
    match peer {
        PeerMatch::Cidr { cidr, except } => except.iter().chain([cidr]).copied().collect(),
        PeerMatch::Pods { .. }
        | PeerMatch::Entity(_)
        | PeerMatch::Nodes(_)
        | PeerMatch::Nothing { .. } => Vec::new(),
    }
}
