// SPDX-License-Identifier: Apache-2.0
//! Parses Pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use mesh_plan::cluster::{Labels, ObjectName, Pod, Transport};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ParsedObject;
use super::namespace::{check_enrollment, enroll};
use super::object::{Fallback, Issues, RawObject, typed};
use super::validate::{address, port, transport};

/// The annotation with the path of a pod's network namespace file.
const NETNS: &str = "mesh.rs/netns";

/// The annotation of a mirror pod. Its value is the UID that the kubelet gave to the static pod and to
/// its cgroups: the UID in the manifest, or a hash of the manifest with 32 hex digits. The API server
/// does not allow changing the annotation, and a kubelet does not run a pod that has it.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod, and the addresses that services use for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ParsedPod {
    pub(super) pod: Arc<Pod>,
    /// `status.podIPs`, which for a hostNetwork pod are the addresses of the node. Empty if there is a
    /// control plane.
    pub(super) served_at: Box<[IpAddr]>,
}

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    // The addresses of a completed pod can be reused, and nothing else of it matters.
    if matches!(phase(object), Some("Succeeded" | "Failed")) {
        return None;
    }
    let read: core::Pod = typed(object.value, issues)?;
    let spec = read.spec.unwrap_or_default();
    let status = read.status.unwrap_or_default();
    let labels = object.labels();
    check_enrollment(&labels, &["enabled", "disabled"], issues);
    let host_network = spec.host_network.unwrap_or(false);
    let served_at = addresses(&status, issues);
    let is_required = object.standalone && !host_network && phase(object) != Some("Pending");
    if is_required && status.pod_ip.is_none() && status.pod_ips.is_none() {
        issues.reject(
            "status.podIPs",
            "is required for manifests without a control plane",
        );
    }
    let name = ObjectName::new(object.namespace(), &*object.head.object.name);
    let pod = Pod {
        uid: uid(object),
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
        netns_path: object
            .standalone
            .then(|| object.annotation(NETNS))
            .flatten(),
        static_uid: object.annotation(MIRROR),
        labels: labels.into(),
        name,
    };
    Some(ParsedObject::Pod(Box::new(ParsedPod {
        pod: Arc::new(pod),
        served_at: if object.standalone {
            served_at
        } else {
            Box::default()
        },
    })))
}

/// Enrolls a pod whose only problem is its enrollment label, and ignores any other rejected pod.
pub(super) fn fallback(object: &RawObject<'_>) -> Fallback {
    let mut value = object.value.clone();
    if let Some(Value::Object(labels)) = value.pointer_mut("/metadata/labels") {
        let mut enrolled = Labels::new();
        enroll(&mut enrolled);
        labels.extend(enrolled.into_iter().map(|(k, v)| (k, Value::from(v))));
    }
    let mut issues = Issues::default();
    let parsed = parse(
        &RawObject {
            value: &value,
            ..*object
        },
        &mut issues,
    );
    if issues.problems.is_empty() {
        Fallback {
            parsed,
            consequence: "the pod is enrolled".to_owned(),
        }
    } else {
        Fallback::nothing(
            "the pod is ignored: its address has no identity, and its traffic is not redirected",
        )
    }
}

fn phase<'a>(object: &RawObject<'a>) -> Option<&'a str> {
    object
        .value
        .get("status")
        .and_then(|status| status.get("phase"))
        .and_then(Value::as_str)
}

/// The UID of a pod; without one (handwritten manifests), the namespace and name. They are unambiguous
/// because a namespace name has no '.'.
fn uid(object: &RawObject<'_>) -> Arc<str> {
    if object.head.uid.is_empty() {
        format!("{}.{}", object.namespace(), object.head.object.name).into()
    } else {
        object.head.uid.as_str().into()
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
            issues.reject(&field, format!("{ip} is not valid as a pod address"));
        }
        if found
            .iter()
            .any(|other: &IpAddr| other.is_ipv4() == ip.is_ipv4())
        {
            issues.reject(&field, "must not be a second address of the same IP family");
        }
        found.push(ip);
    }
    found.sort_unstable();
    found.into()
}

/// The named ports of containers and sidecars (init containers with restartPolicy Always). The first
/// port with a name wins, as in kube-proxy.
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

/// The kind and name of a pod's workload: the Deployment rather than its ReplicaSet. Without an owner,
/// the name from the label `app.kubernetes.io/name`, or the pod's own name.
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
        // The owner of a static pod is its node, which is not a workload.
        Some(owner) if owner.kind != "Node" => (owner.kind.clone(), owner.name.clone()),
        _ => {
            let label = labels.get("app.kubernetes.io/name");
            let known_as = label.filter(|label| !label.is_empty());
            ("Pod".to_owned(), known_as.unwrap_or(&name.name).clone())
        }
    }
}

/// Whether a pod is ready. An absent phase means Running, an absent condition means Ready.
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
