// SPDX-License-Identifier: Apache-2.0
//! Pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use mesh_plan::cluster::{Labels, ObjectName, Pod, Transport};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Fact;
use super::namespace::{check_enrolment, enrol};
use super::object::{Held, Issues, Subject, typed};
use super::validate::{address, port, transport};

/// The annotation that names a pod's network namespace file.
const NETNS: &str = "mesh.rs/netns";

/// The annotation that makes a pod the mirror of a static one: its value is the UID that the kubelet
/// gave that, and its cgroups (a hash of the manifest, 32 hex digits, unless that names a UID). The
/// API server lets nobody change it, and no kubelet runs a pod that has it for itself.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod, and what only services need of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodFact {
    pub(super) pod: Arc<Pod>,
    /// `status.podIPs`: for hostNetwork pods, those of the node. Only without a control plane.
    pub(super) served_at: Box<[IpAddr]>,
}

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    // The addresses of pods that ended are reused: nothing else in them matters.
    if matches!(phase(subject), Some("Succeeded" | "Failed")) {
        return None;
    }
    let read: core::Pod = typed(subject.value, issues)?;
    let spec = read.spec.unwrap_or_default();
    let status = read.status.unwrap_or_default();
    let labels = subject.labels();
    check_enrolment(&labels, &["enabled", "disabled"], issues);
    let host_network = spec.host_network.unwrap_or(false);
    let served_at = addresses(&status, issues);
    let is_required = subject.standalone && !host_network && phase(subject) != Some("Pending");
    if is_required && status.pod_ip.is_none() && status.pod_ips.is_none() {
        issues.reject(
            "status.podIPs",
            "is missing: without a control plane the object must say which addresses the pod has",
        );
    }
    let name = ObjectName::new(subject.namespace(), &*subject.head.object.name);
    let pod = Pod {
        uid: uid(subject),
        service_account: spec
            .service_account_name
            .as_ref()
            .filter(|name| !name.is_empty())
            .cloned()
            .unwrap_or_else(|| "default".to_owned()),
        node: spec.node_name.clone().unwrap_or_default(),
        addresses: if host_network {
            Box::default()
        } else {
            served_at.clone()
        },
        host_network,
        named_ports: named_ports(&spec, issues).into(),
        workload: workload(read.metadata.owner_references.as_deref(), &labels, &name),
        ready: is_ready(&status),
        terminating: read.metadata.deletion_timestamp.is_some(),
        netns_path: subject
            .standalone
            .then(|| subject.annotation(NETNS))
            .flatten(),
        static_uid: subject.annotation(MIRROR),
        labels: labels.into(),
        name,
    };
    Some(Fact::Pod(Box::new(PodFact {
        pod: Arc::new(pod),
        served_at: if subject.standalone {
            served_at
        } else {
            Box::default()
        },
    })))
}

/// A pod whose only fault is its enrolment label is enrolled; any other is unknown.
pub(super) fn rejected(subject: &Subject<'_>) -> Held {
    let mut value = subject.value.clone();
    if let Some(Value::Object(labels)) = value.pointer_mut("/metadata/labels") {
        let mut enrolled = Labels::new();
        enrol(&mut enrolled);
        labels.extend(enrolled.into_iter().map(|(k, v)| (k, Value::from(v))));
    }
    let mut issues = Issues::default();
    let fact = parse(
        &Subject {
            value: &value,
            ..*subject
        },
        &mut issues,
    );
    if issues.problems.is_empty() {
        Held {
            fact,
            consequence: "it counts as enabled".to_owned(),
        }
    } else {
        Held::nothing("the pod is not known: its address counts as unknown, nothing is sent for it")
    }
}

fn phase<'a>(subject: &Subject<'a>) -> Option<&'a str> {
    subject
        .value
        .get("status")
        .and_then(|status| status.get("phase"))
        .and_then(Value::as_str)
}

