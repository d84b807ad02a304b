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
        Format::Yaml => yaml::documents(text, &mut yaml::budget(text)),
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

/// The result of reading a text document by document.
#[derive(Debug, Default)]
pub struct Reading {
    /// The objects of the documents that can be read.
    pub objects: Vec<Value>,
    /// The reasons why the others cannot, each with its line in the text.
    pub errors: Vec<Error>,
}

/// Parses the objects of a text as [`objects`] does, but each document on its own: one that cannot be read costs
/// no other. Of JSON, everything before the first error is read.
#[must_use]
pub fn read(text: &str, format: Format) -> Reading {
    let mut reading = Reading::default();
    if let Ok(objects) = objects(text, format) {
        reading.objects = objects;
        return reading;
    }
    match format {
        Format::Yaml => {
            // One for all: a text must not grow the more, the more documents it has.
            let mut budget = yaml::budget(text);
            for (first_line, document) in split(text) {
                match yaml::documents(document, &mut budget) {
                    Ok(values) => reading.add(values, first_line),
                    Err(error) => reading.errors.push(error.below(first_line)),
                }
            }
        }
        Format::Json => {
            let values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
            for (number, value) in (1..).zip(values) {
                match value {
                    Ok(value) => {
                        let error = flatten(value, number, &mut reading.objects).err();
                        reading.errors.extend(error);
                    }
                    Err(error) => reading.errors.push(error.into()),
                }
            }
        }
    }
    reading
}

impl Reading {
    /// Adds the values of the document that begins after `first_line` lines.
    fn add(&mut self, values: Vec<Value>, first_line: usize) {
        for value in values {
            if flatten(value, 1, &mut self.objects).is_err() {
                self.errors.push(Error::Yaml {
                    line: first_line + 1,
                    column: 1,
                    why: "the document is not an object with apiVersion, kind and metadata"
                        .to_owned(),
                });
            }
        }
    }
}

impl Error {
    /// The error of a part of a text that begins after so many lines.
    fn below(self, lines: usize) -> Self {
        match self {
            Self::Yaml { line, column, why } => Self::Yaml {
                line: line + lines,
                column,
                why,
            },
            Self::Json(_) | Self::NotAnObject(_) => self,
        }
    }
}

/// Splits YAML into its documents, at the markers that YAML 1.2 (9.1) allows nowhere else at the start of a line:
/// `---` before a document, `%` before the directives of one, and `...` after one. Returns the number of lines
/// before each document.
fn split(text: &str) -> Vec<(usize, &str)> {
    let is_marker = |line: &str, marker: &str| {
        let rest = line.strip_prefix(marker);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut documents = Vec::new();
    let (mut start, mut first_line, mut at) = (0, 0, 0);
    // The directives of a document precede its `---`.
    let mut has_directives = false;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let is_directive = line.starts_with('%');
        let begins = !has_directives && (is_marker(line, "---") || is_directive);
        if begins {
            documents.push((first_line, &text[start..at]));
            (start, first_line) = (at, number);
        }
        has_directives = is_directive || has_directives && !is_marker(line, "---");
        at += line.len();
        if is_marker(line, "...") {
            documents.push((first_line, &text[start..at]));
            (start, first_line) = (at, number + 1);
        }
    }
    documents.push((first_line, &text[start..]));
    documents
}

/// Adds the objects of a document. `number` is the position of the document in its text, from 1.
///
/// # Errors
/// The document, or an item of a list, is not an object. All other items are added.
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
                    let mut result = Ok(());
                    for mut item in items {
                        inherit(&mut item, item_kind.as_ref());
                        result = result.and(flatten(item, number, objects));
                    }
                    return result;
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
    fn document_that_cannot_be_read_costs_no_other() {
        let text = "\u{feff}kind: A
---
kind: B
kind: B
--- # a comment
- kind: C
---
kind: List
items: [{kind: D}, 7, {kind: E}]
---
kind: F
text: |
  ---
   not a separator
---
key: [unclosed
...
%YAML 1.2
# of the next
---
kind: G
";
        let reading = read(text, Format::Yaml);
        let kinds: Vec<_> = reading
            .objects
            .iter()
            .map(|it| it["kind"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["A", "D", "E", "F", "G"]);
        let errors: Vec<_> = reading.errors.iter().map(ToString::to_string).collect();
        let begin: Vec<_> = errors
            .iter()
            .filter_map(|it| it.split(',').next())
            .collect();
        assert_eq!(
            begin,
            ["line 4", "line 5", "line 7", "line 17"],
            "{errors:?}"
        );
        let reading = read("{\"kind\": \"A\"} 7 {\"kind\": \"B\"} {", Format::Json);
        assert_eq!((reading.objects.len(), reading.errors.len()), (2, 2));
    }

    #[test]
    fn documents_that_are_read_one_by_one_share_the_bound_of_aliases() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..5 {
            let below = format!("*a{}, ", level - 1).repeat(8);
            bomb += &format!("a{level}: &a{level} [{below}]\n");
        }
        let text = format!("kind: [\n{}", format!("---\nkind: A\n{bomb}").repeat(100));
        let reading = read(&text, Format::Yaml);
        assert!(
            (1..10).contains(&reading.objects.len()),
            "{}",
            reading.objects.len()
        );
        let last = reading.errors.last().unwrap().to_string();
        assert!(last.contains("alias expansion exceeds"), "{last}");
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
