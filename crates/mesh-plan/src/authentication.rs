// SPDX-License-Identifier: Apache-2.0
//! Enrollment and modes: the pods in the mesh, and their settings by MeshAuthentication.
//!
//! The most specific object wins, field by field: one with a pod selector, then the namespace's,
//! then `mesh-system/default`. Of two objects of one rank the stricter one applies, and both are
//! reported.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::Port;
use mesh_common::pod::{ModeKey, PodState, port_mode};

use crate::cluster::{
    Authentication, ClusterSnapshot, Labels, Mtls, ObjectName, ObjectRef, OutboundMode, Pod,
    Rejection, UdpMode,
};
use crate::compile::{Options, pod_ref};
use crate::plan::Deny;

/// The namespace of the mesh itself, which is never enrolled.
pub(crate) const MESH_NAMESPACE: &str = "mesh-system";
/// The namespace of Kubernetes itself, whose pods are enrolled only by their own labels.
const SYSTEM_NAMESPACE: &str = "kube-system";
/// The label of namespaces and pods that enrolls them.
pub const DATAPLANE_LABEL: &str = "mesh.rs/dataplane";

/// The label of namespaces that specifies how their pods refuse traffic.
pub(crate) const DENY_LABEL: &str = "mesh.rs/deny";

/// The way in which a pod is enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enrolment {
    /// The pod is not enrolled.
    No,
    /// The namespace's label enrolls it.
    ByNamespace,
    /// The pod's own label enrolls it.
    ByPod,
}

/// Determines whether a pod is enrolled, and how.
pub(crate) fn enrolment(cluster: &ClusterSnapshot, pod: &Pod) -> Enrolment {
    let namespace = pod.name.namespace.as_str();
    if pod.host_network || namespace == MESH_NAMESPACE {
        return Enrolment::No;
    }
    let of_namespace = cluster
        .namespaces
        .get(namespace)
        .filter(|_| namespace != SYSTEM_NAMESPACE)
        .and_then(|n| n.labels.get(DATAPLANE_LABEL))
        .map(String::as_str);
    if of_namespace == Some("required") {
        return Enrolment::ByNamespace;
    }
    match pod.labels.get(DATAPLANE_LABEL).map(String::as_str) {
        Some("enabled") => Enrolment::ByPod,
        Some("disabled") => Enrolment::No,
        _ if of_namespace == Some("enabled") => Enrolment::ByNamespace,
        _ => Enrolment::No,
    }
}

/// Whether a pod is enrolled in the mesh.
#[must_use]
pub fn is_enrolled(cluster: &ClusterSnapshot, pod: &Pod) -> bool {
    enrolment(cluster, pod) != Enrolment::No
}

/// Whether a namespace enrolls its pods by default.
#[must_use]
pub fn enrols(cluster: &ClusterSnapshot, namespace: &str) -> bool {
    let label = cluster
        .namespaces
        .get(namespace)
        .and_then(|n| n.labels.get(DATAPLANE_LABEL))
        .map(String::as_str);
    ![MESH_NAMESPACE, SYSTEM_NAMESPACE].contains(&namespace)
        && matches!(label, Some("enabled" | "required"))
}

/// Whether the node of an enrolled pod has reported that it accepts tunnels; in standalone mode the
/// label is enough.
pub(crate) fn ready(cluster: &ClusterSnapshot, pod: &Pod, enrolment: Enrolment) -> bool {
    let Some(ready) = &cluster.ready else {
        return true;
    };
    if ready.contains(&*pod.uid) {
        return true;
    }
    enrolment == Enrolment::ByNamespace
        && cluster
            .namespaces
            .get(&pod.name.namespace)
            .is_some_and(|n| ready.contains(&*n.uid))
}

