// SPDX-License-Identifier: Apache-2.0
//! Who may talk to whom, without maps and for all nodes at once: what tests and tables over real
//! connections ask. The compiler and the decision are those of the agents; only the look-ups are made
//! for speed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::identity::{Evidence, IdentityId, Peer};
use mesh_common::path::Peers;
use mesh_common::pod::{PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, Direction, ListId, Lists, Policies, PolicySetId, PortKey, Question, SelectKey,
    SetHead, decide,
};
use mesh_common::{Addr, Port, Protocol, Verdict};

use crate::cluster::{Cluster, ObjectName, Rejection, Transport};
use crate::compile::{Options, Scope, compile_with};
use crate::plan::{Plan, masked};
use crate::policies::ports::{Range, ranges};

/// Every pod's policy, ready to be asked.
#[derive(Debug)]
pub struct Compiled {
    /// All policy, and the pods of all nodes; services are left out, and nodes are all `remote`.
    pub plan: Plan,
    tables: Tables,
    pods: Vec<PodEnd>,
    by_name: HashMap<String, Place>,
    by_addr: HashMap<Addr, Place>,
    node_addrs: HashMap<Addr, Vec<String>>,
    servers: BTreeSet<Addr>,
}

/// One end of a connection; made by [`Compiled::find`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    place: Place,
    /// The address that was asked for, or [`Addr::NONE`] for a pod by name.
    addr: Addr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Pod(usize),
    Elsewhere,
}

/// A pod of any node.
#[derive(Debug)]
struct PodEnd {
    uid: String,
    node: String,
    view: PodView,
    named_ports: Arc<BTreeMap<(String, Transport), u16>>,
}

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Who connects.
    pub from: End,
    /// To whom.
    pub to: End,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination port; 0 where the protocol has none.
    pub port: u16,
    /// How well the ends know each other; `None` = as it would be: pods of one node, a tunnel
    /// between enrolled pods that are ready, or the address.
    pub evidence: Option<Evidence>,
}

/// What policy says at both ends; `None` where the end is no pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// At the sender.
    pub egress: Option<Verdict>,
    /// At the receiver.
    pub ingress: Option<Verdict>,
}

impl Outcome {
    /// Whether both ends allow it.
    #[must_use]
    pub fn allowed(&self) -> bool {
        let allows = |side: Option<Verdict>| side.is_none_or(|verdict| verdict.allowed);
        allows(self.egress) && allows(self.ingress)
    }
}

/// Compiles the policy of every pod, whatever its node, and whether it has an address or not. Map
/// capacities, which are a node's, are not looked at.
#[must_use]
pub fn compile_policies(cluster: &Cluster) -> (Compiled, Vec<Rejection>) {
    let (plan, rejections) = compile_with(cluster, Scope::Everywhere, &Options::default());
    let mut compiled = Compiled {
        tables: Tables::of(&plan),
        pods: Vec::with_capacity(plan.pods.len()),
        by_name: HashMap::new(),
        by_addr: HashMap::new(),
        node_addrs: HashMap::new(),
        servers: cluster.api_servers.iter().map(|a| Addr::from(*a)).collect(),
        plan,
    };
    for (name, node) in &cluster.nodes {
        for address in &node.addresses {
            let of = compiled.node_addrs.entry(Addr::from(*address)).or_default();
            of.push(name.clone());
        }
    }
    for (uid, facts) in &cluster.pods {
        let Some(pod) = compiled.plan.pods.get(&**uid) else {
            continue;
        };
        let place = Place::Pod(compiled.pods.len());
        compiled.by_name.insert(facts.name.to_string(), place);
        for address in &facts.addresses {
            let addr = Addr::from(*address);
            let workload = compiled.plan.names.workloads.get(&addr);
            if workload.is_some_and(|workload| workload.uid == *uid) {
                compiled.by_addr.insert(addr, place);
            }
        }
        compiled.pods.push(PodEnd {
            uid: uid.to_string(),
            node: facts.node.clone(),
            view: pod.view,
            named_ports: Arc::clone(&facts.named_ports),
        });
    }
    (compiled, rejections)
}

