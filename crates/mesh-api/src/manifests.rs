// SPDX-License-Identifier: Apache-2.0
//! Parses manifests to JSON values: multi-document YAML, JSON, and `List` kinds.
//!
//! YAML is read like `kubectl` reads it: `yes`, `no`, `on` and `off` are booleans, numbers with a leading
//! 0 are octal, and merge keys (`<<`) work. Nesting and alias expansion are bounded, so that a file cannot
//! exhaust the stack or the memory. This module does not open files.

mod yaml;

use serde_json::{Map, Value};

/// The deepest nesting of a YAML document. Kubernetes objects except CRD schemas have fewer than 20 levels.
const MAX_DEPTH: usize = 100;

/// The reason why a text cannot be parsed as manifests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not valid YAML, or uses YAML that JSON cannot express.
    #[error("line {line}, column {column}: {why}")]
    Yaml {
        /// The line number, from 1.
        line: usize,
        /// The column number, from 1.
        column: usize,
        /// The problem at that position.
        why: String,
    },
    /// The text is not valid JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// A document is neither an object nor a list of objects.
    #[error("document {0} is not an object with apiVersion, kind and metadata")]
    NotAnObject(usize),
}

/// The format of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// YAML with any number of documents.
    Yaml,
    /// JSON with any number of concatenated values.
    Json,
}

