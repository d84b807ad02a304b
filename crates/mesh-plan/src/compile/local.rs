// SPDX-License-Identifier: Apache-2.0
//! The pods of this node: their policy sets, modes and flags, and the policy maps' content.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::Addr;
use mesh_common::identity::IdentityId;
use mesh_common::pod::{ModeKey, PodState, PodView};
use mesh_common::policy::PolicySetId;

use super::{Limits, Options, pod_ref};
use crate::authentication::{self, Enrolment};
use crate::cluster::{ClusterSnapshot, Pod, Rejection};
use crate::identities::{Identifier, Identities};
use crate::plan::{LocalPod, Plan};
use crate::policies::fit::fit;
use crate::policies::select::Matcher;
use crate::policies::sets::SetCompiler;
use crate::policies::{Digests, Places, Table};

/// Adds the pods of the node, by UID, with their policy. `digests` are those of the same policies, or
/// empty.
pub(super) fn pods(
    plan: &mut Plan,
    cluster: &ClusterSnapshot,
    (mut pods, places): (Vec<&Pod>, &Places<'_>),
    (identities, identifier, digests): (&Identities, &Identifier<'_>, &mut Digests),
    options: &Options,
    rejections: &mut Vec<Rejection>,
) {
    let table = Table::of(cluster, places, digests);
    let matcher = Matcher::new(identities);
    let mut compiler = SetCompiler::new(&table, places, matcher, options);
    pods.retain(|pod| !pod.addresses.is_empty());
    bound_pods(&mut pods, &options.limits, rejections);
    let mut of_set: BTreeMap<PolicySetId, Vec<String>> = BTreeMap::new();
    for pod in pods {
        let mut set = compiler.set_of(cluster, pod);
        of_set.entry(set).or_default().push(pod.name.to_string());
        let mut id = Some(identifier.id_of(pod));
        let collided = id.is_some_and(|id| identities.collided.contains(&id));
        let clear = !collided && owns_addresses(plan, pod);
        if !clear {
            set = PolicySetId::ISOLATED;
            id = id.filter(|_| collided);
            disputed(pod, rejections);
        }
        authentication::conflicts(cluster, pod, rejections);
        let local = local_pod(plan, cluster, pod, options, rejections);
        let view = PodView {
            set,
            id: id.unwrap_or(IdentityId::UNKNOWN),
            ..local.view
        };
        plan.pods
            .insert(pod.uid.to_string(), LocalPod { view, ..local });
    }
    let unusable = compiler.unusable(rejections);
    let fitting = fit(
        &compiler,
        &unusable,
        &of_set,
        &options.limits,
        rejections,
        &table,
    );
    for pod in plan.pods.values_mut() {
        let set = pod.view.set;
        if set != PolicySetId::NONE && !fitting.sets.contains(&set) {
            pod.view.set = PolicySetId::ISOLATED;
        }
    }
    for pod in plan.pods.values_mut() {
        let set = compiler.sets.get(&pod.view.set);
        if set.is_some_and(|set| fitting.sets.contains(&set.head.shadow)) {
            pod.view.flags |= PodState::AUDITED;
        }
    }
    let used: BTreeSet<PolicySetId> = plan.pods.values().map(|pod| pod.view.set).collect();
    write_sets(plan, &compiler, &fitting.sets, &used);
}

/// Adds the map entries of the sets in use and of their audit sets.
fn write_sets(
    plan: &mut Plan,
    compiler: &SetCompiler<'_, '_, '_>,
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
    plan.names.rules = compiler.rules.clone().into();
}

/// Compiles a local pod, without its set and identity.
fn local_pod(
    plan: &mut Plan,
    cluster: &ClusterSnapshot,
    pod: &Pod,
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
                    "too many port modes: {} entries needed, half of the map holds at most {}",
                    plan.port_modes.len() + ports.len(),
                    options.limits.port_modes
                ),
                consequence: "the strictest mode applies to all ports of the pod".to_owned(),
            });
        } else if let Some((key, _)) = ports.first() {
            view.modes = key.set;
        }
    }
    LocalPod {
        name: pod.name.clone(),
        service_account: pod.service_account.clone(),
        addresses: pod.addresses.iter().copied().collect(),
        netns_path: pod.netns_path.clone(),
        static_uid: pod.static_uid.clone(),
        deny: authentication::deny(cluster, pod),
        view,
    }
}

/// Adds all entries, or none if they do not fit or their key has another meaning.
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

/// Whether a pod owns all of its addresses in a plan.
fn owns_addresses(plan: &Plan, pod: &Pod) -> bool {
    pod.addresses.iter().all(|address| {
        let owner = plan.names.workloads.get(&Addr::from(*address));
        owner.is_some_and(|workload| workload.uid == pod.uid)
    })
}

/// Rejects a pod with a disputed address or identity. A terminating pod yields its address as
/// usual.
fn disputed(pod: &Pod, rejections: &mut Vec<Rejection>) {
    if !pod.terminating {
        rejections.push(Rejection {
            object: pod_ref(pod),
            field: "status.podIPs".to_owned(),
            why: "another pod or node has the same address or identity".to_owned(),
            consequence: "the pod is isolated until the conflict is resolved".to_owned(),
        });
    }
}

fn bound_pods(pods: &mut Vec<&Pod>, limits: &Limits, rejections: &mut Vec<Rejection>) {
    if pods.len() <= limits.pods {
        return;
    }
    for pod in pods.split_off(limits.pods) {
        rejections.push(Rejection {
            object: pod_ref(pod),
            field: "spec.nodeName".to_owned(),
            why: format!(
                "too many pods: the mesh supports at most {} pods per node",
                limits.pods
            ),
            consequence: "the pod is not protected".to_owned(),
        });
    }
}