/// Without one (manifests written by hand), the name: a namespace's name has no '.'.
fn uid(subject: &Subject<'_>) -> Arc<str> {
    if subject.head.uid.is_empty() {
        format!("{}.{}", subject.namespace(), subject.head.object.name).into()
    } else {
        subject.head.uid.as_str().into()
    }
}

fn addresses(status: &core::PodStatus, issues: &mut Issues) -> Box<[IpAddr]> {
    let listed: Vec<&str> = match status.pod_ips.as_deref() {
        Some(ips) if !ips.is_empty() => ips.iter().map(|ip| ip.ip.as_str()).collect(),
        _ => status.pod_ip.iter().map(String::as_str).collect(),
    };
    let mut found = Vec::new();
    for (i, text) in listed
        .into_iter()
        .filter(|text| !text.is_empty())
        .enumerate()
    {
        let field = format!("status.podIPs[{i}].ip");
        let Some(ip) = issues.check(&field, address(text)) else {
            continue;
        };
        if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
            issues.reject(&field, format!("{ip} cannot be a pod's address"));
        }
        if found
            .iter()
            .any(|other: &IpAddr| other.is_ipv4() == ip.is_ipv4())
        {
            issues.reject(
                &field,
                "is the second address of its family; a pod has one of each",
            );
        }
        found.push(ip);
    }
    found.sort_unstable();
    found.into()
}

/// Ports of containers and of sidecars (init containers that keep running). The first of a name
/// wins, as in kube-proxy.
fn named_ports(spec: &core::PodSpec, issues: &mut Issues) -> BTreeMap<(String, Transport), u16> {
    let mut named = BTreeMap::new();
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let lists = [("containers", &*spec.containers), ("initContainers", init)];
    for (list, containers) in lists {
        for (c, container) in containers.iter().enumerate() {
            let keeps_running = container.restart_policy.as_deref() == Some("Always");
            if list == "initContainers" && !keeps_running {
                continue;
            }
            for (p, declared) in container.ports.iter().flatten().enumerate() {
                let path = format!("spec.{list}[{c}].ports[{p}]");
                let number = issues.check(
                    &format!("{path}.containerPort"),
                    port(declared.container_port.into()),
                );
                let protocol = issues.check(
                    &format!("{path}.protocol"),
                    transport(declared.protocol.as_deref()),
                );
                if let (Some(name), Some(number), Some(protocol)) =
                    (&declared.name, number, protocol)
                {
                    named.entry((name.clone(), protocol)).or_insert(number);
                }
            }
        }
    }
    named
}

/// The owner that people know: a Deployment rather than its ReplicaSet. Without an owner, the name
/// that the pod's label gives it, or its own.
fn workload(
    owners: Option<&[OwnerReference]>,
    labels: &Labels,
    name: &ObjectName,
) -> (String, String) {
    let controller = owners
        .unwrap_or_default()
        .iter()
        .find(|owner| owner.controller == Some(true));
    match controller {
        Some(owner) if owner.kind == "ReplicaSet" => {
            let hash = labels.get("pod-template-hash");
            let deployment =
                hash.and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'));
            match deployment {
                Some(deployment) => ("Deployment".to_owned(), deployment.to_owned()),
                None => ("ReplicaSet".to_owned(), owner.name.clone()),
            }
        }
        // Static pods belong to their node.
        Some(owner) if owner.kind != "Node" => (owner.kind.clone(), owner.name.clone()),
        _ => {
            let label = labels.get("app.kubernetes.io/name");
            let known_as = label.filter(|label| !label.is_empty());
            ("Pod".to_owned(), known_as.unwrap_or(&name.name).clone())
        }
    }
}

/// Missing phase and conditions count as Running and Ready.
fn is_ready(status: &core::PodStatus) -> bool {
    let running = status
        .phase
        .as_deref()
        .is_none_or(|phase| phase == "Running");
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let ready = conditions
        .iter()
        .find(|condition| condition.type_ == "Ready");
    running && ready.is_none_or(|condition| condition.status == "True")
}
