// SPDX-License-Identifier: Apache-2.0
//! Code that all kinds share: object metadata, problems, and typed parsing that reports the path of
//! every error.

use std::collections::BTreeMap;

use mesh_plan::cluster::{ObjectRef, Rejection};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ParsedObject;
use super::kinds::{Kind, Scope};
use super::validate::subdomain;

/// The identity of an object.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) object: ObjectRef,
    pub(super) uid: String,
}

/// An object before parsing.
pub(super) struct RawObject<'a> {
    pub(super) head: &'a Head,
    pub(super) value: &'a Value,
    pub(super) standalone: bool,
}

impl RawObject<'_> {
    pub(super) fn namespace(&self) -> &str {
        &self.head.object.namespace
    }

    /// The value at a path of keys; `None` if it is absent or null.
    pub(super) fn raw(&self, path: &[&str]) -> Option<&Value> {
        path.iter()
            .try_fold(self.value, |value, key| value.get(key))
            .filter(|value| !value.is_null())
    }

    /// The labels whose values are strings.
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

/// The problems and warnings of one object, each with the path of its field.
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

    /// Takes the value of a result. Records an error as a problem of the field.
    pub(super) fn check<T>(&mut self, field: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|why| self.reject(field, why)).ok()
    }
}

/// The replacement for a rejected object that has no last good version.
pub(super) struct Fallback {
    pub(super) parsed: Option<ParsedObject>,
    pub(super) consequence: String,
}

impl Fallback {
    pub(super) fn nothing(consequence: &str) -> Self {
        Self {
            parsed: None,
            consequence: consequence.to_owned(),
        }
    }
}

/// The metadata field that makes an object unusable, and the reason.
pub(super) struct BadHead {
    field: &'static str,
    why: String,
}

impl BadHead {
    pub(super) fn of(&self, kind: Kind, origin: &str) -> Rejection {
        unnamed(kind.name(), origin, self.field, &self.why)
    }
}

/// Reads the identity of an object of a known kind.
pub(super) fn head(kind: Kind, object: &Value) -> Result<Head, BadHead> {
    let metadata = object.get("metadata");
    let bad = |field, why: &str| BadHead {
        field,
        why: why.to_owned(),
    };
    let text = |field: &'static str| match metadata.and_then(|m| m.get(field)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(bad(
            field,
            "must be a string; quote values that YAML reads as a boolean or a number (on, no, 1)",
        )),
    };
    let name = text("name")?
        .filter(|name| !name.is_empty())
        .ok_or_else(|| bad("name", "is required"))?;
    subdomain(name).map_err(|why| bad("name", &why))?;
    let namespace = match (kind.scope(), text("namespace")?) {
        (Scope::Cluster, _) => "",
        (Scope::Namespaced, None | Some("")) => "default",
        (Scope::Namespaced, Some(namespace)) => {
            subdomain(namespace).map_err(|why| bad("namespace", &why))?;
            namespace
        }
    };
    Ok(Head {
        object: ObjectRef::new(kind.name(), namespace, name),
        uid: text("uid")?.unwrap_or_default().to_owned(),
    })
}

/// The rejection of an object without a usable name. The file of the object replaces the name.
pub(super) fn unnamed(kind: &str, origin: &str, field: &str, why: &str) -> Rejection {
    let place = if origin.is_empty() {
        "(no name)"
    } else {
        origin
    };
    Rejection {
        object: ObjectRef::new(kind, "", place),
        field: format!("metadata.{field}"),
        why: why.to_owned(),
        consequence: "the object is ignored".to_owned(),
    }
}

/// Deserializes a value. A wrong type is a problem with its path, an unknown field a warning.
pub(super) fn typed<T: DeserializeOwned>(value: &Value, issues: &mut Issues) -> Option<T> {
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let reader = serde_path_to_error::Deserializer::new(value, &mut track);
    let result: Result<T, _> =
        serde_ignored::deserialize(reader, |path| unknown.push(dotted(&path)));
    for field in unknown {
        issues.warn(field, "unknown field; it is ignored");
    }
    match result {
        Ok(read) => Some(read),
        Err(error) => {
            issues.reject(track.path().to_string(), error.to_string());
            None
        }
    }
}

/// Formats a path as rejections show it: `spec.ingress[0].from`.
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

/// An object of one of the mesh's own kinds. Only its `spec` is used; the other fields are listed so
/// that they are not reported as unknown.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OwnObject<S> {
    #[serde(rename = "apiVersion", default)]
    _api_version: String,
    #[serde(rename = "kind", default)]
    _kind: String,
    #[serde(rename = "metadata")]
    _metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    spec: S,
    #[serde(rename = "status", default)]
    _status: Value,
}

/// Parses the `spec` of an object of the mesh's own kinds.
pub(super) fn own_spec<S: DeserializeOwned>(value: &Value, issues: &mut Issues) -> Option<S> {
    typed::<OwnObject<S>>(value, issues).map(|object| object.spec)
}
