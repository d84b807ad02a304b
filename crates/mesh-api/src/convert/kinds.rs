// SPDX-License-Identifier: Apache-2.0
//! The table of Kubernetes kinds that the mesh reads: one row per kind.
//!
//! The converter, the API watches of the agent and the tests of the RBAC manifests all use this
//! table, so a kind is added in one place.

use mesh_plan::cluster::Rejection;
use serde_json::Value;

use super::object::{Fallback, Issues, RawObject, unnamed};
use super::{
    Object, ParsedObject, cluster_network_policy, endpoint_slice, mesh_authentication, mesh_node,
    mesh_policy, mesh_traffic_policy, namespace, network_policy, node, pod, service,
};
use crate::pruned::{self, Fields};

/// The scope of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Objects have no namespace.
    Cluster,
    /// Every object is in a namespace.
    Namespaced,
}

/// The source of a kind's definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Every API server serves the kind.
    BuiltIn,
    /// The kind exists after its CustomResourceDefinition is installed.
    Crd,
}

/// One row of the table.
struct Row {
    group: &'static str,
    version: &'static str,
    name: &'static str,
    plural: &'static str,
    scope: Scope,
    origin: Origin,
    /// The fields that conversion reads.
    fields: &'static Fields,
    /// Parses an object; `None` without a problem means that the object does not matter.
    parse: fn(&RawObject<'_>, &mut Issues) -> Option<ParsedObject>,
    /// Gives the replacement for a rejected object that has no last good version.
    fallback: fn(&RawObject<'_>) -> Fallback,
}

macro_rules! kinds {
    ($(
        $kind:ident: $group:literal / $version:literal, $plural:literal, $scope:ident, $origin:ident,
        $fields:path, $parse:path, $fallback:path;
    )*) => {
        /// A Kubernetes kind that the mesh reads.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $(
                #[doc = concat!(stringify!($kind), " of `", $group, "/", $version, "`.")]
                $kind,
            )*
        }

        impl Kind {
            /// Every kind, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            const fn row(self) -> &'static Row {
                match self {
                    $(Self::$kind => &Row {
                        group: $group,
                        version: $version,
                        name: stringify!($kind),
                        plural: $plural,
                        scope: Scope::$scope,
                        origin: Origin::$origin,
                        fields: &$fields,
                        parse: $parse,
                        fallback: $fallback,
                    },)*
                }
            }
        }
    };
}

kinds! {
    Namespace: "" / "v1", "namespaces", Cluster, BuiltIn,
        pruned::METADATA_ONLY, namespace::parse, namespace::fallback;
    Node: "" / "v1", "nodes", Cluster, BuiltIn,
        pruned::NODE, node::parse, node::fallback;
    Pod: "" / "v1", "pods", Namespaced, BuiltIn,
        pruned::POD, pod::parse, pod::fallback;
    Service: "" / "v1", "services", Namespaced, BuiltIn,
        pruned::SERVICE, service::parse, service::fallback;
    EndpointSlice: "discovery.k8s.io" / "v1", "endpointslices", Namespaced, BuiltIn,
        pruned::ENDPOINT_SLICE, endpoint_slice::parse, endpoint_slice::fallback;
    NetworkPolicy: "networking.k8s.io" / "v1", "networkpolicies", Namespaced, BuiltIn,
        pruned::METADATA_AND_SPEC, network_policy::parse, network_policy::fallback;
    ClusterNetworkPolicy: "policy.networking.k8s.io" / "v1alpha2", "clusternetworkpolicies", Cluster, Crd,
        pruned::METADATA_AND_SPEC, cluster_network_policy::parse, cluster_network_policy::fallback;
    MeshPolicy: "mesh.rs" / "v1alpha1", "meshpolicies", Namespaced, Crd,
        pruned::METADATA_AND_SPEC, mesh_policy::parse, mesh_policy::fallback;
    ClusterMeshPolicy: "mesh.rs" / "v1alpha1", "clustermeshpolicies", Cluster, Crd,
        pruned::METADATA_AND_SPEC, mesh_policy::parse_cluster, mesh_policy::fallback_cluster;
    MeshAuthentication: "mesh.rs" / "v1alpha1", "meshauthentications", Namespaced, Crd,
        pruned::METADATA_AND_SPEC, mesh_authentication::parse, mesh_authentication::fallback;
    MeshTrafficPolicy: "mesh.rs" / "v1alpha1", "meshtrafficpolicies", Namespaced, Crd,
        pruned::METADATA_AND_SPEC, mesh_traffic_policy::parse, mesh_traffic_policy::fallback;
    MeshNode: "mesh.rs" / "v1alpha1", "meshnodes", Cluster, Crd,
        pruned::MESH_NODE, mesh_node::parse, mesh_node::fallback;
}

