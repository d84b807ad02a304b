// SPDX-License-Identifier: Apache-2.0
//! Facts of single objects to the facts of the cluster: endpoints to their services, readiness to
//! pods, namespaces that nothing describes.

use std::collections::{BTreeMap, BTreeSet};

use mesh_plan::cluster::{Cluster, Namespace, ObjectName, ObjectRef, Rejection, ServiceEndpoint};

use super::mesh_node::NodeReport;
use super::pod::PodFact;
use super::service::{ServiceFact, Target};
use super::{Fact, Options, Outcome};

pub(super) fn assemble(
    facts: impl IntoIterator<Item = (ObjectRef, Fact)>,
    options: Options,
    outcome: &mut Outcome,
) {
    let mut cluster = Cluster::default();
    let mut pods: BTreeMap<String, PodFact> = BTreeMap::new();
    let mut services: BTreeMap<ObjectName, ServiceFact> = BTreeMap::new();
    let mut slices: BTreeMap<ObjectName, Vec<ServiceEndpoint>> = BTreeMap::new();
    let mut reports: BTreeMap<String, NodeReport> = BTreeMap::new();
    for (object, fact) in facts {
        let name = ObjectName::new(&*object.namespace, &*object.name);
        match fact {
            Fact::Namespace(namespace) => {
                cluster.namespaces.insert(object.name, namespace);
            }
            Fact::Node(node) => {
                cluster.nodes.insert(object.name, node);
            }
            Fact::Pod(pod) => add_pod(*pod, &object, &mut pods, outcome),
            Fact::Service(service) => {
                services.insert(name, *service);
            }
            Fact::Slice(slice) => slices
                .entry(slice.service)
                .or_default()
                .extend(slice.endpoints),
            Fact::Policy(policy) => {
                cluster.policies.insert(object, policy);
            }
            Fact::Authentication(authentication) => {
                cluster.authentications.insert(name, authentication);
            }
            Fact::Report(report) => {
                reports.insert(object.name, report);
            }
        }
    }
    for (name, mut fact) in services {
        let mut endpoints = match slices.remove(&name) {
            Some(endpoints) => endpoints,
            None if options.standalone => selected(&name, &fact, &pods),
            None => Vec::new(),
        };
        endpoints.sort();
        endpoints.dedup();
        if name == ObjectName::new("default", "kubernetes") {
            cluster.api_servers = endpoints.iter().map(|endpoint| endpoint.address).collect();
        }
        fact.service.endpoints = endpoints;
        fact.service.ports.sort();
        cluster.services.insert(name, fact.service);
    }
    cluster.ready = (!options.standalone).then(|| ready(&pods, &cluster, &reports));
    cluster.pods = pods
        .into_iter()
        .map(|(uid, fact)| (uid, fact.pod))
        .collect();
    name_namespaces(&mut cluster);
    outcome.cluster = cluster;
}

fn add_pod(
    fact: PodFact,
    object: &ObjectRef,
    pods: &mut BTreeMap<String, PodFact>,
    outcome: &mut Outcome,
) {
    if let Some(first) = pods.get(&fact.pod.uid) {
        outcome.rejections.push(Rejection {
            object: object.clone(),
            field: "metadata.uid".to_owned(),
            why: format!("is the UID of pod {} too", first.pod.name),
            consequence: "the pod is not known".to_owned(),
        });
    } else {
        pods.insert(fact.pod.uid.clone(), fact);
    }
}

/// Endpoints as the EndpointSlice controller makes them: of every pod that the selector selects.
fn selected(
    name: &ObjectName,
    fact: &ServiceFact,
    pods: &BTreeMap<String, PodFact>,
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
    pods: &BTreeMap<String, PodFact>,
    cluster: &Cluster,
    reports: &BTreeMap<String, NodeReport>,
) -> BTreeSet<String> {
    pods.values()
        .map(|fact| &fact.pod)
        .filter(|pod| {
            let Some(report) = reports.get(&pod.node) else {
                return false;
            };
            let namespace = cluster.namespaces.get(&pod.name.namespace);
            report.pods.contains(&pod.uid)
                || namespace.is_some_and(|namespace| report.namespaces.contains(&namespace.uid))
        })
        .map(|pod| pod.uid.clone())
        .collect()
}

/// A namespace that has pods and no object still has its name.
fn name_namespaces(cluster: &mut Cluster) {
    for pod in cluster.pods.values() {
        let name = &pod.name.namespace;
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
