// SPDX-License-Identifier: Apache-2.0
//! A cluster as manifests say it is, and the policy of each of its nodes.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use mesh_api::truth::give_addresses;
use mesh_api::{LastGood, Object, Options, Outcome, convert};
use mesh_common::identity::{Evidence, IdentityId};
use mesh_common::pod::PodView;
use mesh_common::policy::{Direction, Policies, PolicySetId, Question};
use mesh_common::verdict::{Reason, Verdict};
use mesh_common::{Addr, Endpoint, Port, Protocol};
use mesh_plan::cluster::{Cluster, Pod, Transport};
use mesh_plan::{Plan, compile, modes};

use super::index::Index;
use crate::args;

/// Facts, plans and names.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    /// By node.
    nodes: BTreeMap<String, Node>,
    by_name: HashMap<String, Arc<str>>,
    by_address: HashMap<IpAddr, Arc<str>>,
    /// Addresses of services, and their names.
    by_vip: HashMap<IpAddr, String>,
    /// What is odd or rejected in the manifests.
    pub(crate) notes: Vec<String>,
}

struct Node {
    plan: Plan,
    index: Index,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Party<'a> {
    /// A pod, and by which of its addresses, if it was named by one.
    Pod(&'a Pod, Option<IpAddr>),
    /// An address that is no pod's.
    Address(IpAddr),
}

impl<'a> Party<'a> {
    /// A pod by its name.
    pub(crate) const fn of(pod: &'a Pod) -> Self {
        Self::Pod(pod, None)
    }

    fn name(self) -> String {
        match self {
            Self::Pod(pod, _) => pod.name.to_string(),
            Self::Address(address) => address.to_string(),
        }
    }
}

/// A connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection<'a> {
    pub(crate) from: Party<'a>,
    pub(crate) to: Party<'a>,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

impl Connection<'_> {
    /// Whether a node knows both ends itself.
    pub(crate) fn on_one_node(&self) -> bool {
        matches!((self.from, self.to),
            (Party::Pod(from, _), Party::Pod(to, _)) if from.node == to.node)
    }
}

/// What is decided at both ends; `None` = nothing is decided there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdicts {
    /// What policy says at the source.
    pub(crate) egress: Option<Verdict>,
    /// What policy says at the destination.
    pub(crate) ingress: Option<Verdict>,
    /// Why enrolment or MeshAuthentication refuse it, whatever policy says.
    pub(crate) refused: Option<Reason>,
}

impl Verdicts {
    pub(crate) fn allowed(&self) -> bool {
        let allows = |verdict: &Option<Verdict>| verdict.is_none_or(|verdict| verdict.allowed);
        allows(&self.egress) && allows(&self.ingress) && self.refused.is_none()
    }
}

pub(crate) fn number(protocol: args::Protocol) -> Protocol {
    match protocol {
        args::Protocol::Tcp => Protocol::TCP,
        args::Protocol::Udp => Protocol::UDP,
        args::Protocol::Sctp => Protocol::SCTP,
    }
}

pub(crate) fn evidence(evidence: args::Evidence) -> Evidence {
    match evidence {
        args::Evidence::Address => Evidence::Address,
        args::Evidence::Tls => Evidence::Tls,
    }
}

/// What is wrong with objects, and what is odd, a sentence each.
pub(super) fn notes(outcome: &Outcome) -> Vec<String> {
    let rejections = outcome.rejections.iter().map(|r| format!("rejected: {r}"));
    let warnings = outcome.warnings.iter().map(|w| format!("warning: {w}"));
    rejections.chain(warnings).collect()
}

impl World {
    /// Of manifests that need not say what addresses pods have.
    pub(crate) fn imagined(mut objects: Vec<Object>) -> Self {
        give_addresses(objects.iter_mut().map(|object| &mut object.value));
        Self::new(&objects)
    }

    pub(crate) fn new(objects: &[Object]) -> Self {
        let outcome = convert(objects, &LastGood::default(), Options { standalone: true });
        let notes = notes(&outcome);
        Self::of(outcome.cluster, notes)
    }

