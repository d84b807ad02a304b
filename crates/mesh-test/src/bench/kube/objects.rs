// SPDX-License-Identifier: Apache-2.0
//! The objects of a large cluster as its API server stores them; only one node is real. No
//! controllers run: endpoint slices and statuses are written as controllers would write them.

use serde_json::{Value, json};

use super::api::Request;
use crate::mesh::ENROLLED;

/// Number of pods per node, per namespace, per service and per policy.
const OF_A_NODE: usize = 50;
const OF_A_NAMESPACE: usize = 200;
const OF_A_SERVICE: usize = 10;
const OF_A_POLICY: usize = 20;
/// Number of applications per namespace.
const APPS: usize = 10;

/// Number of objects of each kind.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(super) struct ObjectCounts {
    pub(super) nodes: usize,
    pub(super) namespaces: usize,
    /// Number of pods without the real ones.
    pub(super) pods: usize,
    pub(super) services: usize,
    pub(super) policies: usize,
}

impl ObjectCounts {
    /// Scales 200 nodes, 1,000 services and 500 policies per 10,000 pods to `pods`.
    pub(super) fn of(pods: usize) -> Self {
        let share = |each: usize| pods.div_ceil(each).max(1);
        Self {
            nodes: share(OF_A_NODE).max(2),
            namespaces: share(OF_A_NAMESPACE),
            pods,
            services: share(OF_A_SERVICE),
            policies: share(OF_A_POLICY),
        }
    }

    pub(super) fn namespace(index: usize) -> String {
        format!("team-{index}")
    }

    fn namespace_of(self, index: usize) -> String {
        Self::namespace(index % self.namespaces)
    }

