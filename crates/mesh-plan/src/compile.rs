// SPDX-License-Identifier: Apache-2.0
//! From cluster facts to the plan of one node.
//!
//! This file wires the parts: who has which address ([`crate::peers`]), who is who
//! ([`crate::identities`]), what policy says ([`crate::policies`]), the modes
//! ([`crate::authentication`]) and the services ([`crate::services`]). What cannot be done is a
//! [`Rejection`], and never opens anything.

mod again;
mod local;

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_common::Addr;
use mesh_common::maps;

pub use self::again::Compiler;
use crate::authentication;
use crate::cluster::{Cluster, ObjectRef, Pod, Rejection};
use crate::digest::Ids;
use crate::identities::{Identifier, Identities, Relevant};
use crate::peers;
use crate::plan::{Plan, Prefix};
use crate::policies::work::STEPS;
use crate::policies::{self, Digests, Places, cidrs};
use crate::services::{self, Services};

/// How many entries each part of a plan may have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) pods: usize,
    pub(crate) peers: usize,
    pub(crate) pod_cidrs: usize,
    pub(crate) sets: usize,
    pub(crate) selects: usize,
    pub(crate) cidrs: usize,
    pub(crate) ports: usize,
    pub(crate) port_modes: usize,
    pub(crate) services: usize,
    pub(crate) backends: usize,
    /// What compiling a set may cost.
    pub(crate) steps: usize,
}

impl Default for Limits {
    /// The maps' capacities; half of them where two revisions are in a map during a switch.
    fn default() -> Self {
        Self {
            pods: maps::MAX_PODS as usize,
            peers: maps::MAX_PEERS as usize,
            pod_cidrs: maps::MAX_POD_CIDRS as usize,
            sets: maps::MAX_POLICY_SETS as usize / 2,
            selects: maps::MAX_POLICY_SELECTS as usize / 2,
            cidrs: maps::MAX_POLICY_CIDRS as usize / 2,
            ports: maps::MAX_POLICY_PORTS as usize / 2,
            port_modes: maps::MAX_PORT_MODES as usize / 2,
            services: maps::MAX_SERVICES as usize,
            backends: maps::MAX_BACKENDS as usize / 2,
            steps: STEPS,
        }
    }
}

impl Plan {
    /// Name, entries and most entries of a plan for each map that a plan fills: beyond that, what does
    /// not fit is left out, and the pods that it is about are isolated.
    #[must_use]
    pub fn fill(&self) -> Vec<(&'static str, usize, usize)> {
        let limits = Limits::default();
        vec![
            ("PODS", self.pods.len(), limits.pods),
            ("PEERS", self.peers.len(), limits.peers),
            ("POD_CIDRS", self.pod_cidrs.len(), limits.pod_cidrs),
            ("POLICY_SETS", self.sets.len(), limits.sets),
            ("POLICY_SELECT", self.selects.len(), limits.selects),
            ("POLICY_CIDRS", self.cidrs.len(), limits.cidrs),
            ("POLICY_PORTS", self.ports.len(), limits.ports),
            ("PORT_MODES", self.port_modes.len(), limits.port_modes),
            ("SERVICES", self.services.len(), limits.services),
            ("BACKENDS", self.backends.len(), limits.backends),
        ]
    }
}

/// What a compilation depends on beside the facts; only tests change it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) ids: Ids,
    pub(crate) limits: Limits,
}

/// Whose pods get policy sets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scope<'a> {
    /// Those of one node.
    Node(&'a str),
    /// All.
    Everywhere,
}

impl<'a> Scope<'a> {
    fn node(self) -> Option<&'a str> {
        match self {
            Self::Node(name) => Some(name),
            Self::Everywhere => None,
        }
    }

    fn pods(self, cluster: &'a Cluster) -> impl Iterator<Item = &'a Arc<Pod>> {
        cluster.pods.values().filter(move |pod| self.holds(pod))
    }

    fn holds(self, pod: &Pod) -> bool {
        let here = self.node().is_none_or(|node| pod.node == node);
        here && !pod.host_network
    }
}

/// Compiles the plan of the node with this name. Rejections are in order, each once.
#[must_use]
pub fn compile(cluster: &Cluster, node: &str) -> (Plan, Vec<Rejection>) {
    compile_with(cluster, Scope::Node(node), &Options::default())
}

pub(crate) fn compile_with(
    cluster: &Cluster,
    scope: Scope<'_>,
    options: &Options,
) -> (Plan, Vec<Rejection>) {
    let mut rejections = Vec::new();
    let plan = build(cluster, scope, options, &mut rejections);
    rejections.sort();
    rejections.dedup();
    (plan, rejections)
}

