// SPDX-License-Identifier: Apache-2.0
//! A naive evaluator: decides one packet directly from the objects, following the API specifications, without
//! index, identities or compilation. It is slow on purpose, and shares no code with the compiler that it tests.
//!
//! NP: `networking.k8s.io/v1` NetworkPolicy. CNP: `policy.networking.k8s.io/v1alpha2`
//! ClusterNetworkPolicy. Ours: MeshPolicy and ClusterMeshPolicy of `mesh.rs/v1alpha1`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_plan::cluster::{
    ClusterSnapshot, Entity, LabelTest, Labels, NamespaceMatch, PeerMatch, Pod, Policy, PortMatch,
    PortRange, Rule, RuleAction, Selector, ServiceAccountMatch, Subject, Tier, Transport,
};

/// The direction of the evaluated policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Ingress,
    Egress,
}

/// The origin of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// As plaintext or, for egress, as the mesh carries it.
    Clear,
    /// As plaintext, translated to the node's address on its way.
    Translated,
    /// Through a tunnel whose certificate proves the other end.
    Tunnel,
}

/// One question: may it pass the policy of this pod?
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    /// UID of the pod whose policy is evaluated.
    pub(crate) pod: String,
    pub(crate) side: Side,
    /// The source of what comes in, the destination of what goes out.
    pub(crate) other: IpAddr,
    /// Number of the IP protocol.
    pub(crate) protocol: u8,
    /// The destination port.
    pub(crate) port: u16,
    pub(crate) via: Via,
}

/// The answers that the texts admit: both where they leave the choice to the implementation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Admitted {
    pub(crate) allow: bool,
    pub(crate) deny: bool,
}

impl Admitted {
    pub(crate) const ALLOW: Self = Self {
        allow: true,
        deny: false,
    };
    pub(crate) const DENY: Self = Self {
        allow: false,
        deny: true,
    };

    const fn or(self, other: Self) -> Self {
        Self {
            allow: self.allow || other.allow,
            deny: self.deny || other.deny,
        }
    }
}

/// The other end, as far as the pod's node can know it.
struct Peer<'a> {
    address: IpAddr,
    /// The pod that has the address.
    pod: Option<&'a Pod>,
    /// Its service account is proven: a tunnel's certificate, or a pod of the same node.
    proven: bool,
    entities: BTreeSet<Entity>,
}

impl Packet {
    /// TCP between enrolled pods of two nodes.
    pub(crate) fn can_be_tunnelled(&self, cluster: &ClusterSnapshot) -> bool {
        let Some(pod) = cluster.pods.get(&*self.pod) else {
            return false;
        };
        pod_at(cluster, self.other).is_some_and(|other| {
            self.protocol == 6
                && other.node != pod.node
                && enrolled(cluster, pod)
                && enrolled(cluster, other)
        })
    }
}

/// Returns the answers that the policies of the pod admit.
pub(crate) fn judge(cluster: &ClusterSnapshot, packet: &Packet) -> Admitted {
    let pod = &cluster.pods[&*packet.pod];
    if pod.addresses.contains(&packet.other) {
        // A pod talking to itself is no traffic to or from a pod.
        return Admitted::ALLOW;
    }
    let case = Case {
        cluster,
        packet,
        pod,
        peer: peer(cluster, pod, packet),
    };
    let admin = case.cluster_tier(|tier| match tier {
        Tier::Admin(priority) => Some(priority),
        Tier::Namespaced | Tier::Baseline(_) => None,
    });
    admin
        .into_iter()
        .map(|step| match step {
            RuleAction::Allow => Admitted::ALLOW,
            RuleAction::Deny => Admitted::DENY,
            RuleAction::Pass => case.after_admin(),
        })
        .fold(Admitted::default(), Admitted::or)
}

struct Case<'a> {
    cluster: &'a ClusterSnapshot,
    packet: &'a Packet,
    pod: &'a Pod,
    peer: Peer<'a>,
}