    pub(super) fn namespaces(self) -> Vec<Request> {
        let namespace = |index| {
            let name = Self::namespace(index);
            let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
                "name": name, "labels": {ENROLLED.0: ENROLLED.1, "team": format!("t{index}")},
            }});
            Request::create("/api/v1/namespaces", body)
        };
        (0..self.namespaces).map(namespace).collect()
    }

    /// Returns the service accounts, without which no pod is admitted.
    pub(super) fn accounts(self) -> Vec<Request> {
        let account = |index| {
            let name = Self::namespace(index);
            Request::create(
                format!("/api/v1/namespaces/{name}/serviceaccounts"),
                json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}),
            )
        };
        (0..self.namespaces).map(account).collect()
    }

    /// Returns the nodes without the real one.
    pub(super) fn nodes(self) -> Vec<Request> {
        let node = |index| {
            let cidr = format!("10.{}.{}.0/24", 64 + index / 250, index % 250);
            let body = json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(index)},
                "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
                "status": {"addresses": [{
                    "type": "InternalIP",
                    "address": format!("198.18.{}.{}", index / 250, 1 + index % 250),
                }]},
            });
            Request::create("/api/v1/nodes", body)
        };
        (1..self.nodes).map(node).collect()
    }

    /// Returns the `MeshNode` objects of the other nodes, without status.
    pub(super) fn reports(self) -> Vec<Request> {
        let report = |index| {
            let body = json!({
                "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshNode",
                "metadata": {"name": node_name(index)},
                "spec": {},
            });
            Request::create("/apis/mesh.rs/v1alpha1/meshnodes", body)
        };
        (1..self.nodes).map(report).collect()
    }

    /// Returns `MeshNode` statuses that report every policy in force with this generation.
    pub(super) fn report_statuses(self, namespaces: &[String], generation: usize) -> Vec<Request> {
        let in_force: Vec<Value> = (0..self.policies)
            .map(|index| {
                json!({
                    "kind": "NetworkPolicy", "namespace": self.namespace_of(index),
                    "name": format!("policy-{index}"), "generation": generation,
                    "uid": format!("00000000-0000-4000-8000-{index:012x}"),
                })
            })
            .collect();
        let report = |index| {
            let name = node_name(index);
            let body = json!({"status": {
                "version": env!("CARGO_PKG_VERSION"),
                "enrolledNamespaces": namespaces,
                "inForce": in_force,
            }});
            let path = format!("/apis/mesh.rs/v1alpha1/meshnodes/{name}/status");
            Request::merge(path, body)
        };
        (1..self.nodes).map(report).collect()
    }

    /// Returns the object and the status of a pod on another node; the pod's address alternates
    /// with `turn`.
    pub(super) fn pod(self, index: usize, turn: usize) -> [Request; 2] {
        let namespace = self.namespace_of(index);
        let name = format!("pod-{index}");
        let node = 1 + index % (self.nodes - 1);
        let app = index / self.namespaces % APPS;
        let address = address(node, index / (self.nodes - 1), turn);
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {
                    "app": format!("app-{app}"), "version": "v1",
                    "pod-template-hash": format!("{app:08x}"),
                },
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true,
                    "name": format!("app-{app}-{app:08x}"),
                    "uid": format!("00000000-0000-4000-9000-{app:012x}"),
                }],
            },
            "spec": {
                "nodeName": node_name(node),
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "app", "image": "localhost/none:1",
                    "ports": [{"name": "http", "containerPort": 8080}],
                }],
            },
        });
        let status = json!({"status": running(&[address])});
        [
            Request::create(&*path, object),
            Request::merge(format!("{path}/{name}/status"), status),
        ]
    }

    pub(super) fn pods(self) -> [Vec<Request>; 2] {
        (0..self.pods).map(|index| self.pod(index, 0)).fold(
            [Vec::new(), Vec::new()],
            |[mut objects, mut statuses], [object, status]| {
                objects.push(object);
                statuses.push(status);
                [objects, statuses]
            },
        )
    }

    /// Returns the services and their endpoint slices.
    pub(super) fn services(self) -> Vec<Request> {
        let service = |index| {
            let namespace = self.namespace_of(index);
            let name = format!("service-{index}");
            let object = json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
            });
            let endpoint = |of: usize| {
                let pod = (index + of * self.services) % self.pods.max(1);
                let node = 1 + pod % (self.nodes - 1);
                json!({
                    "addresses": [address(node, pod / (self.nodes - 1), 0)],
                    "conditions": {"ready": true}, "nodeName": node_name(node),
                })
            };
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-1"),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                "endpoints": (0..OF_A_SERVICE).map(endpoint).collect::<Vec<_>>(),
            });
            let slices = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
            [
                Request::create(format!("/api/v1/namespaces/{namespace}/services"), object),
                Request::create(slices, slice),
            ]
        };
        (0..self.services).flat_map(service).collect()
    }

    /// Returns policies of many shapes: peers in the same namespace, in others, and IP blocks.
    pub(super) fn policies(self) -> Vec<Request> {
        let policy = |index: usize| {
            let peer = match index % 5 {
                0 => json!({"ipBlock": {
                    "cidr": format!("172.16.{}.0/24", index % 250),
                    "except": [format!("172.16.{}.128/25", index % 250)],
                }}),
                1 => {
                    json!({"namespaceSelector": {"matchLabels": {"team": format!("t{}", index % 7)}}})
                }
                _ => {
                    json!({"podSelector": {"matchLabels": {"app": format!("app-{}", index % APPS)}}})
                }
            };
            let port = 6000 + index % 1000 * 10;
            let last = if index.is_multiple_of(2) {
                port
            } else {
                port + 7
            };
            let ports = json!([
                {"protocol": "TCP", "port": port, "endPort": last},
                {"protocol": "TCP", "port": 8080},
            ]);
            let app = index / self.namespaces % APPS;
            policy(
                &self.namespace_of(index),
                &format!("policy-{index}"),
                &json!({
                    "podSelector": {"matchLabels": {"app": format!("app-{app}")}},
                    "policyTypes": ["Ingress"],
                    "ingress": [{"from": [peer], "ports": ports}],
                }),
            )
        };
        (0..self.policies).map(policy).collect()
    }
}

pub(super) fn node_name(index: usize) -> String {
    format!("far-{index}")
}

/// Returns one of the pod's two addresses, which alternate with `turn`; no two pods share one.
fn address(node: usize, host: usize, turn: usize) -> String {
    let host = 2 + host * 2 + turn % 2;
    format!("10.{}.{}.{host}", 64 + node / 250, node % 250)
}

pub(super) fn policy(namespace: &str, name: &str, spec: &Value) -> Request {
    let body = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name}, "spec": spec,
    });
    let path = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies");
    Request::create(path, body)
}

/// Returns the status of a pod that is running and ready.
pub(super) fn running(addresses: &[String]) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "phase": "Running", "podIP": addresses.first(), "podIPs": ips,
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{
            "name": "app", "image": "localhost/none:1", "imageID": "", "ready": true,
            "restartCount": 0, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }],
    })
}
