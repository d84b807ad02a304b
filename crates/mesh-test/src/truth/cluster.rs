// SPDX-License-Identifier: Apache-2.0
//! The cluster of a table: its objects as the lab's agents read them, and the pod, node or outside
//! host of each address.
//!
//! Nodes are renamed to the lab's, in order, and pods without a node are spread over two nodes. Of
//! the objects, only the node names and the enrollment labels are changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use mesh_api::manifests::{Format, flatten, objects};
use mesh_api::truth::{Manifest, Table, give_addresses};
use mesh_api::{LastGood, Object, Options, convert};
use mesh_plan::cluster::{ClusterSnapshot, Pod};
use serde_json::{Value, json};

use crate::mesh::ENROLLED;

/// Namespaces that no label enrolls: the mesh's own and the system's.
const NEVER: [&str; 2] = ["mesh-system", "kube-system"];
/// Maximum number of nodes of a lab.
const MOST_NODES: usize = 99;

/// A table's cluster.
#[derive(Debug)]
pub(crate) struct TableCluster {
    /// Objects for the agents.
    pub(crate) objects: Vec<Value>,
    /// The objects as a snapshot.
    pub(crate) cluster: ClusterSnapshot,
    /// Number of nodes.
    pub(crate) nodes: u8,
    /// Warnings and rejections of the manifests.
    pub(crate) notes: Vec<String>,
    by_name: BTreeMap<String, String>,
    by_address: BTreeMap<IpAddr, Endpoint>,
    services: BTreeSet<IpAddr>,
}

/// Location of an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Endpoint {
    /// In a pod, by its UID.
    Pod(String),
    /// On a node, by its number.
    Node(u8),
    /// Outside the cluster.
    Outside,
}

/// The source or the destination of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) endpoint: Endpoint,
    pub(crate) addresses: Vec<IpAddr>,
    /// UID of the pod, also of a pod in the host network, whose endpoint is its node.
    pub(crate) pod: Option<String>,
}

impl TableCluster {
    /// Reads the manifests of a table in `file`.
    pub(crate) fn of(table: &Table, file: &Path, mtls: bool) -> Result<Self> {
        let mut objects = Vec::new();
        for manifest in &table.manifests {
            match manifest {
                Manifest::Path(path) => {
                    let base = file.parent().unwrap_or(Path::new(""));
                    read(&base.join(path), &mut objects)?;
                }
                Manifest::Object(value) => flatten(value.clone(), 1, &mut objects)?,
            }
        }
        let nodes = rename_nodes(&mut objects)?;
        give_addresses(&mut objects);
        if !mtls {
            withdraw(&mut objects);
        } else if !objects.iter().any(speaks_of_enrolment) {
            enrol(&mut objects);
        }
        let as_read: Vec<Object> = objects
            .iter()
            .map(|value| Object {
                origin: file.display().to_string(),
                value: value.clone(),
            })
            .collect();
        let outcome = convert(&as_read, &LastGood::default(), Options { standalone: true });
        let rejections = outcome.rejections.iter().map(|r| format!("rejected: {r}"));
        let warnings = outcome.warnings.iter().map(|w| format!("warning: {w}"));
        let mut cluster = Self {
            objects,
            nodes,
            notes: rejections.chain(warnings).collect(),
            cluster: outcome.cluster,
            by_name: BTreeMap::new(),
            by_address: BTreeMap::new(),
            services: BTreeSet::new(),
        };
        cluster.index()?;
        Ok(cluster)
    }

    fn index(&mut self) -> Result<()> {
        for (name, node) in &self.cluster.nodes {
            let endpoint = Endpoint::Node(number(name)?);
            let of_node = node.addresses.iter().map(|at| (*at, endpoint.clone()));
            self.by_address.extend(of_node);
        }
        for (uid, pod) in &self.cluster.pods {
            self.by_name.insert(pod.name.to_string(), uid.to_string());
            let endpoint = Endpoint::Pod(uid.to_string());
            let of_pod = pod.addresses.iter().map(|at| (*at, endpoint.clone()));
            self.by_address.extend(of_pod);
        }
        let services = self.cluster.services.values();
        self.services = services
            .flat_map(|service| service.cluster_ips.iter().chain(&service.external_ips))
            .copied()
            .collect();
        Ok(())
    }

    /// Returns the pods to create.
    pub(crate) fn pods(&self) -> impl Iterator<Item = (&str, &Pod)> {
        let made = |(_, pod): &(&str, &Pod)| !pod.host_network && !pod.addresses.is_empty();
        let pods = self.cluster.pods.iter().map(|(uid, pod)| (&**uid, &**pod));
        pods.filter(made)
    }

