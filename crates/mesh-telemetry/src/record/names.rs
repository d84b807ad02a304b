// SPDX-License-Identifier: Apache-2.0
//! Translates numbers and addresses to names, by a plan.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::identity::IdentityId;
use mesh_common::policy::RuleId;
use mesh_common::service::ServiceKey;
use mesh_common::{Endpoint, Protocol};
use mesh_plan::cluster::Pod;
use mesh_plan::{Index, Plan};
use serde::ser::SerializeMap as _;

use crate::metrics::Group;

/// An endpoint of a connection, as records name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The pod's name; empty if the endpoint is not a pod.
    pub pod: Arc<str>,
    /// Namespace, workload and service account; for an endpoint that is not a pod, its entity.
    pub group: Arc<Group>,
}

impl serde::Serialize for Party {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("address", &self.address)?;
        map.serialize_entry("port", &self.port)?;
        if self.pod.is_empty() {
            map.serialize_entry("entity", &self.group.workload)?;
        } else {
            map.serialize_entry("pod", &*self.pod)?;
            map.serialize_entry("namespace", &self.group.namespace)?;
            map.serialize_entry("workload", &self.group.workload)?;
            map.serialize_entry("service_account", &self.group.service_account)?;
        }
        map.end()
    }
}

impl Party {
    /// The owner of an address.
    #[must_use]
    pub fn of(plan: &Index, at: Endpoint) -> Self {
        match plan.names.workloads.get(&at.addr) {
            Some(pod) => Self::pod(pod, at),
            None => Self::entity(plan, at),
        }
    }

    pub(super) fn pod(pod: &Pod, at: Endpoint) -> Self {
        Self {
            address: at.addr.into(),
            port: at.port.get(),
            pod: pod.name.name.as_str().into(),
            group: Arc::new(Group {
                namespace: pod.name.namespace.clone(),
                workload: pod.workload.1.clone(),
                service_account: pod.service_account.clone(),
            }),
        }
    }

    fn entity(plan: &Index, at: Endpoint) -> Self {
        let name = match plan.identity(&at.addr) {
            _ if at.addr.is_loopback() => "host",
            id if id.is_host() => "host",
            IdentityId::REMOTE_NODE => "remote-node",
            IdentityId::KUBE_APISERVER => "kube-apiserver",
            // An address that several pods claim, or one in a pod CIDR.
            IdentityId::UNKNOWN => "unknown",
            id if id.is_workload() => "unknown",
            _ => "world",
        };
        Self {
            address: at.addr.into(),
            port: at.port.get(),
            pod: "".into(),
            group: Arc::new(Group {
                workload: name.to_owned(),
                ..Group::default()
            }),
        }
    }
}

/// Returns the service that an application used: by its virtual endpoint, or by the destination itself
/// if the service is headless.
pub(super) fn service(
    plan: &Plan,
    virtual_endpoint: Option<Endpoint>,
    destination: Endpoint,
    protocol: Protocol,
) -> Option<String> {
    let key = ServiceKey::new(virtual_endpoint.unwrap_or(destination), protocol);
    plan.names.services.get(&key).map(ToString::to_string)
}

/// Returns a rule's name, or its number if the plan no longer has it.
pub(super) fn rule(plan: &Plan, rule: RuleId) -> Option<String> {
    match plan.names.rules.get(&rule) {
        _ if rule == RuleId::NONE => None,
        _ if rule == RuleId::NODE_LOCAL => Some("node-local".to_owned()),
        Some(name) => Some(name.to_string()),
        None => Some(format!("{:016x}", rule.0)),
    }
}
