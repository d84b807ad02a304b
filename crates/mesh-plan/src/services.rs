// SPDX-License-Identifier: Apache-2.0
//! Compiles services into the content of the maps `SERVICES` and `BACKENDS` of one node.
//!
//! The client is always a pod of this node (or the node itself), so `internalTrafficPolicy: Local`
//! means this node's endpoints. `externalTrafficPolicy: Local` is about traffic from outside the
//! cluster: as with kube-proxy, traffic from inside reaches every endpoint through external
//! addresses and this node's ports, and only the endpoints of another node through that node's
//! ports. SCTP is not translated, because no socket hook sees it.
//!
//! Only cluster IPs are virtual as a whole, with ports that no service defines refused: the author of a
//! Service chooses its external addresses, and must not cut others off from the rest of such an address.
//! If the maps are too small, cluster IPs come first, then node ports, and external addresses last. Of
//! each, the namespaces that need the least come first, so that a tenant that needs much runs out alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::service::{BackendKey, BackendListId, Service as Entry, ServiceKey};
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::cluster::{
    ClusterSnapshot, ObjectName, ObjectRef, Pod, Rejection, Service, ServiceEndpoint, ServicePort,
    Transport,
};
use crate::compile::Options;
use crate::shared::Shared;

/// The services of a cluster as one node serves them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Services {
    /// `SERVICES`.
    pub(crate) services: Shared<BTreeMap<ServiceKey, Entry>>,
    /// `BACKENDS`.
    pub(crate) backends: Shared<BTreeMap<BackendKey, Endpoint>>,
    /// Names of virtual endpoints and of headless services' endpoints.
    pub(crate) names: Shared<BTreeMap<ServiceKey, ObjectName>>,
}

/// One virtual endpoint and its backends.
struct Claim<'a> {
    name: &'a ObjectName,
    key: ServiceKey,
    backends: Vec<Endpoint>,
    field: &'static str,
}

/// The endpoints to use.
#[derive(Clone, Copy)]
enum Scope<'a> {
    All,
    Node(&'a str),
}

/// Compiles every service.
pub(crate) fn services(
    cluster: &ClusterSnapshot,
    node: &str,
    options: &Options,
    rejections: &mut Vec<Rejection>,
) -> Services {
    let mut builder = Builder {
        out: Services::default(),
        lists: BTreeMap::new(),
        options,
        rejections,
        left_out: BTreeMap::new(),
        refused: BTreeMap::new(),
        markers_left_out: 0,
    };
    builder.cluster_ips(cluster, node);
    builder.node_ports(cluster, node, true);
    builder.node_ports(cluster, node, false);
    builder.external_ips(cluster);
    builder.headless(cluster);
    builder.finish()
}

/// The addresses that cannot be external addresses of a service, besides special ones.
struct Reserved<'a> {
    pods: BTreeMap<IpAddr, &'a ObjectName>,
    nodes: BTreeSet<IpAddr>,
    servers: &'a BTreeSet<IpAddr>,
}

impl<'a> Reserved<'a> {
    fn of(cluster: &'a ClusterSnapshot) -> Self {
        let pods = cluster.pods.values().filter(|pod| !pod.host_network);
        let of_pod = |pod: &'a Arc<Pod>| pod.addresses.iter().map(move |ip| (*ip, &pod.name));
        let nodes = cluster.nodes.values().flat_map(|node| &node.addresses);
        Self {
            pods: pods.flat_map(of_pod).collect(),
            nodes: nodes.copied().collect(),
            servers: &cluster.api_servers,
        }
    }

    /// Returns why an address cannot be an external address.
    fn why(&self, ip: IpAddr) -> Option<String> {
        if let Some(pod) = self.pods.get(&ip) {
            return Some(format!("{ip} is the address of Pod {pod}"));
        }
        if self.servers.contains(&ip) {
            return Some(format!("{ip} is an address of the API server"));
        }
        if self.nodes.contains(&ip) {
            return Some(format!("{ip} is an address of a node"));
        }
        let is_link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        let is_special =
            ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_link_local;
        is_special
            .then(|| format!("{ip} is a loopback, link-local, multicast or unspecified address"))
    }
}

