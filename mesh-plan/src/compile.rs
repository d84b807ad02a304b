// SPDX-License-Identifier: Apache-2.0
//! From cluster facts to the plan of one node.
//!
//! This file wires the parts: who has which address ([`crate::peers`]), who is who
//! ([`crate::identities`]), what policy says ([`crate::policies`]), the modes
//! ([`crate::authentication`]) and the services ([`crate::services`]). What cannot be done is a
//! [`Rejection`], and never opens anything.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::Addr;
use mesh_common::identity::IdentityId;
use mesh_common::maps;
use mesh_common::pod::{ModeKey, PodState, PodView};
use mesh_common::policy::PolicySetId;

use crate::authentication::{self, Enrolment};
use crate::cluster::{Cluster, ObjectRef, Pod, Rejection};
use crate::digest::Ids;
use crate::identities::{Identities, Relevant};
use crate::peers::{self, Owner};
use crate::plan::{LocalPod, Plan, Prefix, Workload};
use crate::policies::fit::fit;
use crate::policies::select::Matcher;
use crate::policies::sets::Compiler;
use crate::policies::{self, Places, Table, cidrs};
use crate::services;

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
        }
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
    authentication::check_labels(cluster, rejections);
    policies::check(cluster, rejections);
    let owners = peers::owners(cluster, scope.node(), rejections);
    let relevant = Relevant::of(cluster.policies.values());
    let identities = Identities::of(cluster, &relevant, options, rejections);
    let mut plan = Plan {
        peers: peers::peers(cluster, scope.node(), &owners, &identities),
        pod_cidrs: pod_cidrs(cluster),
        ..Plan::default()
    };
    plan.names.identities = identities.names();
    plan.names.workloads = workloads(&owners);
    local_pods(
        &mut plan,
        cluster,
        scope,
        &Known {
            owners: &owners,
            identities: &identities,
        },
        options,
        rejections,
    );
    if let Some(node) = scope.node() {
        let services = services::services(cluster, node, &owners, options, rejections);
        plan.services = services.services;
        plan.backends = services.backends;
        plan.names.services = services.names;
    }
    bound_addresses(&mut plan, cluster, scope, &options.limits, rejections);
    plan
}

/// Who is where and who is who.
struct Known<'k, 'a> {
    owners: &'k BTreeMap<Addr, Owner<'a>>,
    identities: &'k Identities<'a>,
}

impl Known<'_, '_> {
    /// Whether all of a pod's addresses, and its identity, are its own.
    fn is_clear(&self, pod: &Pod) -> bool {
        let own = |address: &std::net::IpAddr| {
            let owner = self.owners.get(&Addr::from(*address));
            matches!(owner, Some(Owner::Pod(owner)) if owner.uid == pod.uid)
        };
        let id = self.identities.of_pod.get(pod.uid.as_str());
        let known = id.is_some_and(|id| !self.identities.collided.contains(id));
        known && pod.addresses.iter().all(own)
    }
}

/// The pods in scope with their policy.
fn local_pods<'a>(
    plan: &mut Plan,
    cluster: &'a Cluster,
    scope: Scope<'_>,
    known: &Known<'_, 'a>,
    options: &Options,
    rejections: &mut Vec<Rejection>,
) {
    let places = Places::of(cluster);
    let table = Table::of(cluster, &places);
    let matcher = Matcher::new(known.identities);
    let mut compiler = Compiler::new(&table, &places, matcher, options);
    let everywhere = scope.node().is_none();
    let mut pods: Vec<&Pod> = cluster
        .pods
        .values()
        .filter(|pod| scope.holds(pod) && (everywhere || !pod.addresses.is_empty()))
        .collect();
    bound_pods(&mut pods, everywhere, &options.limits, rejections);
    let mut of_set: BTreeMap<PolicySetId, Vec<String>> = BTreeMap::new();
    for pod in pods {
        let mut set = compiler.set_of(cluster, pod);
        of_set.entry(set).or_default().push(pod.name.to_string());
        let mut id = known.identities.of_pod.get(pod.uid.as_str()).copied();
        if !known.is_clear(pod) {
            set = PolicySetId::ISOLATED;
            id = id.filter(|id| known.identities.collided.contains(id));
        }
        authentication::conflicts(cluster, pod, rejections);
        let local = local_pod(plan, cluster, pod, known, options, rejections);
        let view = PodView {
            set,
            id: id.unwrap_or(IdentityId::UNKNOWN),
            ..local.view
        };
        plan.pods
            .insert(pod.uid.clone(), LocalPod { view, ..local });
    }
    let limits = if everywhere {
        &Limits {
            sets: usize::MAX,
            selects: usize::MAX,
            cidrs: usize::MAX,
            ports: usize::MAX,
            ..options.limits
        }
    } else {
        &options.limits
    };
    let unusable = compiler.unusable(rejections);
    let fitting = fit(&compiler, &unusable, &of_set, limits, rejections, &table);
    for pod in plan.pods.values_mut() {
        let set = pod.view.set;
        if set != PolicySetId::NONE && !fitting.sets.contains(&set) {
            pod.view.set = PolicySetId::ISOLATED;
        }
    }
    let used: BTreeSet<PolicySetId> = plan.pods.values().map(|pod| pod.view.set).collect();
    write_sets(plan, &compiler, &fitting.sets, &used);
}

