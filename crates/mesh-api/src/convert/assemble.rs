// SPDX-License-Identifier: Apache-2.0
//! Assembles parsed objects to a cluster snapshot: endpoints of services, readiness of pods, and
//! namespaces that have no Namespace object.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use mesh_plan::cluster::{
    Authentication, ClusterSnapshot, Namespace, Node, ObjectName, ObjectRef, Rejection, Service,
    ServiceEndpoint,
};

use super::mesh_node::NodeReport;
use super::pod::ParsedPod;
use super::service::{ParsedService, Target};
use super::{Options, Outcome, ParsedObject};

/// Whether a service is the one of the API server.
pub(super) fn is_api_server(service: &ObjectName) -> bool {
    (&*service.namespace, &*service.name) == ("default", "kubernetes")
}

/// Assembles the snapshot of all objects.
pub(super) fn assemble<'f>(
    objects: impl IntoIterator<Item = (&'f ObjectRef, &'f ParsedObject)>,
    options: Options,
    outcome: &mut Outcome,
) {
    let mut cluster = ClusterSnapshot::default();
    let mut pods: BTreeMap<&str, &ParsedPod> = BTreeMap::new();
    let mut services: BTreeMap<ObjectName, &ParsedService> = BTreeMap::new();
    let mut slices: BTreeMap<&ObjectName, Vec<&[ServiceEndpoint]>> = BTreeMap::new();
    let mut reports: BTreeMap<&str, &NodeReport> = BTreeMap::new();
    for (object, parsed) in objects {
        let name = || ObjectName::new(&*object.namespace, &*object.name);
        match parsed {
            ParsedObject::Namespace(namespace) => {
                cluster
                    .namespaces
                    .insert(object.name.clone(), Namespace::clone(namespace));
            }
            ParsedObject::Node(node) => {
                let node = Node::clone(node);
                cluster.nodes.insert(object.name.clone(), node);
            }
            ParsedObject::Pod(pod) => add_pod(pod, object, &mut pods, outcome),
            ParsedObject::Service(service) => {
                services.insert(name(), service);
            }
            ParsedObject::Slice(slice) => slices
                .entry(&slice.service)
                .or_default()
                .push(&slice.endpoints),
            ParsedObject::Policy(policy) => {
                cluster.policies.insert(object.clone(), Arc::clone(policy));
            }
            ParsedObject::Authentication(authentication) => {
                let authentication = Authentication::clone(authentication);
                cluster.authentications.insert(name(), authentication);
            }
            ParsedObject::Report(report) => {
                reports.insert(&object.name, report);
            }
        }
    }
    for (name, parsed) in services {
        let endpoints = match slices.remove(&name) {
            Some(slices) => slices.concat(),
            None if options.standalone => selected(&name, parsed, &pods),
            None => Vec::new(),
        };
        let service = with(parsed, endpoints);
        if is_api_server(&name) {
            let endpoints = service.endpoints.iter();
            cluster.api_servers = endpoints.map(|endpoint| endpoint.address).collect();
        }
        cluster.services.insert(name, Arc::new(service));
    }
    cluster.ready = (!options.standalone).then(|| ready(&pods, &cluster, &reports).into());
    cluster.pods = pods
        .into_values()
        .map(|parsed| (Arc::clone(&parsed.pod.uid), Arc::clone(&parsed.pod)))
        .collect();
    name_namespaces(&mut cluster);
    outcome.cluster = cluster;
}

/// A service with its endpoints, sorted.
pub(super) fn with(parsed: &ParsedService, mut endpoints: Vec<ServiceEndpoint>) -> Service {
    endpoints.sort();
    endpoints.dedup();
    let mut service = parsed.service.clone();
    service.endpoints = endpoints;
    service.ports.sort();
    service
}