/// Returns the kind of refusal that the pod's namespace specifies.
pub(crate) fn deny(cluster: &ClusterSnapshot, pod: &Pod) -> Option<Deny> {
    let namespace = cluster.namespaces.get(&pod.name.namespace)?;
    match namespace.labels.get(DENY_LABEL)?.as_str() {
        "reject" => Some(Deny::Reject),
        "drop" => Some(Deny::Drop),
        _ => None,
    }
}

/// Rejects labels of the mesh with an unknown value; they are ignored.
pub(crate) fn check_labels(cluster: &ClusterSnapshot, rejections: &mut Vec<Rejection>) {
    let mut check = |object: ObjectRef, labels: &Labels, label: &str, known: &[&str]| {
        let value = labels.get(label).filter(|v| !known.contains(&v.as_str()));
        rejections.extend(value.map(|value| Rejection {
            object,
            field: format!("metadata.labels[{label}]"),
            why: format!(
                "invalid value {value:?}: must be one of {}",
                known.join(", ")
            ),
            consequence: "the label is ignored".to_owned(),
        }));
    };
    for (name, namespace) in &cluster.namespaces {
        let object = || ObjectRef::new("Namespace", "", name);
        let enrols = ["enabled", "disabled", "required"];
        check(object(), &namespace.labels, DATAPLANE_LABEL, &enrols);
        check(object(), &namespace.labels, DENY_LABEL, &["reject", "drop"]);
    }
    for pod in cluster.pods.values().filter(|pod| !has_known_label(pod)) {
        let enrols = ["enabled", "disabled"];
        check(pod_ref(pod), &pod.labels, DATAPLANE_LABEL, &enrols);
    }
}

/// Whether a pod's own label is missing or has a known value.
pub(crate) fn has_known_label(pod: &Pod) -> bool {
    let value = pod.labels.get(DATAPLANE_LABEL);
    value.is_none_or(|value| matches!(value.as_str(), "enabled" | "disabled"))
}

/// The settings of a pod by MeshAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Modes {
    /// The mode of ports that are not in `ports`.
    pub(crate) mtls: Mtls,
    /// Ports whose mode differs from `mtls`.
    pub(crate) ports: BTreeMap<u16, Mtls>,
    pub(crate) outbound: OutboundMode,
    pub(crate) udp: UdpMode,
}

impl Modes {
    /// Whether any port accepts tunnels only.
    pub(crate) fn any_strict(&self) -> bool {
        self.mtls == Mtls::Strict || self.ports.values().any(|m| *m == Mtls::Strict)
    }

    /// The flags of [`PodState`].
    pub(crate) fn flags(&self) -> u32 {
        let mtls = match self.mtls {
            Mtls::Permissive => 0,
            Mtls::Strict => PodState::STRICT,
        };
        let outbound = match self.outbound {
            OutboundMode::Opportunistic => 0,
            OutboundMode::Required => PodState::REQUIRED,
        };
        let udp = match self.udp {
            UdpMode::Allow => 0,
            UdpMode::SameNode => PodState::UDP_SAME_NODE,
            UdpMode::Deny => PodState::UDP_DENY,
        };
        mtls | outbound | udp
    }

    /// The entries of the map `PORT_MODES`, all under one key; none if no port differs.
    pub(crate) fn port_modes(&self, options: &Options) -> Vec<(ModeKey, u8)> {
        if self.ports.is_empty() {
            return Vec::new();
        }
        let set = options.ids.id("modes", 1, &self.ports);
        let entry = |(port, mode): (&u16, &Mtls)| {
            let key = ModeKey::new(set, Port::new(*port));
            let value = match mode {
                Mtls::Permissive => port_mode::PERMISSIVE,
                Mtls::Strict => port_mode::STRICT,
            };
            (key, value)
        };
        self.ports.iter().map(entry).collect()
    }
}

type Named<'a> = (&'a ObjectName, &'a Authentication);

