// SPDX-License-Identifier: Apache-2.0
//! Facts of single objects to the facts of the cluster: endpoints to their services, readiness to
//! pods, namespaces that nothing describes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use mesh_plan::cluster::{
    Authentication, Cluster, Namespace, Node, ObjectName, ObjectRef, Rejection, Service,
    ServiceEndpoint,
};

use super::mesh_node::NodeReport;
use super::pod::PodFact;
use super::service::{ServiceFact, Target};
use super::{Fact, Options, Outcome};

/// Whether it is the service of the API server.
pub(super) fn is_api_server(service: &ObjectName) -> bool {
    (&*service.namespace, &*service.name) == ("default", "kubernetes")
}

/// The facts of all objects together.
pub(super) fn assemble<'f>(
    facts: impl IntoIterator<Item = (&'f ObjectRef, &'f Fact)>,
    options: Options,
    outcome: &mut Outcome,
) {
    let mut cluster = Cluster::default();
    let mut pods: BTreeMap<&str, &PodFact> = BTreeMap::new();
    let mut services: BTreeMap<ObjectName, &ServiceFact> = BTreeMap::new();
    let mut slices: BTreeMap<&ObjectName, Vec<&[ServiceEndpoint]>> = BTreeMap::new();
    let mut reports: BTreeMap<&str, &NodeReport> = BTreeMap::new();
    for (object, fact) in facts {
        let name = || ObjectName::new(&*object.namespace, &*object.name);
        match fact {
            Fact::Namespace(namespace) => {
                cluster
                    .namespaces
                    .insert(object.name.clone(), Namespace::clone(namespace));
            }
            Fact::Node(node) => {
                let node = Node::clone(node);
                cluster.nodes.insert(object.name.clone(), node);
            }
            Fact::Pod(pod) => add_pod(pod, object, &mut pods, outcome),
            Fact::Service(service) => {
                services.insert(name(), service);
            }
            Fact::Slice(slice) => slices
                .entry(&slice.service)
                .or_default()
                .push(&slice.endpoints),
            Fact::Policy(policy) => {
                cluster.policies.insert(object.clone(), Arc::clone(policy));
            }
            Fact::Authentication(authentication) => {
                let authentication = Authentication::clone(authentication);
                cluster.authentications.insert(name(), authentication);
            }
            Fact::Report(report) => {
                reports.insert(&object.name, report);
            }
        }
    }
    for (name, fact) in services {
        let endpoints = match slices.remove(&name) {
            Some(slices) => slices.concat(),
            None if options.standalone => selected(&name, fact, &pods),
            None => Vec::new(),
        };
        let service = with(fact, endpoints);
        if is_api_server(&name) {
            let endpoints = service.endpoints.iter();
            cluster.api_servers = endpoints.map(|endpoint| endpoint.address).collect();
        }
        cluster.services.insert(name, Arc::new(service));
    }
    cluster.ready = (!options.standalone).then(|| ready(&pods, &cluster, &reports).into());
    cluster.pods = pods
        .into_values()
        .map(|fact| (Arc::clone(&fact.pod.uid), Arc::clone(&fact.pod)))
        .collect();
    name_namespaces(&mut cluster);
    outcome.cluster = cluster;
}

/// A service and who serves it, in order.
pub(super) fn with(fact: &ServiceFact, mut endpoints: Vec<ServiceEndpoint>) -> Service {
    endpoints.sort();
    endpoints.dedup();
    let mut service = fact.service.clone();
    service.endpoints = endpoints;
    service.ports.sort();
    service
}

fn add_pod<'f>(
    fact: &'f PodFact,
    object: &ObjectRef,
    pods: &mut BTreeMap<&'f str, &'f PodFact>,
    outcome: &mut Outcome,
) {
    if let Some(first) = pods.get(&*fact.pod.uid) {
        outcome.rejections.push(Rejection {
            object: object.clone(),
            field: "metadata.uid".to_owned(),
            why: format!("is the UID of pod {} too", first.pod.name),
            consequence: "the pod is not known".to_owned(),
        });
    } else {
        pods.insert(&fact.pod.uid, fact);
    }
}

/// Endpoints as the EndpointSlice controller makes them: of every pod that the selector selects.
fn selected(
    name: &ObjectName,
    fact: &ServiceFact,
    pods: &BTreeMap<&str, &PodFact>,
) -> Vec<ServiceEndpoint> {
    let Some(selector) = &fact.selector else {
        return Vec::new();
    };
    let mut endpoints = Vec::new();
    for PodFact { pod, served_at } in pods.values() {
        let selects = pod.name.namespace == name.namespace
            && selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v));
        if !selects {
            continue;
        }
        for (port, target) in fact.service.ports.iter().zip(&fact.targets) {
            let number = match target {
                Target::Number(number) => Some(*number),
                Target::Named(name) => pod
                    .named_ports
                    .get(&(name.clone(), port.transport))
                    .copied(),
            };
            let Some(number) = number else { continue };
            let (v4, v6) = fact.families;
            let served = served_at
                .iter()
                .filter(|ip| if ip.is_ipv4() { v4 } else { v6 });
            endpoints.extend(served.map(|address| ServiceEndpoint {
                port_name: port.name.clone(),
                transport: port.transport,
                address: *address,
                port: number,
                node: Some(pod.node.clone()).filter(|node| !node.is_empty()),
                ready: fact.service.publish_not_ready || (pod.ready && !pod.terminating),
                serving: pod.ready,
                terminating: pod.terminating,
            }));
        }
    }
    endpoints
}

/// The pods whose own node says that it accepts tunnels for them.
fn ready(
    pods: &BTreeMap<&str, &PodFact>,
    cluster: &Cluster,
    reports: &BTreeMap<&str, &NodeReport>,
) -> BTreeSet<Arc<str>> {
    let report_of = |namespace: &str, node: &str| {
        let report = *reports.get(node)?;
        let all = accepts_all(report, cluster.namespaces.get(namespace));
        Some((report, all))
    };
    // Many pods have both in common.
    let mut known: HashMap<(&str, &str), Option<(&NodeReport, bool)>> = HashMap::new();
    let mut ready = BTreeSet::new();
    for fact in pods.values() {
        let (namespace, node) = (&*fact.pod.name.namespace, &*fact.pod.node);
        let report = known.entry((namespace, node));
        let report = report.or_insert_with(|| report_of(namespace, node));
        if report.is_some_and(|(report, all)| all || report.pods.contains(&*fact.pod.uid)) {
            ready.insert(Arc::clone(&fact.pod.uid));
        }
    }
    ready
}

/// Whether a node accepts tunnels for all of its pods of a namespace.
pub(super) fn accepts_all(report: &NodeReport, namespace: Option<&Namespace>) -> bool {
    namespace.is_some_and(|namespace| report.namespaces.contains(&namespace.uid))
}

/// A namespace that has pods and no object still has its name.
fn name_namespaces(cluster: &mut Cluster) {
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