fn add_pod<'f>(
    parsed: &'f ParsedPod,
    object: &ObjectRef,
    pods: &mut BTreeMap<&'f str, &'f ParsedPod>,
    outcome: &mut Outcome,
) {
    if let Some(first) = pods.get(&*parsed.pod.uid) {
        outcome.rejections.push(Rejection {
            object: object.clone(),
            field: "metadata.uid".to_owned(),
            why: format!("duplicate UID: pod {} has the same", first.pod.name),
            consequence: "the pod is ignored".to_owned(),
        });
    } else {
        pods.insert(&parsed.pod.uid, parsed);
    }
}

/// The endpoints of every pod that the service selects, as the EndpointSlice controller would create
/// them.
fn selected(
    name: &ObjectName,
    parsed: &ParsedService,
    pods: &BTreeMap<&str, &ParsedPod>,
) -> Vec<ServiceEndpoint> {
    let Some(selector) = &parsed.selector else {
        return Vec::new();
    };
    let mut endpoints = Vec::new();
    for ParsedPod { pod, served_at } in pods.values() {
        let selects = pod.name.namespace == name.namespace
            && selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v));
        if !selects {
            continue;
        }
        for (port, target) in parsed.service.ports.iter().zip(&parsed.targets) {
            let number = match target {
                Target::Number(number) => Some(*number),
                Target::Named(name) => pod
                    .named_ports
                    .get(&(name.clone(), port.transport))
                    .copied(),
            };
            let Some(number) = number else { continue };
            let (v4, v6) = parsed.families;
            let served = served_at
                .iter()
                .filter(|ip| if ip.is_ipv4() { v4 } else { v6 });
            endpoints.extend(served.map(|address| ServiceEndpoint {
                port_name: port.name.clone(),
                transport: port.transport,
                address: *address,
                port: number,
                node: Some(pod.node.clone()).filter(|node| !node.is_empty()),
                ready: parsed.service.publish_not_ready || (pod.ready && !pod.terminating),
                serving: pod.ready,
                terminating: pod.terminating,
            }));
        }
    }
    endpoints
}

/// The pods whose own node reports that it accepts tunnels for them.
fn ready(
    pods: &BTreeMap<&str, &ParsedPod>,
    cluster: &ClusterSnapshot,
    reports: &BTreeMap<&str, &NodeReport>,
) -> BTreeSet<Arc<str>> {
    let report_of = |namespace: &str, node: &str| {
        let report = *reports.get(node)?;
        let all = accepts_all(report, cluster.namespaces.get(namespace));
        Some((report, all))
    };
    // Many pods have the same namespace and node.
    let mut known: HashMap<(&str, &str), Option<(&NodeReport, bool)>> = HashMap::new();
    let mut ready = BTreeSet::new();
    for parsed in pods.values() {
        let (namespace, node) = (&*parsed.pod.name.namespace, &*parsed.pod.node);
        let report = known.entry((namespace, node));
        let report = report.or_insert_with(|| report_of(namespace, node));
        if report.is_some_and(|(report, all)| all || report.pods.contains(&*parsed.pod.uid)) {
            ready.insert(Arc::clone(&parsed.pod.uid));
        }
    }
    ready
}

/// Whether a node accepts tunnels for all of its pods in a namespace.
pub(super) fn accepts_all(report: &NodeReport, namespace: Option<&Namespace>) -> bool {
    namespace.is_some_and(|namespace| report.namespaces.contains(&namespace.uid))
}

/// Adds a namespace with only its name label for pods whose Namespace object is missing.
fn name_namespaces(cluster: &mut ClusterSnapshot) {
    let pods = cluster.pods.values();
    let names: HashSet<&String> = pods.map(|pod| &pod.name.namespace).collect();
    for name in names {
        if !cluster.namespaces.contains_key(name) {
            let label = ("kubernetes.io/metadata.name".to_owned(), name.clone());
            let namespace = Namespace {
                uid: String::new(),
                labels: [label].into(),
            };
            cluster.namespaces.insert(name.clone(), namespace);
        }
    }
}
