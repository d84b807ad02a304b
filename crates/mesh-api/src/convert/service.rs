// SPDX-License-Identifier: Apache-2.0
//! Parses Services, without their endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_plan::cluster::{Labels, Service, ServicePort, Transport};
use serde::{Deserialize, Serialize};

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, typed};
use super::validate::{address, port, port_name, transport};

/// A service, and what is needed to select its endpoints without a control plane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ParsedService {
    pub(super) service: Service,
    /// `spec.selector`; `None` if the endpoints are managed by hand.
    pub(super) selector: Option<Labels>,
    /// The target port of each service port, in the same order.
    pub(super) targets: Vec<Target>,
    /// Whether the endpoints have IPv4 and IPv6 addresses.
    pub(super) families: (bool, bool),
}

/// A target port of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Target {
    Number(u16),
    Named(String),
}

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let read: core::Service = typed(object.value, issues)?;
    let spec = read.spec.unwrap_or_default();
    match spec.type_.as_deref() {
        // An ExternalName service is only a DNS name.
        Some("ExternalName") => return None,
        None | Some("ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some(other) => issues.reject("spec.type", format!("unsupported value {other:?}: must be ClusterIP, NodePort, LoadBalancer or ExternalName")),
    }
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        issues.warn(
            "spec.sessionAffinity",
            "ClientIP is not supported and is ignored",
        );
    }
    let mut service = Service {
        internal_local: is_local(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
            issues,
        ),
        external_local: is_local(
            "spec.externalTrafficPolicy",
            spec.external_traffic_policy.as_deref(),
            issues,
        ),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        ..Service::default()
    };
    cluster_ips(&spec, &mut service, issues);
    external_ips(&spec, read.status.as_ref(), &mut service, issues);
    let targets = ports(&spec, &mut service, issues);
    let families = families(&spec, &service.cluster_ips);
    Some(ParsedObject::Service(Arc::new(ParsedService {
        service,
        selector: spec.selector.filter(|selector| !selector.is_empty()),
        targets,
        families,
    })))
}

pub(super) fn fallback(_: &RawObject<'_>) -> Fallback {
    Fallback::nothing("the service is ignored: connections of enrolled pods to it fail")
}

fn is_local(field: &str, policy: Option<&str>, issues: &mut Issues) -> bool {
    match policy {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            issues.reject(
                field,
                format!("unsupported value {other:?}: must be Cluster or Local"),
            );
            false
        }
    }
}

fn cluster_ips(spec: &core::ServiceSpec, service: &mut Service, issues: &mut Issues) {
    let listed: Vec<&str> = match spec.cluster_ips.as_deref() {
        Some(ips) if !ips.is_empty() => ips.iter().map(String::as_str).collect(),
        _ => spec.cluster_ip.iter().map(String::as_str).collect(),
    };
    for (i, text) in listed.into_iter().enumerate() {
        match text {
            "None" => service.headless = true,
            "" => {}
            text => service
                .cluster_ips
                .extend(issues.check(&format!("spec.clusterIPs[{i}]"), address(text))),
        }
    }
    if service.headless && !service.cluster_ips.is_empty() {
        issues.reject("spec.clusterIPs", "must not contain an address beside None");
    }
}

fn external_ips(
    spec: &core::ServiceSpec,
    status: Option<&core::ServiceStatus>,
    service: &mut Service,
    issues: &mut Issues,
) {
    for (i, text) in spec.external_ips.iter().flatten().enumerate() {
        service
            .external_ips
            .extend(issues.check(&format!("spec.externalIPs[{i}]"), address(text)));
    }
    let ingress = status
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_deref());
    for (i, point) in ingress.unwrap_or_default().iter().enumerate() {
        // KEP-1860: traffic to a load balancer of mode Proxy must go through it.
        let is_vip = point.ip_mode.as_deref() != Some("Proxy");
        if let Some(text) = point.ip.as_deref().filter(|_| is_vip) {
            service.external_ips.extend(issues.check(
                &format!("status.loadBalancer.ingress[{i}].ip"),
                address(text),
            ));
        }
    }
}

fn ports(spec: &core::ServiceSpec, service: &mut Service, issues: &mut Issues) -> Vec<Target> {
    let listed = spec.ports.as_deref().unwrap_or_default();
    let mut names = BTreeMap::new();
    let mut targets = Vec::new();
    for (i, declared) in listed.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        let name = declared.name.clone().unwrap_or_default();
        if name.is_empty() && listed.len() > 1 {
            issues.reject(
                format!("{path}.name"),
                "is required if the service has several ports",
            );
        }
        if let Some(first) = names.insert(name.clone(), i) {
            issues.reject(
                format!("{path}.name"),
                format!("duplicate port name {name:?}: spec.ports[{first}] has the same"),
            );
        }
        let number = issues.check(&format!("{path}.port"), port(declared.port.into()));
        let protocol = issues.check(
            &format!("{path}.protocol"),
            transport(declared.protocol.as_deref()),
        );
        let node_port = declared
            .node_port
            .filter(|port| *port != 0)
            .and_then(|number| issues.check(&format!("{path}.nodePort"), port(number.into())));
        let target = target(&format!("{path}.targetPort"), declared, issues);
        if let (Some(port), Some(transport), Some(target)) = (number, protocol, target) {
            service.ports.push(ServicePort {
                name,
                transport,
                port,
                node_port,
            });
            targets.push(target);
        }
    }
    duplicates(&service.ports, issues);
    targets
}

fn target(field: &str, declared: &core::ServicePort, issues: &mut Issues) -> Option<Target> {
    match &declared.target_port {
        None | Some(IntOrString::Int(0)) => issues
            .check(field, port(declared.port.into()))
            .map(Target::Number),
        Some(IntOrString::Int(number)) => issues
            .check(field, port((*number).into()))
            .map(Target::Number),
        Some(IntOrString::String(name)) => issues
            .check(field, port_name(name))
            .map(|()| Target::Named(name.clone())),
    }
}

fn duplicates(ports: &[ServicePort], issues: &mut Issues) {
    let mut seen: BTreeSet<(Transport, u16)> = BTreeSet::new();
    for port in ports {
        if !seen.insert((port.transport, port.port)) {
            issues.reject("spec.ports", format!("duplicate port {}", port.port));
        }
    }
}

fn families(spec: &core::ServiceSpec, cluster_ips: &BTreeSet<IpAddr>) -> (bool, bool) {
    let named = spec.ip_families.as_deref().unwrap_or_default();
    if !named.is_empty() {
        let has = |family: &str| named.iter().any(|name| name == family);
        return (has("IPv4"), has("IPv6"));
    }
    if cluster_ips.is_empty() {
        return (true, true);
    }
    (
        cluster_ips.iter().any(IpAddr::is_ipv4),
        cluster_ips.iter().any(IpAddr::is_ipv6),
    )
}