impl Compiled {
    /// The end that `NAMESPACE/POD` or an address names; `None` = there is no such pod. Pods of the
    /// host's network are found by their node's address, not by name.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<End> {
        if let Some(place) = self.by_name.get(text) {
            return Some(End {
                place: *place,
                addr: Addr::NONE,
            });
        }
        let addr = Addr::from(text.parse::<IpAddr>().ok()?);
        let place = self.by_addr.get(&addr).copied().unwrap_or(Place::Elsewhere);
        Some(End { place, addr })
    }

    /// Every pod's name.
    pub fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.pods
            .iter()
            .filter_map(|pod| self.plan.pods.get(&pod.uid).map(|p| &p.name))
    }

    /// The number of a named port of a pod.
    #[must_use]
    pub fn named_port(&self, of: End, name: &str, transport: Transport) -> Option<u16> {
        let ports = &self.pod(of)?.named_ports;
        ports.get(&(name.to_owned(), transport)).copied()
    }

    /// The UID of the pod that an end is.
    #[must_use]
    pub fn uid(&self, end: End) -> Option<&str> {
        self.pod(end).map(|pod| pod.uid.as_str())
    }

    fn pod(&self, end: End) -> Option<&PodEnd> {
        match end.place {
            Place::Pod(index) => self.pods.get(index),
            Place::Elsewhere => None,
        }
    }

    /// What policy says.
    #[must_use]
    pub fn evaluate(&self, check: &Check) -> Outcome {
        let (egress, ingress) = self.questions(check, |view| view.set);
        let decide = |question: Question| decide(&self.tables, &question);
        Outcome {
            egress: egress.map(decide),
            ingress: ingress.map(decide),
        }
    }

    /// What policy would say if audited policies were enforced.
    #[must_use]
    pub fn evaluate_audited(&self, check: &Check) -> Outcome {
        let shadow = |view: &PodView| {
            let head = self.tables.sets.get(&view.set);
            let shadow = head.map_or(PolicySetId::NONE, |head| head.shadow);
            if shadow == PolicySetId::NONE {
                view.set
            } else {
                shadow
            }
        };
        let (egress, ingress) = self.questions(check, shadow);
        let decide = |question: Question| decide(&self.tables, &question);
        Outcome {
            egress: egress.map(decide),
            ingress: ingress.map(decide),
        }
    }

    /// The questions at the sender and at the receiver.
    pub(crate) fn questions(
        &self,
        check: &Check,
        set: impl Fn(&PodView) -> PolicySetId,
    ) -> (Option<Question>, Option<Question>) {
        let (from, to) = (self.pod(check.from), self.pod(check.to));
        let (from_addr, to_addr) = self.addresses(check);
        let same_node = from.zip(to).is_some_and(|(a, b)| a.node == b.node);
        let question = |pod: &PodEnd, direction, peer: Option<&PodEnd>, addr: Addr| {
            let id = self.peer_id(pod, peer, &addr);
            let evidence = match (check.evidence, id.is_workload()) {
                (Some(evidence), _) => evidence,
                (None, false) => Evidence::None,
                (None, true) if same_node => Evidence::Node,
                (None, true) if check.protocol == Protocol::TCP && self.tunnelled(from, to) => {
                    Evidence::Tls
                }
                (None, true) => Evidence::Address,
            };
            Question {
                set: set(&pod.view),
                direction,
                peer: id,
                addr,
                evidence,
                protocol: check.protocol,
                port: Port::new(check.port),
            }
        };
        (
            from.map(|pod| question(pod, Direction::Egress, to, to_addr)),
            to.map(|pod| question(pod, Direction::Ingress, from, from_addr)),
        )
    }

    /// Whether a TCP connection between two pods would go through a tunnel.
    fn tunnelled(&self, from: Option<&PodEnd>, to: Option<&PodEnd>) -> bool {
        let (Some(from), Some(to)) = (from, to) else {
            return false;
        };
        let ready = [to.view.v4, to.view.v6].iter().any(|addr| {
            let peer = self.plan.peer(addr);
            peer.is_some_and(|peer| peer.has(Peer::ENROLLED | Peer::READY))
        });
        from.view.has(PodState::ENROLLED) && ready
    }

    fn peer_id(&self, of: &PodEnd, peer: Option<&PodEnd>, addr: &Addr) -> IdentityId {
        if let Some(peer) = peer {
            return peer.view.id;
        }
        if let Some(nodes) = self.node_addrs.get(addr) {
            return match (nodes.contains(&of.node), self.servers.contains(addr)) {
                (true, true) => IdentityId::HOST_API_SERVER,
                (true, false) => IdentityId::HOST,
                (false, _) => IdentityId::REMOTE_NODE,
            };
        }
        match self.plan.peer(addr) {
            Some(peer) => peer.id,
            None if self.plan.in_pod_cidr(addr) => IdentityId::UNKNOWN,
            None => IdentityId::WORLD,
        }
    }

    /// The addresses of both ends, of one family if both have it, IPv4 if both have both.
    fn addresses(&self, check: &Check) -> (Addr, Addr) {
        let known = |end: End| match self.pod(end) {
            Some(pod) if end.addr.is_none() => [pod.view.v4, pod.view.v6],
            Some(_) | None if end.addr.is_v4() => [end.addr, Addr::NONE],
            Some(_) | None => [Addr::NONE, end.addr],
        };
        let (from, to) = (known(check.from), known(check.to));
        let both = from
            .iter()
            .zip(&to)
            .find(|(a, b)| !a.is_none() && !b.is_none());
        let first = |of: &[Addr; 2]| {
            of.iter()
                .copied()
                .find(|a| !a.is_none())
                .unwrap_or(Addr::NONE)
        };
        match both {
            Some((a, b)) => (*a, *b),
            None => (first(&from), first(&to)),
        }
    }
}

