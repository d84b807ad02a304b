// SPDX-License-Identifier: Apache-2.0
//! CustomResourceDefinitions of every kind, from the types.

use kube::CustomResourceExt as _;
use serde_json::Value;

use super::{
    ClusterMeshPolicy, ClusterNetworkPolicy, MeshAuthentication, MeshNode, MeshPolicy,
    MeshTrafficPolicy,
};

/// A CustomResourceDefinition, ready to be applied, by the plural name of its kind.
///
/// # Errors
/// A type has no JSON form; tests hold that none is so.
pub fn definitions() -> Result<Vec<(String, Value)>, serde_json::Error> {
    let all = [
        MeshPolicy::crd(),
        ClusterMeshPolicy::crd(),
        MeshAuthentication::crd(),
        MeshTrafficPolicy::crd(),
        MeshNode::crd(),
        ClusterNetworkPolicy::crd(),
    ];
    all.into_iter()
        .map(|definition| {
            let plural = definition.spec.names.plural.clone();
            let mut value = serde_json::to_value(definition)?;
            tidy(&mut value);
            Ok((plural, value))
        })
        .collect()
}

/// Takes out what the schemas of Rust types say and Kubernetes should not:
/// - `nullable`: a template that leaves `from: null` behind would mean "everybody"; null is refused.
/// - Defaults that say nothing, so that objects are stored as they were written.
/// - Formats of numbers that Kubernetes does not know, and warns about.
/// - Ends of lines inside sentences, which `kubectl explain` would keep.
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