fn build(
    cluster: &Cluster,
    scope: Scope<'_>,
    options: &Options,
    rejections: &mut Vec<Rejection>,
) -> Plan {
    let relevant = Relevant::of(cluster.policies.values());
    let identifier = Identifier::of(cluster, &relevant, options);
    let (mut plan, identities) = addresses(cluster, scope, &identifier, rejections);
    let pods = scope.pods(cluster).map(|pod| &**pod).collect();
    let places = Places::of(cluster, scope.node());
    local::pods(
        &mut plan,
        cluster,
        (scope, pods, &places),
        (&identities, &identifier, &mut Digests::default()),
        options,
        rejections,
    );
    add_services(&mut plan, cluster, scope, options, rejections);
    bound_addresses(&mut plan, cluster, scope, &options.limits, rejections);
    plan
}

/// What of a plan is about all pods of the cluster: who has which address, and who is who.
fn addresses(
    cluster: &Cluster,
    scope: Scope<'_>,
    identifier: &Identifier<'_>,
    rejections: &mut Vec<Rejection>,
) -> (Plan, Identities) {
    authentication::check_labels(cluster, rejections);
    policies::check(cluster, rejections);
    let owners = peers::owners(cluster, scope.node(), rejections);
    let (identities, of_pods) = Identities::of(cluster, identifier, rejections);
    let mut plan = Plan {
        peers: peers::peers(cluster, scope.node(), &owners, &of_pods).into(),
        pod_cidrs: pod_cidrs(cluster).into(),
        ..Plan::default()
    };
    plan.names.identities = identities.names.clone();
    plan.names.workloads = peers::workloads(&owners).into();
    (plan, identities)
}

fn add_services(
    plan: &mut Plan,
    cluster: &Cluster,
    scope: Scope<'_>,
    options: &Options,
    rejections: &mut Vec<Rejection>,
) {
    if let Some(node) = scope.node() {
        let services = services::services(cluster, node, plan, options, rejections);
        put_services(plan, &services);
    }
}

fn put_services(plan: &mut Plan, services: &Services) {
    plan.services = services.services.clone();
    plan.backends = services.backends.clone();
    plan.names.services = services.names.clone();
}

fn pod_cidrs(cluster: &Cluster) -> BTreeSet<Prefix<Addr>> {
    let of_nodes = cluster.nodes.values().flat_map(|node| &node.pod_cidrs);
    of_nodes
        .chain(&cluster.pod_cidrs)
        .map(cidrs::prefix)
        .collect()
}

/// Names a pod.
pub(crate) fn pod_ref(pod: &Pod) -> ObjectRef {
    ObjectRef::new("Pod", &*pod.name.namespace, &*pod.name.name)
}

/// Leaves out what does not fit: an address that is left out counts as unknown or as outside.
fn bound_addresses(
    plan: &mut Plan,
    cluster: &Cluster,
    scope: Scope<'_>,
    limits: &Limits,
    rejections: &mut Vec<Rejection>,
) {
    let Some(node) = scope.node() else { return };
    let mut reject = |field: &str, needed: usize, limit: usize, consequence: &str| {
        rejections.push(Rejection {
            object: ObjectRef::new("Node", "", node),
            field: field.to_owned(),
            why: format!("{needed} entries are needed, and the map holds {limit}"),
            consequence: consequence.to_owned(),
        });
    };
    let needed = plan.peers.len();
    if needed > limits.peers {
        let consequence = "the addresses that do not fit count as unknown";
        reject("status.addresses", needed, limits.peers, consequence);
        let own = cluster
            .nodes
            .get(node)
            .map(|n| &n.addresses)
            .into_iter()
            .flatten();
        let own: BTreeSet<Addr> = own.map(|a| Addr::from(*a)).collect();
        let others = plan.peers.keys().filter(|a| !own.contains(a)).copied();
        let surplus: Vec<Addr> = others.rev().take(needed - limits.peers).collect();
        for address in surplus {
            plan.peers.remove(&address);
        }
    }
    let needed = plan.pod_cidrs.len();
    if needed > limits.pod_cidrs {
        let consequence = "unknown addresses in the blocks that do not fit count as outside";
        reject("spec.podCIDRs", needed, limits.pod_cidrs, consequence);
        plan.pod_cidrs = plan
            .pod_cidrs
            .iter()
            .take(limits.pod_cidrs)
            .copied()
            .collect();
    }
}