    /// The world of facts; `notes` are about them.
    pub(crate) fn of(cluster: Cluster, mut notes: Vec<String>) -> Self {
        let mut nodes = BTreeMap::new();
        let mut by_name = HashMap::new();
        let mut by_address = HashMap::new();
        for (uid, pod) in &cluster.pods {
            by_name.insert(pod.name.to_string(), Arc::clone(uid));
            for address in &pod.addresses {
                by_address.insert(*address, Arc::clone(uid));
            }
            nodes.entry(pod.node.clone()).or_insert_with(|| {
                let (plan, rejections) = compile(&cluster, &pod.node);
                notes.extend(rejections.iter().map(|r| format!("rejected: {r}")));
                let index = Index::new(&plan);
                Node { plan, index }
            });
        }
        let mut by_vip = HashMap::new();
        for (name, service) in &cluster.services {
            for address in service.cluster_ips.iter().chain(&service.external_ips) {
                by_vip.insert(*address, name.to_string());
            }
        }
        notes.sort();
        notes.dedup();
        Self {
            cluster,
            nodes,
            by_name,
            by_address,
            by_vip,
            notes,
        }
    }

    /// A pod by NAMESPACE/NAME, or whoever has an address.
    pub(crate) fn party(&self, text: &str) -> Result<Party<'_>> {
        if let Some(uid) = self.by_name.get(text) {
            return Ok(Party::of(&self.cluster.pods[uid]));
        }
        match text.parse::<IpAddr>() {
            Ok(address) => self.owner(address.to_canonical()),
            Err(_) if text.contains('/') => bail!("there is no pod {text}"),
            Err(_) => bail!("{text:?} is neither NAMESPACE/POD nor an address"),
        }
    }

    /// Whose an address is. Policy is about pods, of which a service has several.
    fn owner(&self, address: IpAddr) -> Result<Party<'_>> {
        if let Some(uid) = self.by_address.get(&address) {
            return Ok(Party::Pod(&self.cluster.pods[uid], Some(address)));
        }
        match self.by_vip.get(&address) {
            Some(service) => bail!(
                "{address} is Service {service}, which stands for one of its endpoints: ask about a pod \
                 behind it, and its own port"
            ),
            None => Ok(Party::Address(address)),
        }
    }

    /// Pods of the host's network have the addresses of their node.
    fn addresses(&self, party: Party<'_>) -> Vec<IpAddr> {
        match party {
            Party::Address(address) => vec![address],
            Party::Pod(_, Some(address)) => vec![address],
            Party::Pod(pod, None) if pod.host_network => {
                let node = self.cluster.nodes.get(&pod.node);
                node.map(|node| node.addresses.iter().copied().collect())
                    .unwrap_or_default()
            }
            Party::Pod(pod, None) => pod.addresses.to_vec(),
        }
    }

    /// A connection over a family that both ends have, IPv4 first.
    pub(crate) fn connection<'a>(
        &'a self,
        from: Party<'a>,
        to: Party<'a>,
        (protocol, port): (Protocol, u16),
    ) -> Result<Connection<'a>> {
        let (sources, destinations) = (self.addresses(from), self.addresses(to));
        for (party, addresses) in [(from, &sources), (to, &destinations)] {
            if addresses.is_empty() {
                let name = party.name();
                bail!("{name} has no address: status.podIPs, or those of its node, are missing");
            }
        }
        let pick = |is: fn(&IpAddr) -> bool| {
            let source = sources.iter().copied().find(is)?;
            Some((source, destinations.iter().copied().find(is)?))
        };
        let (source, destination) = pick(IpAddr::is_ipv4)
            .or_else(|| pick(IpAddr::is_ipv6))
            .with_context(|| {
                let (from, to) = (from.name(), to.name());
                format!("{from} and {to} have no addresses of one family")
            })?;
        Ok(Connection {
            from,
            to,
            source,
            destination,
            protocol,
            port,
        })
    }

    /// Whether a port is given by name.
    pub(crate) fn is_name(port: &str) -> bool {
        !port.bytes().all(|byte| byte.is_ascii_digit())
    }

    /// A port by number or by the name that the destination gives it.
    pub(crate) fn port(to: Party<'_>, protocol: args::Protocol, text: &str) -> Result<u16> {
        if !Self::is_name(text) {
            let number = text.parse().ok().filter(|number| *number > 0);
            return number.with_context(|| format!("port {text:?} is none from 1 to 65535"));
        }
        let transport = match protocol {
            args::Protocol::Tcp => Transport::Tcp,
            args::Protocol::Udp => Transport::Udp,
            args::Protocol::Sctp => Transport::Sctp,
        };
        match to {
            Party::Pod(pod, _) => pod
                .named_ports
                .get(&(text.to_owned(), transport))
                .copied()
                .with_context(|| format!("{} has no {protocol} port named {text:?}", pod.name)),
            Party::Address(_) => bail!("port {text:?}: an address has no named ports"),
        }
    }

    /// The plan of a pod's node.
    pub(crate) fn plan(&self, pod: &Pod) -> &Plan {
        &self.nodes[&pod.node].plan
    }

    /// Who an address is on a pod's node.
    pub(crate) fn identity(&self, pod: &Pod, address: IpAddr) -> IdentityId {
        use mesh_common::path::Peers;
        let plan = self.plan(pod);
        let address = Addr::from(address);
        match plan.peers.get(&address) {
            Some(peer) => peer.id,
            None if plan.in_pod_cidr(&address) => IdentityId::UNKNOWN,
            None => IdentityId::WORLD,
        }
    }

    /// The question that policy asks at one end; `None` = it asks none there.
    pub(crate) fn question(
        &self,
        connection: &Connection<'_>,
        direction: Direction,
        evidence: Evidence,
    ) -> Option<(&Pod, Question)> {
        let (pod, address) = match (direction, connection.from, connection.to) {
            (Direction::Ingress, _, Party::Pod(to, _)) => (to, connection.source),
            (Direction::Egress, Party::Pod(from, _), _) => (from, connection.destination),
            (Direction::Ingress | Direction::Egress, _, _) => return None,
        };
        let pod = &self.cluster.pods[&pod.uid];
        if pod.host_network {
            return None;
        }
        let peer = self.identity(pod, address);
        let local = self.plan(pod).pods.get(&*pod.uid);
        Some((
            pod,
            Question {
                // A pod that has no plan is cut off.
                set: local.map_or(PolicySetId::ISOLATED, |local| local.view.set),
                direction,
                peer,
                addr: address.into(),
                evidence: if peer.is_workload() {
                    evidence
                } else {
                    Evidence::None
                },
                protocol: connection.protocol,
                port: Port::new(connection.port),
            },
        ))
    }

    fn decide(
        &self,
        connection: &Connection<'_>,
        direction: Direction,
        evidence: Evidence,
    ) -> Option<Verdict> {
        let (pod, question) = self.question(connection, direction, evidence)?;
        // Nothing stands between a pod and itself.
        if connection.source == connection.destination {
            return Some(Verdict::pass(Reason::OwnAddress));
        }
        Some(self.nodes[&pod.node].index.decide(&question))
    }

    /// What holds at both ends.
    pub(crate) fn verdicts(&self, connection: &Connection<'_>, evidence: Evidence) -> Verdicts {
        Verdicts {
            egress: self.decide(connection, Direction::Egress, evidence),
            ingress: self.decide(connection, Direction::Ingress, evidence),
            refused: self.modes(connection, evidence).err(),
        }
    }

    /// What enrolment and MeshAuthentication say. Between enrolled pods TCP is tunnelled, whatever
    /// is assumed of the evidence; what is known by a certificate came through a tunnel.
    fn modes(&self, connection: &Connection<'_>, evidence: Evidence) -> Result<(), Reason> {
        let (protocol, port) = (connection.protocol, Port::new(connection.port));
        if let Some((plan, view)) = self.enforcing(connection.from) {
            let to = Endpoint::new(connection.destination.into(), port);
            if modes::outbound(plan, view, to, protocol)? {
                return Ok(());
            }
        }
        match self.enforcing(connection.to) {
            Some((plan, view)) if evidence != Evidence::Tls || protocol != Protocol::TCP => {
                modes::inbound(plan, view, &connection.source.into(), protocol, port)
            }
            _ => Ok(()),
        }
    }

    /// A pod as its node sees it.
    fn enforcing(&self, party: Party<'_>) -> Option<(&Plan, &PodView)> {
        let Party::Pod(pod, _) = party else {
            return None;
        };
        let plan = &self.nodes.get(&pod.node)?.plan;
        Some((plan, &plan.pods.get(&*pod.uid)?.view))
    }

    /// A verdict in words.
    pub(crate) fn words(&self, party: Party<'_>, verdict: &Verdict) -> String {
        let verb = if verdict.allowed { "allow" } else { "deny" };
        let Party::Pod(pod, _) = party else {
            return verb.to_owned();
        };
        let rule = match verdict.rule {
            mesh_common::policy::RuleId::NONE => String::new(),
            rule => format!(" by {}", mesh_plan::text::rule(self.plan(pod), rule)),
        };
        format!("{verb}{rule} ({})", verdict.reason.label())
    }
}