impl Case<'_> {
    fn after_admin(&self) -> Admitted {
        // NP: "Traffic is allowed to a pod if ..., OR if the traffic source is the pod's local
        // node". Ours: it "can be denied by the Admin tier only".
        if self.packet.side == Side::Ingress && self.peer.entities.contains(&Entity::Host) {
            return Admitted::ALLOW;
        }
        let mut isolated = false;
        let mut allowed = false;
        for policy in self.policies(|tier| tier == Tier::Namespaced) {
            let Some(rules) = self.rules(policy) else {
                continue;
            };
            // NP: "If this field is empty then this NetworkPolicy does not allow any traffic".
            // Ours: pods that "an enforced Allow policy selects accept nothing else in that
            // direction"; a Deny policy isolates nothing.
            isolated |= rules.is_empty() || rules.iter().any(|r| r.action == RuleAction::Allow);
            for rule in rules.iter().filter(|rule| self.matches(rule)) {
                match rule.action {
                    // Ours: "a matching Deny beats every Allow".
                    RuleAction::Deny => return Admitted::DENY,
                    RuleAction::Allow => allowed = true,
                    RuleAction::Pass => {}
                }
            }
        }
        // CNP: "v1.NetworkPolicy always makes a final decision for selected pods. Further
        // evaluation only happens for Pods not selected by a v1.NetworkPolicy."
        if isolated {
            return if allowed {
                Admitted::ALLOW
            } else {
                Admitted::DENY
            };
        }
        let baseline = self.cluster_tier(|tier| match tier {
            Tier::Baseline(priority) => Some(priority),
            Tier::Namespaced | Tier::Admin(_) => None,
        });
        // CNP: "If a given connection wasn't allowed or denied by any of the tiers, the default
        // kubernetes policy is applied, which says that all pods can communicate with each other."
        baseline
            .into_iter()
            .map(|step| match step {
                RuleAction::Allow | RuleAction::Pass => Admitted::ALLOW,
                RuleAction::Deny => Admitted::DENY,
            })
            .fold(Admitted::default(), Admitted::or)
    }

    /// What a tier of cluster-wide policies may say; `Pass` also where nothing matches.
    ///
    /// CNP: "Policies with lower priority values have higher precedence". Of equal ones "the
    /// implementation can apply any of the matching policies".
    fn cluster_tier(&self, priority: impl Fn(Tier) -> Option<u32>) -> Vec<RuleAction> {
        let mut by_priority: BTreeMap<u32, Vec<RuleAction>> = BTreeMap::new();
        for policy in self.policies(|tier| priority(tier).is_some()) {
            // CNP: "a rule that appears at the top of the ingress rules would take the highest
            // precedence."
            let rules = self.rules(policy).unwrap_or_default();
            if let Some(rule) = rules.iter().find(|rule| self.matches(rule)) {
                let of_tier = by_priority.entry(priority(policy.tier).unwrap_or_default());
                of_tier.or_default().push(rule.action);
            }
        }
        match by_priority.pop_first() {
            Some((_, answers)) => answers,
            None => vec![RuleAction::Pass],
        }
    }

    /// The enforced policies of a tier that select the pod. Ours, of Audit: it "only counts and
    /// records what it would refuse".
    fn policies(&self, tier: impl Fn(Tier) -> bool) -> impl Iterator<Item = &Policy> {
        self.cluster
            .policies
            .values()
            .map(|policy| &**policy)
            .filter(move |p| !p.audit && tier(p.tier) && selects(self.cluster, p, self.pod))
    }

    fn rules<'p>(&self, policy: &'p Policy) -> Option<&'p [Rule]> {
        match self.packet.side {
            Side::Ingress => policy.ingress.as_deref(),
            Side::Egress => policy.egress.as_deref(),
        }
    }

    /// NP: "The traffic must match both ports and from." "Items in this list are combined using a
    /// logical OR operation. If this field is empty or missing, this rule matches all".
    fn matches(&self, rule: &Rule) -> bool {
        let ports = |peer: Option<&PeerMatch>| {
            rule.ports.as_ref().is_none_or(|ports| {
                ports
                    .iter()
                    .any(|port| self.matches_port(port) || self.is_refused(peer, port, rule.action))
            })
        };
        match &rule.peers {
            None => ports(None),
            Some(peers) => peers
                .iter()
                .any(|peer| self.matches_peer(peer, rule.action) && ports(Some(peer))),
        }
    }

    /// CNP of named ports: "You can't use this in a rule that targets resources without named ports
    /// (e.g. Nodes or Networks)." What cannot be used is closed: a Deny of it denies the transport.
    fn is_refused(&self, peer: Option<&PeerMatch>, port: &PortMatch, action: RuleAction) -> bool {
        matches!(peer, Some(PeerMatch::Cidr { .. } | PeerMatch::Nodes(_)))
            && self.packet.side == Side::Egress
            && action == RuleAction::Deny
            && matches!(port.ports, PortRange::Named(_))
            && port.transport == self.transport()
    }

    fn matches_peer(&self, peer: &PeerMatch, action: RuleAction) -> bool {
        match peer {
            PeerMatch::Pods {
                namespaces,
                pods,
                service_accounts,
            } => self.peer.pod.is_some_and(|pod| {
                let accounts = service_accounts
                    .as_ref()
                    .is_none_or(|accounts| self.matches_account(accounts, pod, action));
                in_namespace(self.cluster, namespaces, pod)
                    && matches(pods, &pod.labels)
                    && accounts
            }),
            // NP: "The except entry describes CIDRs that should not be included within this rule."
            // Ours: "ipBlock and networks match the address whatever the id, pods' addresses too".
            PeerMatch::Cidr { cidr, except } => {
                contains(cidr, self.peer.address)
                    && !except.iter().any(|net| contains(net, self.peer.address))
            }
            PeerMatch::Entity(entity) => self.peer.entities.contains(entity),
            // CNP: "It selects the nodeIPs as the peer type by matching on the IPs present in the
            // node.Status.Addresses field of the node. ... if present but empty, it selects all".
            PeerMatch::Nodes(selector) => self.cluster.nodes.values().any(|node| {
                matches(selector, &node.labels) && node.addresses.contains(&self.peer.address)
            }),
            PeerMatch::Nothing { .. } => false,
        }
    }

    /// Ours: "An Allow that names service accounts needs tls or node; a Deny that names them
    /// matches address too." A Pass exempts from the denials behind it, so it needs proof as well.
    fn matches_account(
        &self,
        accounts: &BTreeSet<ServiceAccountMatch>,
        pod: &Pod,
        action: RuleAction,
    ) -> bool {
        let named = accounts.iter().any(|account| {
            account
                .namespace
                .as_ref()
                .is_none_or(|n| *n == pod.name.namespace)
                && account
                    .name
                    .as_ref()
                    .is_none_or(|n| *n == pod.service_account)
        });
        let known = match action {
            RuleAction::Allow | RuleAction::Pass => self.peer.proven,
            RuleAction::Deny => true,
        };
        named && known
    }

    const fn transport(&self) -> Option<Transport> {
        match self.packet.protocol {
            6 => Some(Transport::Tcp),
            17 => Some(Transport::Udp),
            132 => Some(Transport::Sctp),
            _ => None,
        }
    }

    /// NP: "only traffic on the specified protocol AND port will be matched"; without a port it
    /// "matches all port names and numbers"; endPort: "the range of ports from port to endPort if
    /// set, inclusive".
    fn matches_port(&self, port: &PortMatch) -> bool {
        let transport = self.transport();
        if port.transport.is_some() && port.transport != transport {
            return false;
        }
        match &port.ports {
            PortRange::All => true,
            PortRange::Range(first, last) => {
                transport.is_some() && (*first..=*last).contains(&self.packet.port)
            }
            // CNP: "selects a destination port on a pod based on the ContainerPort name."
            PortRange::Named(name) => {
                let destination = match self.packet.side {
                    Side::Ingress => Some(self.pod),
                    Side::Egress => self.peer.pod,
                };
                destination.is_some_and(|pod| {
                    pod.named_ports.iter().any(|((of_pod, proto), number)| {
                        of_pod == name && Some(*proto) == transport && *number == self.packet.port
                    })
                })
            }
        }
    }
}