    /// Returns the addresses of nodes by node number.
    pub(crate) fn node_addresses(&self) -> Result<BTreeMap<u8, Vec<IpAddr>>> {
        let of = |(name, node): (&String, &mesh_plan::cluster::Node)| {
            Ok((number(name)?, node.addresses.iter().copied().collect()))
        };
        self.cluster.nodes.iter().map(of).collect()
    }

    /// Finds a source or destination by NAMESPACE/POD or by address.
    ///
    /// # Errors
    /// The pod does not exist, or `text` is neither.
    pub(crate) fn end(&self, text: &str) -> Result<End> {
        if let Some(uid) = self.by_name.get(text) {
            return self.pod_end(uid);
        }
        let Ok(address) = text.parse::<IpAddr>() else {
            bail!("there is no pod {text}");
        };
        let address = address.to_canonical();
        let endpoint = self.by_address.get(&address);
        let endpoint = endpoint.cloned().unwrap_or(Endpoint::Outside);
        Ok(End {
            pod: match &endpoint {
                Endpoint::Pod(uid) => Some(uid.clone()),
                Endpoint::Node(_) | Endpoint::Outside => None,
            },
            endpoint,
            addresses: vec![address],
        })
    }

    fn pod_end(&self, uid: &str) -> Result<End> {
        let pod = &self.cluster.pods[uid];
        let (endpoint, addresses) = if pod.host_network {
            let node = self.cluster.nodes.get(&pod.node);
            (
                Endpoint::Node(number(&pod.node)?),
                node.map(|node| node.addresses.iter().copied().collect())
                    .unwrap_or_default(),
            )
        } else {
            (Endpoint::Pod(uid.to_owned()), pod.addresses.clone())
        };
        Ok(End {
            endpoint,
            addresses: addresses.into_iter().collect(),
            pod: Some(uid.to_owned()),
        })
    }

    /// Returns whether an address is a Service's, which connecting translates to an endpoint.
    pub(crate) fn is_service(&self, address: &IpAddr) -> bool {
        self.services.contains(address)
    }
}

/// Returns the number of a lab node.
fn number(name: &str) -> Result<u8> {
    let digits = name.strip_prefix("node");
    let number = digits.and_then(|digits| digits.parse().ok());
    number.with_context(|| format!("{name:?} is not a node of the lab"))
}

/// Reads the objects of a file, or of every manifest below a directory.
fn read(path: &Path, into: &mut Vec<Value>) -> Result<()> {
    let shown = || path.display().to_string();
    if path.is_dir() {
        let entries = std::fs::read_dir(path).with_context(shown)?;
        let mut entries: Vec<_> = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        entries.sort();
        for entry in entries {
            let name = entry.file_name().and_then(|name| name.to_str());
            let is_hidden = name.is_none_or(|name| name.starts_with('.'));
            if !is_hidden && (entry.is_dir() || name.and_then(Format::of).is_some()) {
                read(&entry, into)?;
            }
        }
        return Ok(());
    }
    let format = path.to_str().and_then(Format::of);
    let format = format.with_context(|| format!("{}: .yaml, .yml or .json", shown()))?;
    let text = std::fs::read_to_string(path).with_context(shown)?;
    into.extend(objects(&text, format).with_context(shown)?);
    Ok(())
}

fn kind(object: &Value) -> &str {
    object["kind"].as_str().unwrap_or_default()
}

