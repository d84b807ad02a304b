// SPDX-License-Identifier: Apache-2.0
//! Compiles a cluster into the plan of one node.
//!
//! Wires the parts: owners of addresses ([`crate::peers`]), identities ([`crate::identities`]),
//! policy ([`crate::policies`]), modes ([`crate::authentication`]) and services
//! ([`crate::services`]). An object that cannot be used is a [`Rejection`], and never allows more
//! traffic.

mod incremental;
mod local;

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_common::Addr;
use mesh_common::maps;

pub use self::incremental::Compiler;
use crate::authentication;
use crate::cluster::{ClusterSnapshot, ObjectRef, Pod, Rejection};
use crate::digest::Ids;
use crate::identities::{Identifier, Identities, Relevant};
use crate::peers;
use crate::plan::{Plan, Prefix};
use crate::policies::work::STEPS;
use crate::policies::{self, Digests, Places, cidrs};
use crate::services::{self, Services};

/// The maximum number of entries of each part of a plan.
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
    /// The maximum number of steps to compile a set.
    pub(crate) steps: usize,
}

impl Limits {
    /// The capacities of the maps.
    pub(crate) fn of_maps() -> Self {
        Self {
            pods: maps::MAX_PODS as usize,
            peers: maps::MAX_PEERS as usize,
            pod_cidrs: maps::MAX_POD_CIDRS as usize,
            sets: maps::MAX_POLICY_SETS as usize,
            selects: maps::MAX_POLICY_SELECTS as usize,
            cidrs: maps::MAX_POLICY_CIDRS as usize,
            ports: maps::MAX_POLICY_PORTS as usize,
            port_modes: maps::MAX_PORT_MODES as usize,
            services: maps::MAX_SERVICES as usize,
            backends: maps::MAX_BACKENDS as usize,
            steps: STEPS,
        }
    }

    /// Returns `true` if each map, except that of pods, has room for this number of entries beside those of a plan.
    pub(crate) fn have_room(&self, plan: &Plan, more: usize) -> bool {
        plan.peers.len() + more <= self.peers
            && plan.pod_cidrs.len() + more <= self.pod_cidrs
            && plan.sets.len() + more <= self.sets
            && plan.selects.len() + more <= self.selects
            && plan.cidrs.len() + more <= self.cidrs
            && plan.ports.len() + more <= self.ports
            && plan.port_modes.len() + more <= self.port_modes
            && plan.services.len() + more <= self.services
            && plan.backends.len() + more <= self.backends
    }
}

impl Default for Limits {
    /// The capacities of the maps; half of them where a map holds two revisions during an update.
    fn default() -> Self {
        let maps = Self::of_maps();
        Self {
            sets: maps.sets / 2,
            selects: maps.selects / 2,
            cidrs: maps.cidrs / 2,
            ports: maps.ports / 2,
            port_modes: maps.port_modes / 2,
            backends: maps.backends / 2,
            ..maps
        }
    }
}

impl Plan {
    /// The name, the entries and the maximum entries of each map that a plan fills. Entries beyond
    /// the maximum are left out, and the pods that they concern are isolated.
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

/// The parameters of a compilation besides the cluster; only tests change them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) ids: Ids,
    pub(crate) limits: Limits,
}

/// Whether a pod has its policy enforced on a node.
fn is_local(pod: &Pod, node: &str) -> bool {
    pod.node == node && !pod.host_network
}

/// The pods of a node.
fn local_pods<'a>(cluster: &'a ClusterSnapshot, node: &str) -> impl Iterator<Item = &'a Arc<Pod>> {
    cluster.pods.values().filter(move |pod| is_local(pod, node))
}

/// Compiles the plan of a node. Rejections are sorted and unique.
#[must_use]
pub fn compile(cluster: &ClusterSnapshot, node: &str) -> (Plan, Vec<Rejection>) {
    compile_with(cluster, node, &Options::default())
}