fn peer<'a>(cluster: &'a ClusterSnapshot, pod: &Pod, packet: &Packet) -> Peer<'a> {
    let address = packet.other;
    if packet.via == Via::Translated {
        // "Traffic that was translated to a node's address on its way is world, not host".
        return Peer {
            address,
            pod: None,
            proven: false,
            entities: BTreeSet::from([Entity::World]),
        };
    }
    let other = pod_at(cluster, address);
    let same_node = other.is_some_and(|other| other.node == pod.node);
    // What leaves for an enrolled pod elsewhere leaves in a tunnel that proves it, or not at all.
    let tunnel = match packet.side {
        Side::Ingress => packet.via == Via::Tunnel,
        Side::Egress => packet.can_be_tunnelled(cluster),
    };
    Peer {
        address,
        pod: other,
        proven: same_node || tunnel,
        entities: entities(cluster, pod, address),
    }
}

/// Ours: host: "The node that the pod runs on." remote-node: "Every other node". kube-apiserver:
/// "The Kubernetes API server." cluster: "Every pod, node and unknown pod address." world:
/// "Everything outside the cluster." An API server that is on no node is the cluster's too.
fn entities(cluster: &ClusterSnapshot, pod: &Pod, address: IpAddr) -> BTreeSet<Entity> {
    let mut entities = BTreeSet::new();
    for (name, node) in &cluster.nodes {
        if node.addresses.contains(&address) {
            entities.insert(if *name == pod.node {
                Entity::Host
            } else {
                Entity::RemoteNode
            });
        }
    }
    let in_pod_cidr = cluster
        .nodes
        .values()
        .flat_map(|node| &node.pod_cidrs)
        .chain(&cluster.pod_cidrs)
        .any(|net| contains(net, address));
    if cluster.api_servers.contains(&address) {
        entities.insert(Entity::KubeApiserver);
    }
    let inside = !entities.is_empty() || pod_at(cluster, address).is_some() || in_pod_cidr;
    entities.insert(if inside {
        Entity::Cluster
    } else {
        Entity::World
    });
    entities
}