/// Renames nodes to the lab's, assigns nodes to pods without one, and returns the number of nodes.
fn rename_nodes(objects: &mut [Value]) -> Result<u8> {
    let mut names = BTreeSet::new();
    let mut homeless = false;
    for object in objects.iter() {
        let name = match kind(object) {
            "Pod" => &object["spec"]["nodeName"],
            "Node" => &object["metadata"]["name"],
            _ => continue,
        };
        match name.as_str().filter(|name| !name.is_empty()) {
            Some(name) => {
                names.insert(name.to_owned());
            }
            None => homeless = true,
        }
    }
    let least = if homeless { 2 } else { 1 };
    let count = names.len().max(least);
    ensure!(count <= MOST_NODES, "a lab has at most {MOST_NODES} nodes");
    let numbered: BTreeMap<String, String> = names
        .into_iter()
        .zip(1..)
        .map(|(name, number)| (name, format!("node{number}")))
        .collect();
    let mut next = 0;
    let mut rename = |name: &mut Value| {
        let known = name.as_str().and_then(|name| numbered.get(name));
        let new = known.cloned().unwrap_or_else(|| {
            next += 1;
            format!("node{}", 2 - next % 2)
        });
        *name = Value::from(new);
    };
    for object in objects.iter_mut() {
        match kind(object) {
            "Pod" if object["spec"].is_object() || object["spec"].is_null() => {
                rename(&mut object["spec"]["nodeName"]);
            }
            "Node" => rename(&mut object["metadata"]["name"]),
            "EndpointSlice" => {
                for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
                    if endpoint["nodeName"].is_string() {
                        rename(&mut endpoint["nodeName"]);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(u8::try_from(count)?)
}

/// Returns whether an object has enrollment labels; the table then decides what is enrolled.
fn speaks_of_enrolment(object: &Value) -> bool {
    let label = &object["metadata"]["labels"][ENROLLED.0];
    matches!(kind(object), "Namespace" | "Pod") && !label.is_null()
}

/// Removes every enrollment label.
fn withdraw(objects: &mut [Value]) {
    for object in objects.iter_mut().filter(|o| speaks_of_enrolment(o)) {
        if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
            labels.remove(ENROLLED.0);
        }
    }
}

/// Enrolls every namespace, also those without an object.
fn enrol(objects: &mut Vec<Value>) {
    let (label, enabled) = ENROLLED;
    let mut known = BTreeSet::from(NEVER.map(str::to_owned));
    for object in objects.iter_mut().filter(|o| kind(o) == "Namespace") {
        let metadata = &mut object["metadata"];
        known.insert(metadata["name"].as_str().unwrap_or_default().to_owned());
        if metadata["labels"].is_null() {
            metadata["labels"] = json!({});
        }
        if let Some(labels) = metadata["labels"].as_object_mut() {
            labels.insert(label.to_owned(), enabled.into());
        }
    }
    let used: BTreeSet<String> = objects
        .iter()
        .filter(|object| kind(object) == "Pod")
        .map(|pod| {
            let namespace = pod["metadata"]["namespace"].as_str();
            namespace.unwrap_or("default").to_owned()
        })
        .collect();
    for name in used.difference(&known) {
        objects.push(json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": {label: enabled}},
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(manifests: Value, mtls: bool) -> TableCluster {
        let table = json!({"manifests": manifests, "checks": []});
        let table: Table = serde_json::from_value(table).expect("a table");
        TableCluster::of(&table, Path::new("x.yaml"), mtls).expect("a cluster")
    }

    fn pod(name: &str, node: Option<&str>, ip: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "x"},
            "spec": {"nodeName": node},
            "status": {"podIPs": [{"ip": ip}]},
        })
    }

    #[test]
    fn nodes_are_renamed_and_unassigned_pods_are_spread() {
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "worker-b"},
            "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.3"}]},
        });
        let pods = [
            pod("a", Some("worker-b"), "10.0.0.1"),
            pod("b", None, "10.0.0.2"),
            pod("c", None, "10.0.0.3"),
            pod("d", Some("worker-a"), "10.0.0.4"),
        ];
        let cluster = cluster(json!([pods[0], pods[1], pods[2], pods[3], node]), true);
        assert_eq!(cluster.nodes, 2);
        let on = |name: &str| {
            let end = cluster.end(&format!("x/{name}")).expect("a pod");
            cluster.cluster.pods[end.pod.expect("a pod").as_str()]
                .node
                .clone()
        };
        assert_eq!(
            ["a", "b", "c", "d"].map(on),
            ["node2", "node1", "node2", "node1"]
        );
        let end = |text: &str| cluster.end(text).expect("an end").endpoint;
        assert_eq!(end("172.18.0.3"), Endpoint::Node(2));
        assert_eq!(end("192.0.2.1"), Endpoint::Outside);
        assert_eq!(end("10.0.0.4"), end("x/d"));
    }

    #[test]
    fn namespaces_are_enrolled_unless_table_has_enrollment_labels() {
        let says = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "y", "labels": {"mesh.rs/dataplane": "enabled"}},
        });
        let a = pod("a", None, "10.0.0.1");
        let label = |cluster: &TableCluster, of: &str| {
            let labels = &cluster.cluster.namespaces[of].labels;
            labels.get("mesh.rs/dataplane").cloned()
        };
        let silent = cluster(json!([a]), true);
        assert_eq!(label(&silent, "x").as_deref(), Some("enabled"));
        let on = cluster(json!([a, says]), true);
        assert_eq!(label(&on, "x"), None);
        assert_eq!(label(&on, "y").as_deref(), Some("enabled"));
        let off = cluster(json!([a, says]), false);
        assert_eq!((label(&off, "x"), label(&off, "y")), (None, None));
    }
}
