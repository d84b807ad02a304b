// SPDX-License-Identifier: Apache-2.0
//! The kinds that the mesh reads: one row each.

use mesh_plan::cluster::Rejection;
use serde_json::Value;

use super::object::{Held, Issues, Subject, nameless};
use super::{
    Fact, Object, cluster_network_policy, endpoint_slice, mesh_authentication, mesh_node,
    mesh_policy, namespace, network_policy, node, pod, service,
};

/// A kind, and how it is read.
pub(super) struct Kind {
    group: &'static str,
    version: &'static str,
    pub(super) name: &'static str,
    pub(super) namespaced: bool,
    /// What an object says; `None` without a problem = nothing of interest.
    pub(super) parse: fn(&Subject<'_>, &mut Issues) -> Option<Fact>,
    /// What holds for a rejected object that was never good.
    pub(super) rejected: fn(&Subject<'_>) -> Held,
}

macro_rules! kinds {
    ($($group:literal $version:literal $name:literal $namespaced:literal $parse:path, $rejected:path;)*) => {
        const KINDS: &[Kind] = &[$(Kind {
            group: $group,
            version: $version,
            name: $name,
            namespaced: $namespaced,
            parse: $parse,
            rejected: $rejected,
        }),*];
    };
}

kinds! {
    "" "v1" "Namespace" false namespace::parse, namespace::rejected;
    "" "v1" "Node" false node::parse, node::rejected;
    "" "v1" "Pod" true pod::parse, pod::rejected;
    "" "v1" "Service" true service::parse, service::rejected;
    "discovery.k8s.io" "v1" "EndpointSlice" true endpoint_slice::parse, endpoint_slice::rejected;
    "networking.k8s.io" "v1" "NetworkPolicy" true network_policy::parse, network_policy::rejected;
    "policy.networking.k8s.io" "v1alpha2" "ClusterNetworkPolicy" false
        cluster_network_policy::parse, cluster_network_policy::rejected;
    "mesh.rs" "v1alpha1" "MeshPolicy" true mesh_policy::parse, mesh_policy::rejected;
    "mesh.rs" "v1alpha1" "ClusterMeshPolicy" false mesh_policy::parse_cluster, mesh_policy::rejected_cluster;
    "mesh.rs" "v1alpha1" "MeshAuthentication" true mesh_authentication::parse, mesh_authentication::rejected;
    "mesh.rs" "v1alpha1" "MeshNode" false mesh_node::parse, mesh_node::rejected;
    "mesh.rs" "v1alpha1" "MeshTrafficPolicy" true unread, nothing;
}

/// Kinds that are known and not used yet.
fn unread(_: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    issues.warn("", "this version does not act on this kind");
    None
}

fn nothing(_: &Subject<'_>) -> Held {
    Held::nothing("the object is not used")
}

/// Why an object is of no usable kind.
pub(super) struct WrongKind {
    kind: String,
    field: &'static str,
    why: String,
}

impl WrongKind {
    pub(super) fn of(self, object: &Object) -> Rejection {
        let name = |key: &str| {
            object
                .value
                .get("metadata")
                .and_then(|m| m.get(key))
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let mut rejection = nameless(&self.kind, object, "", &self.why);
        if !name("name").is_empty() {
            rejection.object.namespace = name("namespace");
            rejection.object.name = name("name");
        }
        rejection.field = self.field.to_owned();
        rejection
    }
}

/// The kind of an object; `None` = none of ours.
pub(super) fn kind_of(object: &Value) -> Result<Option<&'static Kind>, WrongKind> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, name) = (text("apiVersion"), text("kind"));
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let wrong = |field, why| {
        Err(WrongKind {
            kind: if name.is_empty() { "Object" } else { name }.to_owned(),
            field,
            why,
        })
    };
    if name.is_empty() {
        return wrong("kind", "is missing".to_owned());
    }
    if api_version.is_empty() {
        return wrong("apiVersion", "is missing".to_owned());
    }
    match KINDS.iter().find(|k| k.group == group && k.name == name) {
        Some(kind) if kind.version == version => Ok(Some(kind)),
        Some(kind) => wrong(
            "apiVersion",
            format!("{version:?} is not read; use {:?}", kind.version),
        ),
        None if group == "mesh.rs" => wrong("kind", format!("mesh.rs has no kind {name:?}")),
        // Who has these relies on them.
        None if group == "policy.networking.k8s.io" => wrong(
            "kind",
            format!("{name:?} is not read; use ClusterNetworkPolicy of v1alpha2"),
        ),
        None if group == "extensions" && name == "NetworkPolicy" => wrong(
            "apiVersion",
            format!("{api_version:?} is not read; use \"networking.k8s.io/v1\""),
        ),
        None => Ok(None),
    }
}
