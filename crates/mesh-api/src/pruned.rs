// SPDX-License-Identifier: Apache-2.0
//! Reads pruned objects: a JSON object with only the fields that conversion and watches use.
//!
//! Other fields are skipped in the text and never allocated. Most of a Pod or a Node is not used.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use Fields::{All, Only};

/// The fields to keep of a value. For a list, they apply to each element.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fields {
    /// Keeps everything.
    All,
    /// Keeps these keys.
    Only(&'static [(&'static str, Self)]),
}

const METADATA: Fields = Only(&[
    // A mirror pod names the static pod that it mirrors.
    ("annotations", Only(&[("kubernetes.io/config.mirror", All)])),
    ("deletionTimestamp", All),
    ("generation", All),
    ("labels", All),
    ("name", All),
    ("namespace", All),
    (
        "ownerReferences",
        Only(&[("controller", All), ("kind", All), ("name", All)]),
    ),
    ("resourceVersion", All),
    ("uid", All),
]);

const CONTAINER: Fields = Only(&[("name", All), ("ports", All), ("restartPolicy", All)]);

pub(crate) const METADATA_ONLY: Fields = Only(&[("metadata", METADATA)]);

pub(crate) const POD: Fields = Only(&[
    ("metadata", METADATA),
    (
        "spec",
        Only(&[
            ("containers", CONTAINER),
            ("hostNetwork", All),
            ("initContainers", CONTAINER),
            ("nodeName", All),
            ("serviceAccountName", All),
        ]),
    ),
    (
        "status",
        Only(&[
            ("conditions", Only(&[("status", All), ("type", All)])),
            ("phase", All),
            ("podIP", All),
            ("podIPs", All),
        ]),
    ),
]);

pub(crate) const NODE: Fields = Only(&[
    ("metadata", METADATA),
    ("spec", Only(&[("podCIDR", All), ("podCIDRs", All)])),
    ("status", Only(&[("addresses", All)])),
]);

pub(crate) const SERVICE: Fields = Only(&[
    ("metadata", METADATA),
    ("spec", All),
    ("status", Only(&[("loadBalancer", All)])),
]);

pub(crate) const ENDPOINT_SLICE: Fields = Only(&[
    ("addressType", All),
    (
        "endpoints",
        Only(&[("addresses", All), ("conditions", All), ("nodeName", All)]),
    ),
    ("metadata", METADATA),
    ("ports", All),
]);

pub(crate) const METADATA_AND_SPEC: Fields = Only(&[("metadata", METADATA), ("spec", All)]);

pub(crate) const MESH_NODE: Fields = Only(&[
    ("metadata", METADATA),
    (
        "status",
        Only(&[("enrolledNamespaces", All), ("enrolledPods", All)]),
    ),
]);

impl Fields {
    fn of(self, key: &str) -> Option<Self> {
        match self {
            All => Some(All),
            Only(fields) => fields
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, fields)| *fields),
        }
    }
}

/// Reads one JSON value and keeps only the given fields.
pub(crate) fn read(json: &str, fields: Fields) -> serde_json::Result<Value> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let value = fields.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

impl<'de> DeserializeSeed<'de> for Fields {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(Pruned(self))
    }
}

struct Pruned(Fields);

impl<'de> Visitor<'de> for Pruned {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self.0)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            match self.0.of(&key) {
                Some(fields) => {
                    let value = map.next_value_seed(fields)?;
                    values.insert(key, value);
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(values.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_listed_fields_are_kept() {
        const FIELDS: Fields = Only(&[("spec", Only(&[("ports", All)])), ("name", All)]);
        let text = json!({
            "name": "x", "managedFields": [{"a": 1}],
            "spec": [{"ports": [{"n": 1, "deep": {"x": [1.5, -1, true, null]}}], "image": "i"}],
        });
        assert_eq!(
            read(&text.to_string(), FIELDS).unwrap(),
            json!({
                "name": "x",
                "spec": [{"ports": [{"n": 1, "deep": {"x": [1.5, -1, true, null]}}]}],
            })
        );
        assert_eq!(read(&text.to_string(), All).unwrap(), text);
        // Conversion rejects a wrong type, so pruning keeps it.
        assert_eq!(
            read(r#"{"spec":"text"}"#, FIELDS).unwrap(),
            json!({"spec": "text"})
        );
        assert!(read("{}{}", FIELDS).is_err());
    }
}
