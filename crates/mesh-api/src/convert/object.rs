// SPDX-License-Identifier: Apache-2.0
//! What all kinds have in common: the object's head, its problems, and typed reading with the path
//! of every error.

use std::collections::BTreeMap;

use mesh_plan::cluster::{ObjectRef, Rejection};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::kinds::Kind;
use super::validate::subdomain;
use super::{Fact, Object};

/// Who an object is.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) object: ObjectRef,
    pub(super) uid: String,
}

/// An object on its way.
pub(super) struct Subject<'a> {
    pub(super) head: &'a Head,
    pub(super) value: &'a Value,
    pub(super) standalone: bool,
}

impl Subject<'_> {
    pub(super) fn namespace(&self) -> &str {
        &self.head.object.namespace
    }

    /// The value at a path of keys, if it is there and not null.
    pub(super) fn raw(&self, path: &[&str]) -> Option<&Value> {
        path.iter()
            .try_fold(self.value, |value, key| value.get(key))
            .filter(|value| !value.is_null())
    }

    /// The labels that are strings.
    pub(super) fn labels(&self) -> BTreeMap<String, String> {
        self.strings("labels")
    }

    pub(super) fn annotation(&self, name: &str) -> Option<String> {
        self.strings("annotations").remove(name)
    }

    fn strings(&self, field: &str) -> BTreeMap<String, String> {
        self.raw(&["metadata", field])
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    }
}

/// What is wrong with an object, and what is odd.
#[derive(Default)]
pub(super) struct Issues {
    pub(super) problems: Vec<(String, String)>,
    pub(super) warnings: Vec<(String, String)>,
}

impl Issues {
    pub(super) fn reject(&mut self, field: impl Into<String>, why: impl Into<String>) {
        self.problems.push((field.into(), why.into()));
    }

    pub(super) fn warn(&mut self, field: impl Into<String>, what: impl Into<String>) {
        self.warnings.push((field.into(), what.into()));
    }

    /// Adds the field to what went wrong; `None` after that.
    pub(super) fn check<T>(&mut self, field: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|why| self.reject(field, why)).ok()
    }
}

/// What holds for a rejected object that was never good.
pub(super) struct Held {
    pub(super) fact: Option<Fact>,
    pub(super) consequence: String,
}

impl Held {
    pub(super) fn nothing(consequence: &str) -> Self {
        Self {
            fact: None,
            consequence: consequence.to_owned(),
        }
    }
}

/// Which field of an object's head is wrong, and why.
pub(super) struct BadHead {
    field: &'static str,
    why: String,
}

impl BadHead {
    pub(super) fn of(&self, kind: &Kind, object: &Object) -> Rejection {
        nameless(kind.name, object, self.field, &self.why)
    }
}

/// The head of an object of a known kind.
pub(super) fn head(kind: &Kind, object: &Object) -> Result<Head, BadHead> {
    let metadata = object.value.get("metadata");
    let bad = |field, why: &str| BadHead {
        field,
        why: why.to_owned(),
    };
    let text = |field: &'static str| match metadata.and_then(|m| m.get(field)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(bad(
            field,
            "must be a string, quoted where YAML reads something else (on, no, 1)",
        )),
    };
    let name = text("name")?
        .filter(|name| !name.is_empty())
        .ok_or_else(|| bad("name", "is missing"))?;
    subdomain(name).map_err(|why| bad("name", &why))?;
    let namespace = match (kind.namespaced, text("namespace")?) {
        (false, _) => "",
        (true, None | Some("")) => "default",
        (true, Some(namespace)) => {
            subdomain(namespace).map_err(|why| bad("namespace", &why))?;
            namespace
        }
    };
    Ok(Head {
        object: ObjectRef::new(kind.name, namespace, name),
        uid: text("uid")?.unwrap_or_default().to_owned(),
    })
}

/// The rejection of an object that cannot be named: its place stands for its name.
pub(super) fn nameless(kind: &str, object: &Object, field: &str, why: &str) -> Rejection {
    let place = if object.origin.is_empty() {
        "(no name)"
    } else {
        &object.origin
    };
    Rejection {
        object: ObjectRef::new(kind, "", place),
        field: format!("metadata.{field}"),
        why: why.to_owned(),
        consequence: "the object is not used".to_owned(),
    }
}

/// Reads a value as a type. A wrong type rejects with its path, unknown fields are warned about.
pub(super) fn typed<T: DeserializeOwned>(value: &Value, issues: &mut Issues) -> Option<T> {
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let reader = serde_path_to_error::Deserializer::new(value, &mut track);
    let result: Result<T, _> =
        serde_ignored::deserialize(reader, |path| unknown.push(dotted(&path)));
    for field in unknown {
        issues.warn(field, "is no field of this kind; ignored");
    }
    match result {
        Ok(read) => Some(read),
        Err(error) => {
            issues.reject(track.path().to_string(), error.to_string());
            None
        }
    }
}

/// `spec.ingress[0].from`, as rejections are written.
fn dotted(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", dotted(parent)),
        Path::Map { parent, key } => {
            let parent = dotted(parent);
            if parent.is_empty() {
                key.clone()
            } else {
                format!("{parent}.{key}")
            }
        }
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => dotted(parent),
    }
}

/// An object of the mesh's own kinds, of which only the `spec` matters here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Own<S> {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(rename = "metadata")]
    _metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    spec: S,
    #[serde(rename = "status", default)]
    _status: Value,
}

/// The `spec` of an object of the mesh's own kinds.
pub(super) fn own_spec<S: DeserializeOwned>(value: &Value, issues: &mut Issues) -> Option<S> {
    typed::<Own<S>>(value, issues).map(|own| own.spec)
}