/// The objects that apply to a pod, most specific rank first.
fn ranks<'a>(cluster: &'a ClusterSnapshot, pod: &Pod) -> [Vec<Named<'a>>; 3] {
    let first = ObjectName::new(pod.name.namespace.as_str(), "");
    let own: Vec<Named<'a>> = cluster
        .authentications
        .range(first..)
        .take_while(|(name, _)| name.namespace == pod.name.namespace)
        .collect();
    let selected = |a: &Authentication| a.pods.as_ref().is_some_and(|s| s.matches(&pod.labels));
    let mesh = ObjectName::new(MESH_NAMESPACE, "default");
    [
        own.iter().copied().filter(|(_, a)| selected(a)).collect(),
        own.iter()
            .copied()
            .filter(|(_, a)| a.pods.is_none())
            .collect(),
        cluster
            .authentications
            .get_key_value(&mesh)
            .filter(|(_, a)| a.pods.is_none())
            .into_iter()
            .collect(),
    ]
}

/// The modes of a pod.
pub(crate) fn modes(cluster: &ClusterSnapshot, pod: &Pod) -> Modes {
    let ranks = ranks(cluster, pod);
    let mtls = strictest(&ranks, |a| a.mtls).unwrap_or_default();
    let all_ports: BTreeSet<u16> = ranks
        .iter()
        .flatten()
        .flat_map(|(_, a)| a.ports.keys().copied())
        .collect();
    // An object's mode of a port is its override, or else its general mode: a more specific general
    // mode beats a less specific override.
    let of_port = |port: u16| strictest(&ranks, |a| a.ports.get(&port).copied().or(a.mtls));
    let ports = all_ports
        .into_iter()
        .map(|port| (port, of_port(port).unwrap_or_default()))
        .filter(|(_, mode)| *mode != mtls)
        .collect();
    Modes {
        mtls,
        ports,
        outbound: strictest(&ranks, |a| a.outbound).unwrap_or_default(),
        udp: strictest(&ranks, |a| a.udp).unwrap_or_default(),
    }
}

/// The strictest value of the first rank that sets a field.
fn strictest<T: Ord>(
    ranks: &[Vec<Named<'_>>],
    field: impl Fn(&Authentication) -> Option<T>,
) -> Option<T> {
    ranks
        .iter()
        .find_map(|rank| rank.iter().filter_map(|(_, a)| field(a)).max())
}

/// Rejects objects of one rank with different settings for one pod.
pub(crate) fn conflicts(cluster: &ClusterSnapshot, pod: &Pod, rejections: &mut Vec<Rejection>) {
    for rank in ranks(cluster, pod) {
        let differs = |field: &dyn Fn(&Authentication) -> Option<u8>| {
            let said: BTreeSet<u8> = rank.iter().filter_map(|(_, a)| field(a)).collect();
            said.len() > 1
        };
        let ports: BTreeSet<u16> = rank
            .iter()
            .flat_map(|(_, a)| a.ports.keys().copied())
            .collect();
        let port = |p: u16| {
            move |a: &Authentication| a.ports.get(&p).or(a.mtls.as_ref()).map(|m| *m as u8)
        };
        let fields = [
            ("spec.mtls", differs(&|a| a.mtls.map(|m| m as u8))),
            ("spec.ports", ports.iter().any(|p| differs(&port(*p)))),
            ("spec.outbound", differs(&|a| a.outbound.map(|m| m as u8))),
            ("spec.udp", differs(&|a| a.udp.map(|m| m as u8))),
        ];
        for (field, _) in fields.iter().filter(|(_, differs)| *differs) {
            let names: Vec<String> = rank.iter().map(|(name, _)| name.to_string()).collect();
            for (name, _) in &rank {
                rejections.push(Rejection {
                    object: ObjectRef::new("MeshAuthentication", &*name.namespace, &*name.name),
                    field: (*field).to_owned(),
                    why: format!(
                        "{} select the same pods with different settings",
                        names.join(" and ")
                    ),
                    consequence: "the strictest setting applies".to_owned(),
                });
            }
        }
    }
}