pub(crate) fn compile_with(
    cluster: &ClusterSnapshot,
    node: &str,
    options: &Options,
) -> (Plan, Vec<Rejection>) {
    let mut rejections = Vec::new();
    let plan = build(cluster, node, options, &mut rejections);
    rejections.sort();
    rejections.dedup();
    (plan, rejections)
}

fn build(
    cluster: &ClusterSnapshot,
    node: &str,
    options: &Options,
    rejections: &mut Vec<Rejection>,
) -> Plan {
    let relevant = Relevant::of(cluster.policies.values());
    let identifier = Identifier::of(cluster, &relevant, options);
    let (mut plan, identities) = addresses(cluster, node, &identifier, rejections);
    let pods = local_pods(cluster, node).map(|pod| &**pod).collect();
    let places = Places::of(cluster, Some(node));
    local::pods(
        &mut plan,
        cluster,
        (pods, &places),
        (&identities, &identifier, &mut Digests::default()),
        options,
        rejections,
    );
    let services = services::services(cluster, node, options, rejections);
    put_services(&mut plan, &services);
    bound_addresses(&mut plan, cluster, node, &options.limits, rejections);
    plan
}

/// Compiles the parts of a plan that concern all pods of the cluster: owners of addresses, and
/// identities.
fn addresses(
    cluster: &ClusterSnapshot,
    node: &str,
    identifier: &Identifier<'_>,
    rejections: &mut Vec<Rejection>,
) -> (Plan, Identities) {
    authentication::check_labels(cluster, rejections);
    policies::check(cluster, rejections);
    let owners = peers::owners(cluster, Some(node), rejections);
    let (identities, of_pods) = Identities::of(cluster, identifier, rejections);
    let mut plan = Plan {
        peers: peers::peers(cluster, node, &owners, &of_pods).into(),
        pod_cidrs: pod_cidrs(cluster).into(),
        ..Plan::default()
    };
    plan.names.identities = identities.names.clone();
    plan.names.workloads = peers::workloads(&owners).into();
    (plan, identities)
}

fn put_services(plan: &mut Plan, services: &Services) {
    plan.services = services.services.clone();
    plan.backends = services.backends.clone();
    plan.names.services = services.names.clone();
}

fn pod_cidrs(cluster: &ClusterSnapshot) -> BTreeSet<Prefix<Addr>> {
    let of_nodes = cluster.nodes.values().flat_map(|node| &node.pod_cidrs);
    of_nodes
        .chain(&cluster.pod_cidrs)
        .map(cidrs::prefix)
        .collect()
}

/// The reference of a pod.
pub(crate) fn pod_ref(pod: &Pod) -> ObjectRef {
    ObjectRef::new("Pod", &*pod.name.namespace, &*pod.name.name)
}

/// Leaves out addresses that do not fit into the maps; they are treated as unknown, or as
/// outside the cluster.
fn bound_addresses(
    plan: &mut Plan,
    cluster: &ClusterSnapshot,
    node: &str,
    limits: &Limits,
    rejections: &mut Vec<Rejection>,
) {
    let mut reject = |field: &str, needed: usize, limit: usize, consequence: &str| {
        rejections.push(Rejection {
            object: ObjectRef::new("Node", "", node),
            field: field.to_owned(),
            why: format!("{needed} entries needed, the map holds at most {limit}"),
            consequence: consequence.to_owned(),
        });
    };
    let needed = plan.peers.len();
    if needed > limits.peers {
        let consequence = "addresses that do not fit are treated as unknown";
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
        let consequence =
            "unknown addresses in CIDRs that do not fit are treated as outside the cluster";
        reject("spec.podCIDRs", needed, limits.pod_cidrs, consequence);
        plan.pod_cidrs = plan
            .pod_cidrs
            .iter()
            .take(limits.pod_cidrs)
            .copied()
            .collect();
    }
}
