// SPDX-License-Identifier: Apache-2.0
//! A cluster from manifests: its pods by name, and the policy of each of its nodes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use mesh_api::truth::give_addresses;
use mesh_api::{LastGood, Object, Options, Outcome, convert};
use mesh_common::Protocol;
use mesh_common::identity::Evidence;
use mesh_common::policy::RuleId;
use mesh_common::verdict::Verdict;
use mesh_plan::cluster::{ClusterSnapshot, Pod, Transport};
use mesh_plan::evaluate::{Connection, Evaluator};
use mesh_plan::{Index, text};

use crate::args;

/// Begins the note of a rejection.
const REJECTED: &str = "rejected: ";

/// A cluster, its policy, and the names of its pods and services.
pub(crate) struct World {
    pub(crate) evaluator: Evaluator,
    by_name: HashMap<String, Arc<str>>,
    by_address: HashMap<IpAddr, Arc<str>>,
    /// The names of services, by address.
    by_vip: HashMap<IpAddr, String>,
    /// Warnings about the manifests, and rejected objects.
    pub(crate) notes: Vec<String>,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Party<'a> {
    /// A pod, and the address by which it was named, if any.
    Pod(&'a Pod, Option<IpAddr>),
    /// An address that does not belong to a pod.
    Address(IpAddr),
}

impl<'a> Party<'a> {
    /// A pod by its name.
    pub(crate) const fn of(pod: &'a Pod) -> Self {
        Self::Pod(pod, None)
    }

    /// The pod, if the party is one.
    pub(crate) const fn pod(self) -> Option<&'a Pod> {
        match self {
            Self::Pod(pod, _) => Some(pod),
            Self::Address(_) => None,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Pod(pod, _) => pod.name.to_string(),
            Self::Address(address) => address.to_string(),
        }
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

/// The rejections and warnings of a conversion, a line each.
pub(super) fn notes(outcome: &Outcome) -> Vec<String> {
    let rejections = outcome.rejections.iter().map(|r| format!("{REJECTED}{r}"));
    let warnings = outcome.warnings.iter().map(|w| format!("warning: {w}"));
    rejections.chain(warnings).collect()
}

impl World {
    /// The world of manifests, with addresses for the pods that have none.
    pub(crate) fn imagined(mut objects: Vec<Object>) -> Self {
        give_addresses(objects.iter_mut().map(|object| &mut object.value));
        Self::new(&objects)
    }

    pub(crate) fn new(objects: &[Object]) -> Self {
        let outcome = convert(objects, &LastGood::default(), Options { standalone: true });
        let notes = notes(&outcome);
        Self::of(outcome.cluster, notes)
    }

    /// The world of a cluster; `notes` are about its manifests.
    pub(crate) fn of(cluster: ClusterSnapshot, mut notes: Vec<String>) -> Self {
        let evaluator = Evaluator::new(cluster);
        let cluster = evaluator.cluster();
        let mut by_name = HashMap::new();
        let mut by_address = HashMap::new();
        for (uid, pod) in &cluster.pods {
            by_name.insert(pod.name.to_string(), Arc::clone(uid));
            for address in &pod.addresses {
                by_address.insert(*address, Arc::clone(uid));
            }
        }
        let rejections = evaluator.rejections().iter();
        notes.extend(rejections.map(|r| format!("{REJECTED}{r}")));
        let mut by_vip = HashMap::new();
        for (name, service) in &cluster.services {
            for address in service.cluster_ips.iter().chain(&service.external_ips) {
                by_vip.insert(*address, name.to_string());
            }
        }
        notes.sort();
        notes.dedup();
        Self {
            evaluator,
            by_name,
            by_address,
            by_vip,
            notes,
        }
    }

    /// Checks that every object of the manifests counts in an answer.
    ///
    /// # Errors
    /// Objects or fields are rejected. An agent that has no earlier version of them may decide differently from
    /// what their author intended.
    pub(crate) fn ensure_complete(&self) -> Result<()> {
        let rejected = self.notes.iter().filter(|note| note.starts_with(REJECTED));
        match rejected.count() {
            0 => Ok(()),
            count => bail!(
                "not decided: {count} objects or fields of the manifests are rejected, and what they ask for is not \
                 part of the answer"
            ),
        }
    }

    /// The cluster.
    pub(crate) const fn cluster(&self) -> &ClusterSnapshot {
        self.evaluator.cluster()
    }

    /// The pod with a NAMESPACE/NAME, or the party with an address.
    pub(crate) fn party(&self, text: &str) -> Result<Party<'_>> {
        if let Some(uid) = self.by_name.get(text) {
            return Ok(Party::of(&self.cluster().pods[uid]));
        }
        match text.parse::<IpAddr>() {
            Ok(address) => self.owner(address.to_canonical()),
            Err(_) if text.contains('/') => bail!("there is no pod {text}"),
            Err(_) => bail!("{text:?} is neither NAMESPACE/POD nor an IP address"),
        }
    }

    /// The party with an address. A service has several pods, and policy is about pods.
    fn owner(&self, address: IpAddr) -> Result<Party<'_>> {
        if let Some(uid) = self.by_address.get(&address) {
            return Ok(Party::Pod(&self.cluster().pods[uid], Some(address)));
        }
        match self.by_vip.get(&address) {
            Some(service) => bail!(
                "{address} is the address of Service {service}: name a pod behind the service, and the \
                 pod's own port"
            ),
            None => Ok(Party::Address(address)),
        }
    }

    /// The addresses of a party. Pods of the host network have those of their node.
    fn addresses(&self, party: Party<'_>) -> Vec<IpAddr> {
        match party {
            Party::Address(address) => vec![address],
            Party::Pod(_, Some(address)) => vec![address],
            Party::Pod(pod, None) if pod.host_network => {
                let node = self.cluster().nodes.get(&pod.node);
                node.map(|node| node.addresses.iter().copied().collect())
                    .unwrap_or_default()
            }
            Party::Pod(pod, None) => pod.addresses.to_vec(),
        }
    }

    /// A connection over an address family that both ends have, IPv4 first.
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
                bail!(
                    "{name} has no address: status.podIPs or the addresses of its node are missing"
                );
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
                format!("{from} and {to} have no address family in common")
            })?;
        Ok(Connection {
            from: from.pod(),
            to: to.pod(),
            source,
            destination,
            protocol,
            port,
        })
    }

    /// Whether a port is a name.
    pub(crate) fn is_name(port: &str) -> bool {
        !port.bytes().all(|byte| byte.is_ascii_digit())
    }

    /// A port by number or by the name that the destination gives it.
    pub(crate) fn port(to: Party<'_>, protocol: args::Protocol, text: &str) -> Result<u16> {
        if !Self::is_name(text) {
            let number = text.parse().ok().filter(|number| *number > 0);
            return number
                .with_context(|| format!("invalid port {text:?}: must be between 1 and 65535"));
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
    pub(crate) fn index(&self, pod: &Pod) -> &Index {
        let index = self.evaluator.index(pod);
        index.expect("every pod of the cluster has a node with a plan")
    }

    /// A verdict at a pod, in words.
    pub(crate) fn words(&self, pod: Option<&Pod>, verdict: &Verdict) -> String {
        let verb = if verdict.allowed { "allow" } else { "deny" };
        let Some(pod) = pod else {
            return verb.to_owned();
        };
        let rule = match verdict.rule {
            RuleId::NONE => String::new(),
            rule => format!(" by {}", text::rule(self.index(pod), rule)),
        };
        format!("{verb}{rule} ({})", verdict.reason.label())
    }
}