fn claims_at<'a>(
    name: &'a ObjectName,
    service: &'a Service,
    ip: IpAddr,
    scope: Scope<'a>,
    field: &'static str,
) -> impl Iterator<Item = Claim<'a>> {
    service.ports.iter().filter_map(move |port| {
        Some(Claim {
            name,
            key: key(ip, port.port, port.transport)?,
            backends: backends(service, port, ip.is_ipv4(), scope),
            field,
        })
    })
}

fn key(ip: IpAddr, port: u16, transport: Transport) -> Option<ServiceKey> {
    let protocol = match transport {
        Transport::Tcp => Protocol::TCP,
        Transport::Udp => Protocol::UDP,
        Transport::Sctp => return None,
    };
    let at = Endpoint::new(Addr::from(ip), Port::new(port));
    Some(ServiceKey::new(at, protocol))
}

/// The endpoints that accept traffic: the ready ones; if none is ready, those that still serve
/// while terminating (KEP-1669).
fn backends(service: &Service, port: &ServicePort, v4: bool, scope: Scope<'_>) -> Vec<Endpoint> {
    let of_port = |e: &&ServiceEndpoint| {
        e.port_name == port.name && e.transport == port.transport && e.address.is_ipv4() == v4
    };
    let in_scope = |e: &&ServiceEndpoint| match scope {
        Scope::All => true,
        Scope::Node(node) => e.node.as_deref() == Some(node),
    };
    let candidates: Vec<&ServiceEndpoint> = service
        .endpoints
        .iter()
        .filter(of_port)
        .filter(in_scope)
        .collect();
    let chosen = |test: &dyn Fn(&ServiceEndpoint) -> bool| -> Vec<Endpoint> {
        let at = |e: &&ServiceEndpoint| Endpoint::new(Addr::from(e.address), Port::new(e.port));
        let set: BTreeSet<Endpoint> = candidates.iter().filter(|e| test(e)).map(at).collect();
        set.into_iter().collect()
    };
    let ready = chosen(&|e| e.ready || service.publish_not_ready);
    if ready.is_empty() {
        chosen(&|e| e.serving && e.terminating)
    } else {
        ready
    }
}

/// The kinds of reasons to refuse an address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Refusal {
    /// Another service has it.
    Taken,
    /// No service may have the address.
    NotAllowed,
}

struct Builder<'a> {
    out: Services,
    lists: BTreeMap<BackendListId, Vec<Endpoint>>,
    options: &'a Options,
    rejections: &'a mut Vec<Rejection>,
    /// Number of ports that do not fit, by service.
    left_out: BTreeMap<ObjectName, usize>,
    /// The refused addresses and ports of each field of a service: the reason and consequence of the first one, and
    /// the number of the others.
    refused: BTreeMap<(ObjectName, &'static str, Refusal), (String, String, usize)>,
    /// Number of cluster IPs whose marker does not fit.
    markers_left_out: usize,
}

