// SPDX-License-Identifier: Apache-2.0
//! The lab as Kubernetes manifests, which agents with `--source dir:` read.
//!
//! Files are replaced atomically by rename, so that readers see only complete files.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::netns::ignore_absent;
use crate::node::Node;
use crate::pod::Pod;

/// A directory of manifests.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    pub(crate) fn create(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// Returns the directory's path.
    #[must_use]
    pub fn manifest_dir(&self) -> &Path {
        &self.dir
    }

    /// Writes or replaces the file `NAME.yaml` with the text of any manifests.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn apply_text(&self, name: &str, text: &str) -> Result<()> {
        let draft = self.dir.join(format!(".{name}.draft"));
        fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
        Ok(fs::rename(&draft, self.path(name))?)
    }

    /// Writes or replaces one file with one object.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn apply(&self, name: &str, object: &Value) -> Result<()> {
        self.apply_text(name, &to_yaml(object))
    }

    /// Removes one file; succeeds if it does not exist.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        Ok(ignore_absent(fs::remove_file(self.path(name)))?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.yaml"))
    }

    pub(crate) fn has_namespace(&self, name: &str) -> bool {
        self.path(&format!("namespace-{name}")).exists()
    }

    /// Writes or replaces a Namespace.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn namespace(&self, name: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        let mut labels = labels.clone();
        // The API server adds this label, and namespace selectors rely on it.
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
        let object = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "uid": format!("namespace-{name}"), "labels": labels},
        });
        self.apply(&format!("namespace-{name}"), &object)
    }

    /// Writes or replaces a ClusterIP Service that selects pods by one label. Each port has its
    /// number, the target port, and the protocol as in Kubernetes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn service(
        &self,
        (namespace, name): (&str, &str),
        cluster_ips: &[IpAddr],
        (label, value): (&str, &str),
        ports: &[(u16, u16, &str)],
    ) -> Result<()> {
        let ports = ports.iter().map(|(port, target, protocol)| {
            let name = format!("{}-{port}", protocol.to_ascii_lowercase());
            json!({"name": name, "port": port, "targetPort": target, "protocol": protocol})
        });
        let families = cluster_ips
            .iter()
            .map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" });
        let object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": format!("service-{namespace}-{name}"),
            },
            "spec": {
                "type": "ClusterIP",
                "clusterIP": cluster_ips.first(),
                "clusterIPs": cluster_ips,
                "ipFamilies": families.collect::<Vec<_>>(),
                "selector": {label: value},
                "ports": ports.collect::<Vec<_>>(),
            },
        });
        self.apply(&format!("service-{namespace}-{name}"), &object)
    }

    pub(crate) fn node(&self, node: &Node) -> Result<()> {
        let cidrs = node.pod_cidrs();
        let object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name(), "uid": format!("node-{}", node.name())},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": node.v4()},
                    {"type": "InternalIP", "address": node.v6()},
                    {"type": "Hostname", "address": node.name()},
                ],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        self.apply(&format!("node-{}", node.name()), &object)
    }

    /// Returns the manifest of a pod, which tests may change and apply.
    #[must_use]
    pub fn pod_object(pod: &Pod) -> Value {
        let mut annotations = pod.spec.annotations.clone();
        annotations.insert("mesh.rs/netns".to_owned(), pod.path().display().to_string());
        let ports = pod.spec.ports.iter().map(|(name, number, protocol)| {
            json!({"name": name, "containerPort": number, "protocol": protocol})
        });
        let ips = pod.addresses().iter().map(|ip| json!({"ip": ip}));
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod.name(),
                "namespace": pod.namespace(),
                "uid": pod.uid(),
                "labels": pod.spec.labels,
                "annotations": annotations,
            },
            "spec": {
                "nodeName": pod.node().name(),
                "serviceAccountName": pod.spec.service_account,
                "containers": [{
                    "name": "app",
                    "image": "localhost/app:1",
                    "ports": ports.collect::<Vec<_>>(),
                }],
            },
            "status": {
                "phase": "Running",
                "podIP": pod.addresses().first(),
                "podIPs": ips.collect::<Vec<_>>(),
                "hostIP": pod.node().v4(),
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        })
    }

    /// Returns the file name of a pod's manifest, without its extension.
    #[must_use]
    pub fn pod_file(pod: &Pod) -> String {
        format!("pod-{}-{}", pod.namespace(), pod.name())
    }

    pub(crate) fn pod(&self, pod: &Pod) -> Result<()> {
        self.apply(&Self::pod_file(pod), &Self::pod_object(pod))
    }

    /// Replaces all labels of a pod.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn relabel(&self, pod: &Pod, labels: &[(&str, &str)]) -> Result<()> {
        let mut object = Self::pod_object(pod);
        object["metadata"]["labels"] = labels.iter().copied().collect();
        self.apply(&Self::pod_file(pod), &object)
    }

    pub(crate) fn remove_pod(&self, pod: &Pod) -> Result<()> {
        self.withdraw(&Self::pod_file(pod))
    }
}

