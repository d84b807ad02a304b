// SPDX-License-Identifier: Apache-2.0
//! From the text of manifests to JSON values: YAML of several documents, JSON, and `List` kinds.
//!
//! YAML is read as `kubectl` reads it: `yes`, `no`, `on` and `off` are booleans, numbers with a
//! leading 0 are octal, merge keys (`<<`) work. Nesting and the expansion of aliases are bounded,
//! so that no file can make the reader run out of stack or memory. Nothing here opens files.

mod yaml;

use serde_json::Value;

/// Deepest nesting of a YAML document. Kubernetes objects stay below 20 (CRD schemas excepted).
pub const MAX_DEPTH: usize = 100;

/// Why a text is not a list of manifests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not YAML, or more of YAML than JSON can express.
    #[error("line {line}, column {column}: {why}")]
    Yaml {
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What is wrong there.
        why: String,
    },
    /// It is not JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// A document is neither an object nor a list of objects.
    #[error("document {0} is no object: expected apiVersion, kind and metadata")]
    NoObject(usize),
}

/// How a text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// YAML, of any number of documents.
    Yaml,
    /// JSON, any number of values one after the other.
    Json,
}

impl Format {
    /// The format that a file's name stands for; `None` = such files are not manifests.
    #[must_use]
    pub fn of(file_name: &str) -> Option<Self> {
        match file_name.rsplit_once('.')?.1 {
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// The documents of a text, whatever they are.
///
/// # Errors
/// The text is not in the format, or beyond the bounds.
pub fn documents(text: &str, format: Format) -> Result<Vec<Value>, Error> {
    match format {
        Format::Yaml => yaml::documents(text),
        Format::Json => Ok(serde_json::Deserializer::from_str(text)
            .into_iter()
            .collect::<Result<_, _>>()?),
    }
}

/// The objects of a text: empty documents are left out, lists (`kind: List` and `PodList` and so
/// on) are taken apart.
///
/// # Errors
/// As [`documents`], or a document is no object.
pub fn objects(text: &str, format: Format) -> Result<Vec<Value>, Error> {
    let mut objects = Vec::new();
    for (index, document) in documents(text, format)?.into_iter().enumerate() {
        flatten(document, index + 1, &mut objects)?;
    }
    Ok(objects)
}

/// Adds the objects of one document, of which it is this one in its text, from 1.
///
/// # Errors
/// The document is no object.
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
                    objects.push(Value::Object(map));
                }
            }
            Ok(())
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(Error::NoObject(number))
        }
    }
}

/// `apiVersion` and `kind` of the items of a `PodList` and the like; API servers leave them out.
fn typed_list_item(list: &serde_json::Map<String, Value>) -> Option<(Value, Value)> {
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
    fn lists_are_taken_apart_and_empty_documents_left_out() {
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
    fn json_values_follow_one_another() {
        let all = objects("{\"kind\": \"A\"}\n{\"kind\": \"B\"}", Format::Json).unwrap();
        assert_eq!(all.len(), 2);
        assert!(objects("{\"kind\": ", Format::Json).is_err());
        assert!(objects("- a\n- b\n", Format::Yaml).is_err());
    }

    #[test]
    fn names_of_manifests() {
        assert_eq!(Format::of("a.yaml"), Some(Format::Yaml));
        assert_eq!(Format::of("a.yml"), Some(Format::Yaml));
        assert_eq!(Format::of("a.b.json"), Some(Format::Json));
        assert_eq!(Format::of("a.yaml.bak"), None);
        assert_eq!(Format::of("yaml"), None);
    }
}