/// "Addresses of hostNetwork pods never become ids."
fn pod_at(cluster: &ClusterSnapshot, address: IpAddr) -> Option<&Pod> {
    cluster
        .pods
        .values()
        .map(|pod| &**pod)
        .find(|pod| !pod.host_network && pod.addresses.contains(&address))
}

/// Ours: "label mesh.rs/dataplane on a Namespace (enabled, disabled, or required: pods may not opt
/// out) or a Pod (enabled, disabled; wins unless required). hostNetwork pods are never enrolled
/// ...; kube-system only pod by pod."
fn enrolled(cluster: &ClusterSnapshot, pod: &Pod) -> bool {
    let label = |labels: &Labels| labels.get("mesh.rs/dataplane").cloned();
    let of_namespace = match pod.name.namespace.as_str() {
        "kube-system" => None,
        name => label(&cluster.namespaces[name].labels),
    };
    let of_pod = label(&pod.labels);
    !pod.host_network
        && match (of_namespace.as_deref(), of_pod.as_deref()) {
            (Some("required"), _) | (_, Some("enabled")) => true,
            (_, Some("disabled")) => false,
            (of_namespace, _) => of_namespace == Some("enabled"),
        }
}

/// CNP: "host-networked pods are not included in subject selection."
fn selects(cluster: &ClusterSnapshot, policy: &Policy, pod: &Pod) -> bool {
    let namespace = &pod.name.namespace;
    !pod.host_network
        && match &policy.subject {
            // NP: "An empty podSelector matches all pods in this namespace."
            Subject::Pods { namespace: n, pods } => n == namespace && matches(pods, &pod.labels),
            Subject::Namespaces { namespaces, pods } => {
                matches(namespaces, &cluster.namespaces[namespace].labels)
                    && matches(pods, &pod.labels)
            }
            Subject::WholeNamespace(n) => n == namespace,
        }
}

fn in_namespace(cluster: &ClusterSnapshot, namespaces: &NamespaceMatch, pod: &Pod) -> bool {
    match namespaces {
        NamespaceMatch::Name(name) => *name == pod.name.namespace,
        NamespaceMatch::Labels(selector) => {
            matches(selector, &cluster.namespaces[&pod.name.namespace].labels)
        }
    }
}

/// LabelSelector: "The requirements are ANDed." NotIn and DoesNotExist hold without the label.
fn matches(selector: &Selector, labels: &Labels) -> bool {
    for requirement in &selector.requirements {
        let value = labels.get(&requirement.key);
        let holds = match (&requirement.test, value) {
            (LabelTest::In(values), Some(value)) => values.contains(value),
            (LabelTest::NotIn(values), Some(value)) => !values.contains(value),
            (LabelTest::Exists, Some(_))
            | (LabelTest::NotIn(_) | LabelTest::DoesNotExist, None) => true,
            (LabelTest::DoesNotExist, Some(_)) | (LabelTest::In(_) | LabelTest::Exists, None) => {
                false
            }
        };
        if !holds {
            return false;
        }
    }
    true
}

/// CNP: "0.0.0.0/0 will match both IPv4 and ICMP traffic, while ::/0 will match both IPv6 and
/// ICMPv6 traffic": a block matches its own family only.
fn contains(net: &IpNet, address: IpAddr) -> bool {
    let (network, address, width) = match (net.addr(), address) {
        (IpAddr::V4(n), IpAddr::V4(a)) => (u128::from(n.to_bits()), u128::from(a.to_bits()), 32),
        (IpAddr::V6(n), IpAddr::V6(a)) => (n.to_bits(), a.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    let free = width - u32::from(net.prefix_len());
    network.checked_shr(free) == address.checked_shr(free)
}