/// Returns a NetworkPolicy that isolates the pods of a namespace with the label `app`, by which it is
/// named too. `direction` is `Ingress` or `Egress`.
#[must_use]
pub fn isolate(namespace: &str, app: &str, direction: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: {app}, namespace: {namespace}}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, policyTypes: [{direction}]}}\n"
    )
}

/// Formats a JSON value as block-style YAML. Strings are quoted as in JSON, which is valid YAML.
#[must_use]
pub fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    block(value, 0, &mut text);
    text
}

fn block(value: &Value, indent: usize, text: &mut String) {
    if let Value::Object(map) = value
        && !map.is_empty()
    {
        object(map, indent, text, false);
    } else if let Value::Array(items) = value
        && !items.is_empty()
    {
        for item in items {
            let _infallible = write!(text, "{:indent$}-", "");
            if let Value::Object(map) = item
                && !map.is_empty()
            {
                text.push(' ');
                object(map, indent + 2, text, true);
            } else {
                nested(item, indent, text);
            }
        }
    } else {
        let _infallible = writeln!(text, "{:indent$}{value}", "");
    }
}

fn object(map: &Map<String, Value>, indent: usize, text: &mut String, mut inline: bool) {
    for (key, value) in map {
        let pad = if std::mem::take(&mut inline) {
            0
        } else {
            indent
        };
        let key = if plain(key) {
            key.clone()
        } else {
            Value::from(key.as_str()).to_string()
        };
        let _infallible = write!(text, "{:pad$}{key}:", "");
        nested(value, indent, text);
    }
}

/// Formats a value after `key:` or `-`.
fn nested(value: &Value, indent: usize, text: &mut String) {
    let empty = match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    };
    if empty {
        let _infallible = writeln!(text, " {value}");
    } else {
        text.push('\n');
        block(value, indent + 2, text);
    }
}

/// Returns whether YAML reads the unquoted key as the same string.
fn plain(key: &str) -> bool {
    let word = key
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b));
    let reserved = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    word && key.starts_with(|c: char| c.is_ascii_alphabetic())
        && !reserved.contains(&key.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_nests_yaml_blocks() {
        let value = json!({
            "kind": "Pod",
            "metadata": {"labels": {"app": "a: b", "on": true}, "annotations": {}},
            "spec": {"containers": [{"name": "app", "ports": [{"port": 80}]}], "list": [1, [2]]},
        });
        let expected = "kind: \"Pod\"\nmetadata:\n  annotations: {}\n  labels:\n    app: \"a: b\"\n    \
                        \"on\": true\nspec:\n  containers:\n    - name: \"app\"\n      ports:\n        - \
                        port: 80\n  list:\n    - 1\n    -\n      - 2\n";
        assert_eq!(to_yaml(&value), expected);
    }
}