impl Format {
    /// The format of a file by its name extension; `None` if the file is not a manifest.
    #[must_use]
    pub fn of(file_name: &str) -> Option<Self> {
        match file_name.rsplit_once('.')?.1 {
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// Parses the documents of a text. They can be any values.
///
/// # Errors
/// The text is not valid in the format, or exceeds the bounds.
pub(crate) fn documents(text: &str, format: Format) -> Result<Vec<Value>, Error> {
    match format {
        Format::Yaml => yaml::documents(text),
        Format::Json => Ok(serde_json::Deserializer::from_str(text)
            .into_iter()
            .collect::<Result<_, _>>()?),
    }
}

/// Parses the objects of a text. Skips empty documents, and replaces lists (`kind: List`, `PodList` and so
/// on) by their items.
///
/// # Errors
/// The text cannot be parsed, or a document is not an object.
pub fn objects(text: &str, format: Format) -> Result<Vec<Value>, Error> {
    let mut objects = Vec::new();
    for (index, document) in documents(text, format)?.into_iter().enumerate() {
        flatten(document, index + 1, &mut objects)?;
    }
    Ok(objects)
}

/// Adds the objects of a document. `number` is the position of the document in its text, from 1.
///
/// # Errors
/// The document is not an object.
pub fn flatten(document: Value, number: usize, objects: &mut Vec<Value>) -> Result<(), Error> {
    match document {
        Value::Null => Ok(()),
        Value::Object(mut map) => {
            let is_list = map
                .get("kind")
                .and_then(Value::as_str)
                .is_some_and(|kind| kind.ends_with("List"));
            let item_kind = typed_list_item(&map);
            match map.remove("items") {
                Some(Value::Array(items)) if is_list => {
                    for mut item in items {
                        inherit(&mut item, item_kind.as_ref());
                        flatten(item, number, objects)?;
                    }
                }
                items => {
                    if let Some(items) = items {
                        map.insert("items".to_owned(), items);
                    }
                    let mut object = Value::Object(map);
                    nulls_to_empty_strings(&mut object);
                    objects.push(object);
                }
            }
            Ok(())
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(Error::NotAnObject(number))
        }
    }
}

/// The fields that are maps from strings to strings, in any kind.
const STRING_MAPS: [&str; 4] = ["annotations", "labels", "matchLabels", "nodeSelector"];

/// Replaces nulls in maps of strings by empty strings, as the API server's decoder reads `key:` without a
/// value.
fn nulls_to_empty_strings(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let is_service = map.get("kind").is_some_and(|kind| kind == "Service");
            for (key, value) in &mut *map {
                if STRING_MAPS.contains(&key.as_str()) {
                    fill_nulls(value);
                } else {
                    nulls_to_empty_strings(value);
                }
            }
            if is_service
                && let Some(selector) = map.get_mut("spec").and_then(|s| s.get_mut("selector"))
            {
                fill_nulls(selector);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(nulls_to_empty_strings),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Replaces nulls in one map by empty strings.
fn fill_nulls(map: &mut Value) {
    let values = map.as_object_mut().into_iter().flat_map(Map::values_mut);
    for value in values.filter(|value| value.is_null()) {
        *value = Value::from("");
    }
}

/// The `apiVersion` and `kind` for the items of a typed list such as `PodList`, which API servers omit.
fn typed_list_item(list: &Map<String, Value>) -> Option<(Value, Value)> {
    let kind = list.get("kind")?.as_str()?.strip_suffix("List")?;
    (!kind.is_empty())
        .then(|| (list.get("apiVersion").cloned(), kind))
        .and_then(|(version, kind)| Some((version?, Value::from(kind))))
}

fn inherit(item: &mut Value, defaults: Option<&(Value, Value)>) {
    if let (Value::Object(item), Some((version, kind))) = (item, defaults) {
        item.entry("apiVersion").or_insert_with(|| version.clone());
        item.entry("kind").or_insert_with(|| kind.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lists_become_their_items_and_empty_documents_are_skipped() {
        let text = "---\n---\nkind: List\napiVersion: v1\nitems:\n- {kind: A}\n- {kind: List, items: [{kind: B}]}\n---\napiVersion: v1\nkind: PodList\nitems: [{metadata: {name: x}}]\n";
        assert_eq!(
            objects(text, Format::Yaml).unwrap(),
            vec![
                json!({"kind": "A"}),
                json!({"kind": "B"}),
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}),
            ]
        );
    }

    #[test]
    fn key_without_value_is_an_empty_string_in_maps_of_strings() {
        let text = "
kind: Pod
metadata: {labels: {a: , b: c}, annotations: {d: ~}}
spec: {nodeSelector: {e: }, hostname: }
---
kind: MeshPolicy
spec: {podSelector: {matchLabels: {f: }}, ingress: [{from: [{podSelector: {matchLabels: {g: null}}}]}]}
---
kind: Service
spec: {selector: {h: }, clusterIP: }
";
        let all = objects(text, Format::Yaml).unwrap();
        assert_eq!(
            all[0],
            json!({
                "kind": "Pod",
                "metadata": {"labels": {"a": "", "b": "c"}, "annotations": {"d": ""}},
                "spec": {"nodeSelector": {"e": ""}, "hostname": null},
            })
        );
        let spec = &all[1]["spec"];
        assert_eq!(spec["podSelector"]["matchLabels"], json!({"f": ""}));
        let peer = &spec["ingress"][0]["from"][0];
        assert_eq!(peer["podSelector"]["matchLabels"], json!({"g": ""}));
        assert_eq!(
            all[2]["spec"],
            json!({"selector": {"h": ""}, "clusterIP": null})
        );
    }

    #[test]
    fn json_values_can_be_concatenated() {
        let all = objects("{\"kind\": \"A\"}\n{\"kind\": \"B\"}", Format::Json).unwrap();
        assert_eq!(all.len(), 2);
        assert!(objects("{\"kind\": ", Format::Json).is_err());
        assert!(objects("- a\n- b\n", Format::Yaml).is_err());
    }

    #[test]
    fn format_follows_the_file_extension() {
        assert_eq!(Format::of("a.yaml"), Some(Format::Yaml));
        assert_eq!(Format::of("a.yml"), Some(Format::Yaml));
        assert_eq!(Format::of("a.b.json"), Some(Format::Json));
        assert_eq!(Format::of("a.yaml.bak"), None);
        assert_eq!(Format::of("yaml"), None);
    }
}
