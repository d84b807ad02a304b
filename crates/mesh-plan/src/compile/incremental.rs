// SPDX-License-Identifier: Apache-2.0
//! Incremental compilation. The parts of a plan that concern all pods of the cluster are reused
//! when only pods (or their readiness for tunnels), services and policies changed; the parts that
//! concern this node's pods are always compiled again. A policy that starts or stops using a label
//! that no other policy uses changes the identities of the pods with that label.
//!
//! Unusual clusters (with a disputed address, a hash collision, an unknown label value, or more
//! entries than fit) are compiled in full, so that incremental compilation never makes rejections
//! about them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::Addr;
use mesh_common::identity::Peer;

use super::{Options, addresses, bound_addresses, is_local, local, local_pods, put_services};
use crate::authentication;
use crate::cluster::{ClusterSnapshot, Pod, Rejection, Service};
use crate::identities::{Identifier, Identities, Relevant};
use crate::peers;
use crate::plan::Plan;
use crate::policies::{self, Digests, Places};
use crate::services::{self, Services};
use crate::shared::Shared;

/// Compiles successive plans, and reuses parts of the previous one. Each plan equals that of
/// [`super::compile()`].
#[derive(Debug)]
pub struct Compiler {
    node: String,
    options: Options,
    previous: Option<Previous>,
}

/// The reusable parts of a compilation.
#[derive(Debug)]
struct Previous {
    cluster: Arc<ClusterSnapshot>,
    /// The result of [`addresses`].
    plan: Plan,
    /// The pods of this node, by UID.
    local: BTreeMap<Arc<str>, Arc<Pod>>,
    identities: Identities,
    /// The labels and ports that policies use.
    relevant: Relevant,
    digests: Digests,
    /// The services and their rejections.
    services: Option<(Services, Vec<Rejection>)>,
    /// The rejections; of policies only, if the cluster is ordinary.
    rejections: Vec<Rejection>,
    /// Whether every address has one claimant, every identity one content, and every label a known
    /// value.
    ordinary: bool,
}

/// A pod before and after a change.
type Change<'c> = (Option<&'c Arc<Pod>>, Option<&'c Arc<Pod>>);

impl Compiler {
    /// Creates the compiler of a node.
    #[must_use]
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            options: Options::default(),
            previous: None,
        }
    }

    /// Compiles the plan of a cluster. `own_addresses` are those of this node's interfaces: the ones
    /// inside the node's pod CIDRs count as the node's, like those of its Node object.
    pub fn compile(
        &mut self,
        cluster: &Arc<ClusterSnapshot>,
        own_addresses: &BTreeSet<IpAddr>,
    ) -> (Plan, Vec<Rejection>) {
        let cluster = &self.with_own_addresses(cluster, own_addresses);
        let carried = self
            .previous
            .take()
            .and_then(|before| before.carry(cluster, &self.node, &self.options));
        let mut next = match carried {
            Some(next) => next,
            None => self.start(cluster),
        };
        let identifier = Identifier::of(cluster, &next.relevant, &self.options);
        let mut plan = next.plan.clone();
        let mut rejections = next.rejections.clone();
        let options = &self.options;
        let places = match next.ordinary {
            true => Places::among(cluster, Some(&self.node), &plan.names.workloads),
            false => Places::of(cluster, Some(&self.node)),
        };
        local::pods(
            &mut plan,
            cluster,
            (next.local.values().map(|pod| &**pod).collect(), &places),
            (&next.identities, &identifier, &mut next.digests),
            options,
            &mut rejections,
        );
        let (services, refused) = next.services.get_or_insert_with(|| {
            let mut refused = Vec::new();
            let services = services::services(cluster, &self.node, options, &mut refused);
            (services, refused)
        });
        put_services(&mut plan, services);
        rejections.extend(refused.iter().cloned());
        bound_addresses(
            &mut plan,
            cluster,
            &self.node,
            &options.limits,
            &mut rejections,
        );
        rejections.sort();
        rejections.dedup();
        self.previous = Some(next);
        (plan, rejections)
    }

    /// The cluster with this node's own addresses. An interface may also carry addresses that are not
    /// the node's, for example those of all services: only addresses of the pod CIDRs count.
    fn with_own_addresses(
        &self,
        cluster: &Arc<ClusterSnapshot>,
        own_addresses: &BTreeSet<IpAddr>,
    ) -> Arc<ClusterSnapshot> {
        let Some(node) = cluster.nodes.get(&self.node) else {
            return Arc::clone(cluster);
        };
        let is_missing = |address: &&IpAddr| {
            let mut blocks = node.pod_cidrs.iter();
            !node.addresses.contains(*address) && blocks.any(|block| block.contains(*address))
        };
        let mut missing = own_addresses.iter().filter(is_missing).peekable();
        if missing.peek().is_none() {
            return Arc::clone(cluster);
        }
        let mut extended = ClusterSnapshot::clone(cluster);
        if let Some(node) = extended.nodes.get_mut(&self.node) {
            node.addresses.extend(missing);
        }
        if let Some(previous) = &self.previous {
            extended.nodes.unite(&previous.cluster.nodes);
        }
        extended.into()
    }

    fn start(&self, cluster: &Arc<ClusterSnapshot>) -> Previous {
        let relevant = Relevant::of(cluster.policies.values());
        let identifier = Identifier::of(cluster, &relevant, &self.options);
        let mut rejections = Vec::new();
        let (plan, identities) = addresses(cluster, &self.node, &identifier, &mut rejections);
        let mut of_policies = Vec::new();
        policies::check(cluster, &mut of_policies);
        // A terminating pod that yields its address causes no rejection, but claims the address.
        let pods = cluster.pods.values().filter(|pod| !pod.host_network);
        let claims: usize = pods.map(|pod| pod.addresses.len()).sum();
        Previous {
            ordinary: identities.collided.is_empty()
                && rejections == of_policies
                && claims == plan.names.workloads.len(),
            cluster: Arc::clone(cluster),
            plan,
            local: local_pods(cluster, &self.node)
                .map(|pod| (Arc::clone(&pod.uid), Arc::clone(pod)))
                .collect(),
            identities,
            relevant,
            digests: Digests::default(),
            services: None,
            rejections,
        }
    }
}