/// How many bits of an address count, the address, and the list of those inside.
type Block = (u32, Addr, ListId);

/// Policy maps as hash tables.
#[derive(Debug, Default)]
struct Tables {
    sets: HashMap<PolicySetId, SetHead>,
    selects: HashMap<SelectKey, Lists>,
    /// By set and direction, longest first.
    cidrs: HashMap<(PolicySetId, u32), Vec<Block>>,
    ports: HashMap<(ListId, Protocol), Vec<Range>>,
}

impl Tables {
    fn of(plan: &Plan) -> Self {
        let mut tables = Self {
            sets: plan.sets.iter().map(|(id, head)| (*id, *head)).collect(),
            selects: plan
                .selects
                .iter()
                .map(|(key, lists)| (*key, *lists))
                .collect(),
            ..Self::default()
        };
        for (key, list) in plan.cidrs.iter().rev() {
            let of = tables
                .cidrs
                .entry((key.data.set(), key.data.direction()))
                .or_default();
            of.push((
                key.bits.saturating_sub(CidrKey::FIXED_BITS),
                key.data.addr,
                *list,
            ));
        }
        let mut entries: BTreeMap<(ListId, Protocol), Vec<_>> = BTreeMap::new();
        for (key, answer) in &plan.ports {
            let of = entries
                .entry((key.data.list(), key.data.protocol()))
                .or_default();
            let bits = key.bits.saturating_sub(PortKey::FIXED_BITS);
            of.push((bits, key.data.port.get(), *answer));
        }
        let lists = entries
            .into_iter()
            .map(|(key, entries)| (key, ranges(entries)));
        tables.ports = lists.collect();
        tables
    }
}

impl Policies for Tables {
    fn head(&self, set: PolicySetId) -> Option<SetHead> {
        self.sets.get(&set).copied()
    }

    fn select(&self, key: &SelectKey) -> Option<Lists> {
        self.selects.get(key).copied()
    }

    fn cidr(&self, key: &CidrKey) -> Option<ListId> {
        let of = self.cidrs.get(&(key.set(), key.direction()))?;
        let holds = |(bits, addr, _): &&Block| masked(key.addr, *bits) == *addr;
        of.iter().find(holds).map(|(_, _, list)| *list)
    }

    fn answer(&self, key: &PortKey) -> Option<&Answer> {
        let of = self.ports.get(&(key.list(), key.protocol()))?;
        let at = of.partition_point(|(_, last, _)| *last < key.port.get());
        of.get(at).map(|(_, _, answer)| answer)
    }
}
