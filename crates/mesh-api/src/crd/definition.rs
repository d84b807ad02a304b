// SPDX-License-Identifier: Apache-2.0
//! Generates the CustomResourceDefinitions from the types.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition as Column, CustomResourceDefinition,
};
use kube::CustomResourceExt as _;
use serde_json::Value;

use super::{
    ClusterMeshPolicy, ClusterNetworkPolicy, MeshAuthentication, MeshNode, MeshPolicy,
    MeshTrafficPolicy,
};

/// The CustomResourceDefinition of every own kind and of ClusterNetworkPolicy, with its plural name.
///
/// # Errors
/// A definition cannot be serialized; tests prove that all can.
pub fn definitions() -> Result<Vec<(String, Value)>, serde_json::Error> {
    let policies = [
        MeshPolicy::crd(),
        ClusterMeshPolicy::crd(),
        MeshAuthentication::crd(),
        MeshTrafficPolicy::crd(),
    ];
    let others = [MeshNode::crd(), ClusterNetworkPolicy::crd()];
    policies
        .map(|definition| with_columns(definition, &[ACCEPTED, NODES, AGE]))
        .into_iter()
        .chain(others.map(|definition| with_columns(definition, &[AGE])))
        .map(|definition| {
            let plural = definition.spec.names.plural.clone();
            let mut value = serde_json::to_value(definition)?;
            tidy(&mut value);
            Ok((plural, value))
        })
        .collect()
}

/// The name, type and JSON path of a column of `kubectl get`.
type PrintColumn = (&'static str, &'static str, &'static str);

/// The summary of a policy status.
const ACCEPTED: PrintColumn = (
    "Accepted",
    "string",
    r#".status.conditions[?(@.type=="Accepted")].status"#,
);
const NODES: PrintColumn = ("Nodes", "string", ".status.nodes");
const AGE: PrintColumn = ("Age", "date", ".metadata.creationTimestamp");

/// Adds columns after the kind's own columns.
fn with_columns(
    mut definition: CustomResourceDefinition,
    columns: &[PrintColumn],
) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let all = version.additional_printer_columns.get_or_insert_default();
        all.extend(columns.iter().map(|(name, kind, path)| Column {
            name: (*name).to_owned(),
            type_: (*kind).to_owned(),
            json_path: (*path).to_owned(),
            ..Column::default()
        }));
    }
    definition
}

/// Removes parts of the generated schemas that do not fit Kubernetes:
/// - `nullable`: `from: null` of a careless template would match everything, so null is refused.
/// - Empty defaults, so that objects are stored as they were written.
/// - Number formats that Kubernetes does not know and warns about.
/// - Line breaks inside paragraphs, which `kubectl explain` would keep.
fn tidy(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Object(fields) => {
            fields.remove("nullable");
            let empty = |value: &Value| match value {
                Value::Null => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                Value::String(text) => text.is_empty(),
                Value::Bool(_) | Value::Number(_) => false,
            };
            if fields.get("default").is_some_and(empty) {
                fields.remove("default");
            }
            let format = fields.get("format").and_then(Value::as_str);
            if format.is_some_and(|format| format.starts_with("uint")) {
                fields.remove("format");
            }
            if let Some(Value::String(text)) = fields.get_mut("description") {
                let sentences = text.split("\n\n").map(|part| part.replace('\n', " "));
                *text = sentences.collect::<Vec<_>>().join("\n\n");
            }
            fields.values_mut().for_each(tidy);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