impl Previous {
    /// Updates the parts for the next cluster; `None` = it must be compiled in full.
    fn carry(
        mut self,
        cluster: &Arc<ClusterSnapshot>,
        node: &str,
        options: &Options,
    ) -> Option<Self> {
        if !self.ordinary || !same_world(&self.cluster, cluster) {
            return None;
        }
        let before = Arc::clone(&self.cluster);
        let old = std::mem::take(&mut self.relevant);
        let new = match before.policies == cluster.policies {
            true => old.clone(),
            false => self.change_policies(cluster),
        };
        let asked = Asked::between(&before, &old, &new);
        let readied = readied(&before.ready, &cluster.ready)?;
        let identifier = Identifier::of(&before, &old, options);
        let spaces = cluster.namespaces.iter();
        let spaces = spaces.filter(|(_, space)| readied.contains(space.uid.as_str()));
        let spaces: HashSet<&str> = spaces.map(|(name, _)| name.as_str()).collect();
        let same = |old: &Arc<Pod>, new: &Arc<Pod>| {
            old == new
                && (spaces.is_empty() || !spaces.contains(new.name.namespace.as_str()))
                && (asked.is_nothing() || !asked.about(new))
        };
        let are_same = before.pods.is(&cluster.pods) && spaces.is_empty() && asked.is_nothing();
        let mut changes = match are_same {
            true => Vec::new(),
            false => changes(&before.pods, &cluster.pods, same),
        };
        let readied = readied.iter().filter_map(|uid| {
            let (old, new) = (before.pods.get(*uid)?, cluster.pods.get(*uid)?);
            same(old, new).then_some((Some(old), Some(new)))
        });
        changes.extend(readied);
        for old in changes.iter().filter_map(|(old, _)| *old) {
            self.local.remove(&old.uid);
            self.remove(&identifier, old)?;
        }
        let identifier = Identifier::of(cluster, &new, options);
        for new in changes.iter().filter_map(|(_, new)| *new) {
            if is_local(new, node) {
                self.local.insert(Arc::clone(&new.uid), Arc::clone(new));
            }
            self.add(cluster, &identifier, new)?;
        }
        if !changes.is_empty() {
            self.plan
                .names
                .identities
                .clone_from(&self.identities.names);
        }
        // Whether a pod has an external address depends on more than services.
        let is_external = |service: &Arc<Service>| !service.external_ips.is_empty();
        if before.services != cluster.services || cluster.services.values().any(is_external) {
            self.services = None;
        }
        self.relevant = new;
        self.cluster = Arc::clone(cluster);
        Some(self)
    }

    /// Updates the parts that depend on policies alone, and returns the labels and ports that
    /// policies use now.
    fn change_policies(&mut self, cluster: &ClusterSnapshot) -> Relevant {
        self.digests = (self.digests).carried(&self.cluster.policies, &cluster.policies);
        self.rejections.clear();
        policies::check(cluster, &mut self.rejections);
        Relevant::of(cluster.policies.values())
    }

    fn remove(&mut self, identifier: &Identifier<'_>, pod: &Pod) -> Option<()> {
        if pod.host_network {
            return Some(());
        }
        self.identities.remove(identifier, pod);
        for address in &pod.addresses {
            let addr = Addr::from(*address);
            // An address without a workload, or with another one, was disputed.
            let workload = self.plan.names.workloads.remove(&addr)?;
            if workload.uid != pod.uid || self.cluster.api_servers.contains(address) {
                return None;
            }
            self.plan.peers.remove(&addr);
        }
        Some(())
    }

