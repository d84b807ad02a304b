// SPDX-License-Identifier: Apache-2.0
//! Parses EndpointSlices.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as discovery;
use mesh_plan::cluster::{ObjectName, ServiceEndpoint, Transport};
use serde::{Deserialize, Serialize};

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, typed};
use super::validate::{address, port, transport};

/// A part of the endpoints of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ParsedSlice {
    pub(super) service: ObjectName,
    pub(super) endpoints: Vec<ServiceEndpoint>,
}

struct Port {
    name: String,
    transport: Transport,
    port: u16,
}

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let read: discovery::EndpointSlice = typed(object.value, issues)?;
    let service = object.labels().remove("kubernetes.io/service-name")?;
    let is_v4 = match read.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        // FQDN slices are deprecated, and kube-proxy ignores them.
        "FQDN" => return None,
        other => {
            issues.reject(
                "addressType",
                format!("unsupported value {other:?}: must be IPv4, IPv6 or FQDN"),
            );
            return None;
        }
    };
    let ports = ports(&read, issues);
    let mut endpoints = Vec::new();
    for (i, endpoint) in read.endpoints.iter().enumerate() {
        let Some(ip) = endpoint_address(i, endpoint, is_v4, issues) else {
            continue;
        };
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let ready = conditions.ready.unwrap_or(true);
        for port in &ports {
            endpoints.push(ServiceEndpoint {
                port_name: port.name.clone(),
                transport: port.transport,
                address: ip,
                port: port.port,
                node: endpoint.node_name.clone(),
                ready,
                serving: conditions.serving.unwrap_or(ready),
                terminating: conditions.terminating.unwrap_or(false),
            });
        }
    }
    Some(ParsedObject::Slice(Box::new(ParsedSlice {
        service: ObjectName::new(object.namespace(), service),
        endpoints,
    })))
}

pub(super) fn fallback(_: &RawObject<'_>) -> Fallback {
    Fallback::nothing("its endpoints are ignored")
}

fn ports(read: &discovery::EndpointSlice, issues: &mut Issues) -> Vec<Port> {
    let mut ports = Vec::new();
    for (i, declared) in read.ports.iter().flatten().enumerate() {
        // A port without a number belongs to no service port.
        let Some(number) = declared.port else {
            continue;
        };
        let path = format!("ports[{i}]");
        let number = issues.check(&format!("{path}.port"), port(number.into()));
        let protocol = issues.check(
            &format!("{path}.protocol"),
            transport(declared.protocol.as_deref()),
        );
        if let (Some(port), Some(transport)) = (number, protocol) {
            ports.push(Port {
                name: declared.name.clone().unwrap_or_default(),
                transport,
                port,
            });
        }
    }
    ports
}

/// The first address of an endpoint. The API defines no meaning for further addresses, and kube-proxy
/// ignores them.
fn endpoint_address(
    i: usize,
    endpoint: &discovery::Endpoint,
    is_v4: bool,
    issues: &mut Issues,
) -> Option<IpAddr> {
    let field = format!("endpoints[{i}].addresses");
    let Some(first) = endpoint.addresses.first() else {
        issues.reject(field, "must have at least one address");
        return None;
    };
    let ip = issues.check(&field, address(first))?;
    if ip.is_ipv4() != is_v4 {
        issues.reject(field, format!("{ip} does not match addressType"));
        return None;
    }
    Some(ip)
}
