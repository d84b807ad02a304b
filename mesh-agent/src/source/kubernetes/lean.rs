// SPDX-License-Identifier: Apache-2.0
//! Reads of an object only what is kept: the rest is passed over in the text, without a value being
//! made of it.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// What is kept of a value. Of a list, of each of its elements.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keep {
    /// Everything.
    All,
    /// These keys.
    Fields(&'static [(&'static str, Self)]),
}

impl Keep {
    fn of(self, key: &str) -> Option<Self> {
        match self {
            Self::All => Some(Self::All),
            Self::Fields(fields) => fields
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, keep)| *keep),
        }
    }
}

/// Reads a text.
pub(super) fn read(text: &str, keep: Keep) -> serde_json::Result<Value> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = keep.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

impl<'de> DeserializeSeed<'de> for Keep {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(Lean(self))
    }
}

struct Lean(Keep);

impl<'de> Visitor<'de> for Lean {
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
                Some(keep) => {
                    let value = map.next_value_seed(keep)?;
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

    use super::Keep::{All, Fields};
    use super::*;

    #[test]
    fn what_is_not_named_is_not_there() {
        const KEEP: Keep = Fields(&[("spec", Fields(&[("ports", All)])), ("name", All)]);
        let text = json!({
            "name": "x", "managedFields": [{"a": 1}],
            "spec": [{"ports": [{"n": 1, "deep": {"x": [1.5, -1, true, null]}}], "image": "i"}],
        });
        assert_eq!(
            read(&text.to_string(), KEEP).unwrap(),
            json!({
                "name": "x",
                "spec": [{"ports": [{"n": 1, "deep": {"x": [1.5, -1, true, null]}}]}],
            })
        );
        assert_eq!(read(&text.to_string(), All).unwrap(), text);
        // A wrong type is for who reads the object to reject.
        assert_eq!(
            read(r#"{"spec":"text"}"#, KEEP).unwrap(),
            json!({"spec": "text"})
        );
        assert!(read("{}{}", KEEP).is_err());
    }
}