    fn add(
        &mut self,
        cluster: &ClusterSnapshot,
        identifier: &Identifier<'_>,
        pod: &Arc<Pod>,
    ) -> Option<()> {
        if !authentication::has_known_label(pod) {
            return None;
        }
        if pod.host_network {
            return Some(());
        }
        let peer = Peer {
            id: self.identities.add(identifier, pod)?,
            flags: peers::flags(cluster, pod),
            pad: 0,
        };
        for address in &pod.addresses {
            let addr = Addr::from(*address);
            if self.plan.peers.insert(addr, peer).is_some() {
                return None;
            }
            let workloads = &mut self.plan.names.workloads;
            workloads.insert(addr, Arc::clone(pod));
        }
        Some(())
    }
}

/// The labels and ports that policies start or stop using.
struct Asked<'a> {
    labels: Vec<&'a str>,
    ports: Vec<&'a str>,
    /// Namespaces with such labels.
    namespaces: HashSet<&'a str>,
}

impl<'a> Asked<'a> {
    fn between(cluster: &'a ClusterSnapshot, old: &'a Relevant, new: &'a Relevant) -> Self {
        let differ = |a: &'a BTreeSet<String>, b: &'a BTreeSet<String>| -> Vec<&'a str> {
            a.symmetric_difference(b).map(String::as_str).collect()
        };
        let labels = differ(&old.namespaces, &new.namespaces);
        let spaces = cluster.namespaces.iter();
        let spaces =
            spaces.filter(|(_, space)| labels.iter().any(|l| space.labels.contains_key(*l)));
        Self {
            labels: differ(&old.pods, &new.pods),
            ports: differ(&old.ports, &new.ports),
            namespaces: spaces.map(|(name, _)| name.as_str()).collect(),
        }
    }

    fn is_nothing(&self) -> bool {
        self.labels.is_empty() && self.ports.is_empty() && self.namespaces.is_empty()
    }

    /// Whether they change the identity of a pod.
    fn about(&self, pod: &Pod) -> bool {
        self.namespaces.contains(pod.name.namespace.as_str())
            || self
                .labels
                .iter()
                .any(|label| pod.labels.contains_key(*label))
            || pod
                .named_ports
                .keys()
                .any(|(name, _)| self.ports.contains(&name.as_str()))
    }
}

/// The workloads whose readiness changed: UIDs of pods and namespaces. `None` = the cluster started
/// or stopped to have readiness.
fn readied<'c>(
    before: &'c Option<Shared<BTreeSet<Arc<str>>>>,
    after: &'c Option<Shared<BTreeSet<Arc<str>>>>,
) -> Option<HashSet<&'c str>> {
    match (before, after) {
        (None, None) => Some(HashSet::new()),
        (Some(before), Some(after)) if before.is(after) => Some(HashSet::new()),
        (Some(before), Some(after)) => {
            let changed = before.symmetric_difference(after);
            Some(changed.map(|uid| &**uid).collect())
        }
        (Some(_), None) | (None, Some(_)) => None,
    }
}

/// Whether everything that incremental compilation does not handle is unchanged.
fn same_world(a: &ClusterSnapshot, b: &ClusterSnapshot) -> bool {
    let ClusterSnapshot {
        namespaces,
        nodes,
        pods: _,
        services: _,
        policies: _,
        authentications,
        ready: _,
        api_servers,
        pod_cidrs,
        versions: _,
    } = a;
    *namespaces == b.namespaces
        && *nodes == b.nodes
        && *authentications == b.authentications
        && *api_servers == b.api_servers
        && *pod_cidrs == b.pod_cidrs
}

/// The pods that changed.
fn changes<'c>(
    before: &'c BTreeMap<Arc<str>, Arc<Pod>>,
    after: &'c BTreeMap<Arc<str>, Arc<Pod>>,
    same: impl Fn(&Arc<Pod>, &Arc<Pod>) -> bool,
) -> Vec<Change<'c>> {
    let mut changes: Vec<Change<'c>> = Vec::new();
    let mut after = after.iter().peekable();
    for (uid, old) in before {
        while let Some((_, new)) = after.next_if(|(next, _)| *next < uid) {
            changes.push((None, Some(new)));
        }
        match after.next_if(|(next, _)| *next == uid) {
            Some((_, new)) if same(old, new) => {}
            Some((_, new)) => changes.push((Some(old), Some(new))),
            None => changes.push((Some(old), None)),
        }
    }
    changes.extend(after.map(|(_, new)| (None, Some(new))));
    changes
}