impl Kind {
    /// The kind as manifests spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The API group; empty for the core group.
    #[must_use]
    pub const fn group(self) -> &'static str {
        self.row().group
    }

    /// The version of the API group that the mesh reads.
    #[must_use]
    pub const fn version(self) -> &'static str {
        self.row().version
    }

    /// The `apiVersion` of the kind's manifests.
    #[must_use]
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.version().to_owned(),
            group => format!("{group}/{}", self.version()),
        }
    }

    /// The resource name in URLs and RBAC rules.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        self.row().plural
    }

    /// The scope of the kind's objects.
    #[must_use]
    pub const fn scope(self) -> Scope {
        self.row().scope
    }

    /// The source of the kind's definition.
    #[must_use]
    pub const fn origin(self) -> Origin {
        self.row().origin
    }

    /// The URL path that lists the kind's objects of all namespaces.
    #[must_use]
    pub fn path(self) -> String {
        let root = if self.group().is_empty() {
            "api"
        } else {
            "apis"
        };
        format!("/{root}/{}/{}", self.api_version(), self.plural())
    }

    /// Reads an object of this kind from JSON and keeps only the fields that conversion and watches
    /// use. A field of a wrong type is kept: conversion rejects it.
    ///
    /// # Errors
    /// The text is not one JSON value.
    pub fn read_pruned(self, json: &str) -> serde_json::Result<Value> {
        pruned::read(json, *self.row().fields)
    }

    pub(super) fn parse(self, object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
        (self.row().parse)(object, issues)
    }

    pub(super) fn fallback(self, object: &RawObject<'_>) -> Fallback {
        (self.row().fallback)(object)
    }
}

/// The reason why the kind of an object cannot be used.
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
        let mut rejection = unnamed(&self.kind, &object.origin, "", &self.why);
        if !name("name").is_empty() {
            rejection.object.namespace = name("namespace");
            rejection.object.name = name("name");
        }
        rejection.field = self.field.to_owned();
        rejection
    }
}

/// The kind of an object; `None` if the mesh does not read that kind.
pub(super) fn kind_of(object: &Value) -> Result<Option<Kind>, WrongKind> {
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
        return wrong("kind", "is required".to_owned());
    }
    if api_version.is_empty() {
        return wrong("apiVersion", "is required".to_owned());
    }
    let known = Kind::ALL.iter().copied();
    match { known }.find(|kind| kind.group() == group && kind.name() == name) {
        Some(kind) if kind.version() == version => Ok(Some(kind)),
        Some(kind) => wrong(
            "apiVersion",
            format!(
                "version {version:?} is not supported; use {:?}",
                kind.version()
            ),
        ),
        None if group == Kind::MeshPolicy.group() => wrong(
            "kind",
            format!("{name:?} is not a kind of the API group {group}"),
        ),
        // Ignoring a policy of an old version would drop protection without a word.
        None if group == Kind::ClusterNetworkPolicy.group() => wrong(
            "kind",
            format!(
                "{name:?} is not supported; use {} of version {}",
                Kind::ClusterNetworkPolicy.name(),
                Kind::ClusterNetworkPolicy.version()
            ),
        ),
        None if group == "extensions" && name == Kind::NetworkPolicy.name() => wrong(
            "apiVersion",
            format!("{api_version:?} is not supported; use \"networking.k8s.io/v1\""),
        ),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_resources_are_unique_within_their_group() {
        let mut names: Vec<_> = Kind::ALL.iter().map(|k| (k.group(), k.name())).collect();
        let mut plurals: Vec<_> = Kind::ALL.iter().map(|k| (k.group(), k.plural())).collect();
        for all in [&mut names, &mut plurals] {
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), Kind::ALL.len());
        }
    }

    #[test]
    fn list_path_follows_the_api_group() {
        assert_eq!(Kind::Pod.path(), "/api/v1/pods");
        assert_eq!(
            Kind::MeshPolicy.path(),
            "/apis/mesh.rs/v1alpha1/meshpolicies"
        );
    }
}