/// The maps' content of the sets that are used, their shadows among them.
fn write_sets(
    plan: &mut Plan,
    compiler: &Compiler<'_, '_, '_>,
    fitting: &BTreeSet<PolicySetId>,
    used: &BTreeSet<PolicySetId>,
) {
    let shadows = used
        .iter()
        .filter_map(|id| compiler.sets.get(id).map(|set| set.head.shadow));
    let all: BTreeSet<PolicySetId> = used.iter().copied().chain(shadows).collect();
    for id in all.intersection(fitting) {
        let Some(set) = compiler.sets.get(id) else {
            continue;
        };
        plan.sets.insert(*id, set.head);
        plan.selects.extend(set.selects.iter().copied());
        plan.cidrs.extend(set.cidrs.iter().copied());
        for list in &set.lists {
            plan.ports
                .extend(compiler.lists.entries(*list).iter().copied());
        }
    }
    plan.names.rules = compiler.rules.clone();
}

/// A local pod but for its set and identity.
fn local_pod(
    plan: &mut Plan,
    cluster: &Cluster,
    pod: &Pod,
    known: &Known<'_, '_>,
    options: &Options,
    rejections: &mut Vec<Rejection>,
) -> LocalPod {
    let of_family = |v4: bool| {
        let mut own = pod.addresses.iter().filter(|a| a.is_ipv4() == v4);
        own.next().map_or(Addr::NONE, |a| Addr::from(*a))
    };
    let mut view = PodView {
        v4: of_family(true),
        v6: of_family(false),
        ..PodView::default()
    };
    // A pod that ends yields its address in the course of things.
    if !known.is_clear(pod) && !pod.terminating {
        rejections.push(Rejection {
            object: pod_ref(pod),
            field: "status.podIPs".to_owned(),
            why: "its address or its identity is also another's".to_owned(),
            consequence: "the pod is isolated until it is its own".to_owned(),
        });
    }
    if authentication::enrolment(cluster, pod) != Enrolment::No {
        let modes = authentication::modes(cluster, pod);
        view.flags = PodState::ENROLLED | modes.flags();
        let ports = modes.port_modes(options);
        if !add_port_modes(&mut plan.port_modes, &ports, options.limits.port_modes) {
            view.flags |= if modes.any_strict() {
                PodState::STRICT
            } else {
                0
            };
            rejections.push(Rejection {
                object: pod_ref(pod),
                field: "status".to_owned(),
                why: format!(
                    "the modes of its ports need {} entries, and half of the map holds {}",
                    plan.port_modes.len() + ports.len(),
                    options.limits.port_modes
                ),
                consequence: "all of its ports have the strictest mode".to_owned(),
            });
        } else if let Some((key, _)) = ports.first() {
            view.modes = key.set;
        }
    }
    LocalPod {
        name: pod.name.clone(),
        service_account: pod.service_account.clone(),
        addresses: pod.addresses.clone(),
        netns_path: pod.netns_path.clone(),
        view,
    }
}

/// Adds them all, or none if they do not fit or their key has another meaning.
fn add_port_modes(to: &mut BTreeMap<ModeKey, u8>, add: &[(ModeKey, u8)], limit: usize) -> bool {
    let Some((first, _)) = add.first() else {
        return true;
    };
    let known = to.keys().filter(|key| key.set == first.set).count();
    if known > 0 {
        return known == add.len() && add.iter().all(|(key, mode)| to.get(key) == Some(mode));
    }
    if to.len() + add.len() > limit {
        return false;
    }
    to.extend(add.iter().copied());
    true
}

fn pod_cidrs(cluster: &Cluster) -> BTreeSet<Prefix<Addr>> {
    let of_nodes = cluster.nodes.values().flat_map(|node| &node.pod_cidrs);
    of_nodes
        .chain(&cluster.pod_cidrs)
        .map(cidrs::prefix)
        .collect()
}

fn workloads(owners: &BTreeMap<Addr, Owner<'_>>) -> BTreeMap<Addr, Workload> {
    let workload = |(address, owner): (&Addr, &Owner<'_>)| match owner {
        Owner::Pod(pod) => Some((
            *address,
            Workload {
                pod: pod.name.clone(),
                uid: pod.uid.clone(),
                workload: pod.workload.1.clone(),
                workload_kind: pod.workload.0.clone(),
                service_account: pod.service_account.clone(),
                node: pod.node.clone(),
            },
        )),
        Owner::Node(_) | Owner::Disputed => None,
    };
    owners.iter().filter_map(workload).collect()
}

/// Names a pod.
pub(crate) fn pod_ref(pod: &Pod) -> ObjectRef {
    ObjectRef::new("Pod", &*pod.name.namespace, &*pod.name.name)
}

fn bound_pods(
    pods: &mut Vec<&Pod>,
    everywhere: bool,
    limits: &Limits,
    rejections: &mut Vec<Rejection>,
) {
    if everywhere || pods.len() <= limits.pods {
        return;
    }
    for pod in pods.split_off(limits.pods) {
        rejections.push(Rejection {
            object: pod_ref(pod),
            field: "spec.nodeName".to_owned(),
            why: format!("this node has more than {} pods", limits.pods),
            consequence: "the pod is not protected".to_owned(),
        });
    }
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