impl Builder<'_> {
    /// The entries of `SERVICES` that are free.
    fn free(&self) -> usize {
        let limit = self.options.limits.services;
        limit.saturating_sub(self.out.services.len())
    }

    /// The services in the order in which they get entries; `size` is the number that each needs.
    fn in_order<'a>(
        &self,
        cluster: &'a ClusterSnapshot,
        size: impl Fn(&Service) -> usize,
    ) -> Vec<(&'a ObjectName, &'a Service)> {
        let all = cluster.services.iter();
        let mut all: Vec<(&ObjectName, &Service)> = all.map(|(name, it)| (name, &**it)).collect();
        let mut namespaces: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, service) in &all {
            *namespaces.entry(&name.namespace).or_default() += size(service);
        }
        if namespaces.values().sum::<usize>() > self.free() {
            all.sort_by_key(|(name, service)| {
                (
                    namespaces[&*name.namespace],
                    &name.namespace,
                    size(service),
                    *name,
                )
            });
        }
        all
    }

    fn refuse(
        &mut self,
        name: &ObjectName,
        (field, kind): (&'static str, Refusal),
        why: impl FnOnce() -> (String, String),
    ) {
        let key = (name.clone(), field, kind);
        match self.refused.get_mut(&key) {
            Some((.., more)) => *more += 1,
            None => {
                let (why, consequence) = why();
                self.refused.insert(key, (why, consequence, 0));
            }
        }
    }

    fn leave_out(&mut self, name: &ObjectName, ports: usize) {
        *self.left_out.entry(name.clone()).or_default() += ports;
    }

    /// Adds the cluster IPs, which the API server assigns, with a marker for each.
    fn cluster_ips(&mut self, cluster: &ClusterSnapshot, node: &str) {
        let size = |service: &Service| service.cluster_ips.len() * (service.ports.len() + 1);
        for (name, service) in self.in_order(cluster, size) {
            let scope = if service.internal_local {
                Scope::Node(node)
            } else {
                Scope::All
            };
            for ip in &service.cluster_ips {
                for claim in claims_at(name, service, *ip, scope, "spec.clusterIPs") {
                    self.add(claim);
                }
                if self.free() == 0 {
                    self.markers_left_out += 1;
                    continue;
                }
                let marker = ServiceKey::marker(Addr::from(*ip));
                self.out.services.insert(marker, Entry::default());
            }
        }
    }

    /// Adds the external addresses, which the author of a Service chooses.
    fn external_ips(&mut self, cluster: &ClusterSnapshot) {
        const FIELD: &str = "spec.externalIPs";
        if cluster
            .services
            .values()
            .all(|service| service.external_ips.is_empty())
        {
            return;
        }
        let reserved = Reserved::of(cluster);
        let size = |service: &Service| service.external_ips.len() * service.ports.len();
        for (name, service) in self.in_order(cluster, size) {
            for ip in &service.external_ips {
                if let Some(why) = reserved.why(*ip) {
                    self.refuse(name, (FIELD, Refusal::NotAllowed), || {
                        (why, "the external IP is ignored".to_owned())
                    });
                } else if self.free() == 0 {
                    self.leave_out(name, service.ports.len());
                } else {
                    for claim in claims_at(name, service, *ip, Scope::All, FIELD) {
                        self.add(claim);
                    }
                }
            }
        }
    }

    fn add(&mut self, claim: Claim<'_>) {
        if let Some(owner) = self.out.names.get(&claim.key).cloned() {
            if owner != *claim.name {
                self.refuse(claim.name, (claim.field, Refusal::Taken), || {
                    let (addr, port) = (claim.key.addr, claim.key.port.get());
                    let why = format!("{addr} port {port} is already used by Service {owner}");
                    (why, format!("connections to it go to Service {owner}"))
                });
            }
            return;
        }
        let limits = &self.options.limits;
        let list_is_new = !self.lists.contains_key(&self.list_id(&claim.backends));
        let needed = if list_is_new { claim.backends.len() } else { 0 };
        if self.out.services.len() >= limits.services
            || self.out.backends.len() + needed > limits.backends
        {
            self.leave_out(claim.name, 1);
            return;
        }
        let entry = self.list(&claim);
        self.out.services.insert(claim.key, entry);
        self.out.names.insert(claim.key, claim.name.clone());
    }

    fn list_id(&self, backends: &[Endpoint]) -> BackendListId {
        if backends.is_empty() {
            return BackendListId(0);
        }
        BackendListId(self.options.ids.id("backends", 1, &backends))
    }

    fn list(&mut self, claim: &Claim<'_>) -> Entry {
        let id = self.list_id(&claim.backends);
        let none = Entry {
            backends: BackendListId(0),
            count: 0,
            flags: 0,
        };
        let Ok(count) = u32::try_from(claim.backends.len()) else {
            return none;
        };
        if let Some(known) = self.lists.get(&id) {
            if *known == claim.backends {
                return Entry {
                    backends: id,
                    count,
                    flags: 0,
                };
            }
            self.collision(claim.name, id);
            return none;
        }
        if count == 0 {
            return none;
        }
        self.lists.insert(id, claim.backends.clone());
        for (index, backend) in (0..count).zip(&claim.backends) {
            let key = BackendKey {
                list: id,
                index,
                pad: 0,
            };
            self.out.backends.insert(key, *backend);
        }
        Entry {
            backends: id,
            count,
            flags: 0,
        }
    }

    /// Rejects two lists with one id: neither is used.
    fn collision(&mut self, name: &ObjectName, id: BackendListId) {
        self.out.backends.retain(|key, _| key.list != id);
        self.lists.insert(id, Vec::new());
        for service in self.out.services.values_mut() {
            if service.backends == id {
                *service = Entry::default();
            }
        }
        self.rejections.push(Rejection {
            object: ObjectRef::new("Service", &*name.namespace, &*name.name),
            field: "spec.selector".to_owned(),
            why: format!(
                "hash collision: two endpoint lists have the hash {:#x}",
                id.0
            ),
            consequence: "connections to both services are refused until an endpoint changes"
                .to_owned(),
        });
    }

    /// Adds the node ports of this node, or of all others.
    fn node_ports(&mut self, cluster: &ClusterSnapshot, node: &str, own: bool) {
        let nodes = cluster.nodes.iter();
        let nodes = nodes.filter(|(at, _)| (*at == node) == own);
        let addresses: usize = nodes.map(|(_, node)| node.addresses.len()).sum();
        let size = |service: &Service| {
            let ports = service.ports.iter().filter(|port| port.node_port.is_some());
            ports.count() * addresses
        };
        for (name, service) in self.in_order(cluster, size) {
            let ports = service.ports.iter();
            let ports: Vec<_> = ports.filter_map(|p| Some((p, p.node_port?))).collect();
            if ports.is_empty() {
                continue;
            }
            if self.free() == 0 {
                self.leave_out(name, size(service));
                continue;
            }
            for (at, node) in cluster.nodes.iter().filter(|(at, _)| (*at == node) == own) {
                let scope = if service.external_local && !own {
                    Scope::Node(at)
                } else {
                    Scope::All
                };
                for ip in &node.addresses {
                    for (port, number) in &ports {
                        let Some(key) = key(*ip, *number, port.transport) else {
                            continue;
                        };
                        self.add(Claim {
                            name,
                            key,
                            backends: backends(service, port, ip.is_ipv4(), scope),
                            field: "spec.ports.nodePort",
                        });
                    }
                }
            }
        }
    }

    /// Adds headless services, which only have names.
    fn headless(&mut self, cluster: &ClusterSnapshot) {
        for (name, service) in cluster.services.iter().filter(|(_, s)| s.headless) {
            for endpoint in &service.endpoints {
                if let Some(key) = key(endpoint.address, endpoint.port, endpoint.transport) {
                    self.out.names.entry(key).or_insert_with(|| name.clone());
                }
            }
        }
    }

    fn finish(mut self) -> Services {
        for ((name, field, _), (why, consequence, more)) in std::mem::take(&mut self.refused) {
            let why = match more {
                0 => why,
                _ => format!(
                    "{why}, and {more} more of its addresses and ports are in use or not allowed"
                ),
            };
            self.rejections.push(Rejection {
                object: ObjectRef::new("Service", &*name.namespace, &*name.name),
                field: field.to_owned(),
                why,
                consequence,
            });
        }
        let limits = &self.options.limits;
        for (name, ports) in std::mem::take(&mut self.left_out) {
            self.rejections.push(Rejection {
                object: ObjectRef::new("Service", &*name.namespace, &*name.name),
                field: "spec.ports".to_owned(),
                why: format!(
                    "too many services: the service maps hold at most {} ports and {} \
                     endpoints, {ports} ports of this service do not fit",
                    limits.services, limits.backends
                ),
                consequence: "connections to these ports are refused or not translated".to_owned(),
            });
        }
        let missing = self.markers_left_out;
        if missing > 0 {
            self.rejections.push(Rejection {
                object: ObjectRef::new("Service", "", ""),
                field: "spec.clusterIPs".to_owned(),
                why: format!(
                    "too many services: the service map holds at most {} entries, {missing} virtual \
                     addresses do not fit",
                    limits.services
                ),
                consequence: "connections to undefined ports of these addresses time out instead of being \
                              refused"
                    .to_owned(),
            });
        }
        self.out
    }
}
