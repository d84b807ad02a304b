// SPDX-License-Identifier: Apache-2.0
//! Converts YAML to JSON values, within bounds.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput, Tag};
use serde_json::{Map, Number, Value};

use super::{Error, MAX_DEPTH};

/// The largest growth of a text by alias expansion, as a factor.
const MAX_GROWTH: usize = 10;
/// The size to which even a small text may grow, in bytes of strings plus [`NODE_WEIGHT`] per node.
const MIN_BUDGET: usize = 1 << 20;
/// The size of a node without its strings.
const NODE_WEIGHT: usize = 16;

/// The size to which a text may grow by alias expansion.
pub(super) fn budget(text: &str) -> usize {
    (text.len() * MAX_GROWTH).max(MIN_BUDGET)
}

/// Reads the documents of a text, or of a part of one, and takes their size from the budget of the text.
pub(super) fn documents(text: &str, budget: &mut usize) -> Result<Vec<Value>, Error> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader {
        parser: Parser::new_from_str(text),
        anchors: BTreeMap::new(),
        budget: *budget,
    };
    let documents = reader.documents();
    *budget = reader.budget;
    documents
}

struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    /// The value of each anchor, and its size.
    anchors: BTreeMap<usize, (Value, usize)>,
    /// The remaining size.
    budget: usize,
}

type Located<'a> = (Event<'a>, Span);

impl<'a> Reader<'a> {
    fn documents(&mut self) -> Result<Vec<Value>, Error> {
        let mut documents = Vec::new();
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(documents),
                (Event::DocumentStart(_), _) => {
                    self.anchors.clear();
                    let event = self.next()?;
                    documents.push(self.node(event, 0)?);
                }
                _ => {}
            }
        }
    }

    fn next(&mut self) -> Result<Located<'a>, Error> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(Error::Yaml {
                line: error.marker().line(),
                column: error.marker().col() + 1,
                why: error.info().to_owned(),
            }),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn spend(&mut self, weight: usize, at: Span) -> Result<(), Error> {
        match self.budget.checked_sub(weight) {
            Some(rest) => {
                self.budget = rest;
                Ok(())
            }
            None => Err(fail(at, "alias expansion exceeds the size limit")),
        }
    }

    fn node(&mut self, (event, at): Located<'a>, depth: usize) -> Result<Value, Error> {
        if depth > MAX_DEPTH {
            return Err(fail(
                at,
                format!("nested more than {MAX_DEPTH} levels deep"),
            ));
        }
        let before = self.budget;
        let (anchor, value) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.spend(NODE_WEIGHT + text.len(), at)?;
                (anchor, scalar(&text, style, tag.as_deref(), at)?)
            }
            Event::SequenceStart(anchor, tag) => {
                self.spend(NODE_WEIGHT, at)?;
                only_core(tag.as_deref(), "seq", at)?;
                (anchor, self.sequence(depth)?)
            }
            Event::MappingStart(anchor, tag) => {
                self.spend(NODE_WEIGHT, at)?;
                only_core(tag.as_deref(), "map", at)?;
                (anchor, self.mapping(depth)?)
            }
            Event::Alias(anchor) => {
                let Some((value, weight)) = self.anchors.get(&anchor).cloned() else {
                    return Err(fail(at, "alias refers to a value that contains it"));
                };
                self.spend(weight, at)?;
                return Ok(value);
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::SequenceEnd
            | Event::MappingEnd => return Ok(Value::Null),
        };
        if anchor != 0 {
            self.anchors
                .insert(anchor, (value.clone(), before - self.budget));
        }
        Ok(value)
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, Error> {
        let mut items = Vec::new();
        loop {
            let event = self.next()?;
            match event {
                (Event::SequenceEnd | Event::StreamEnd, _) => return Ok(Value::Array(items)),
                event => items.push(self.node(event, depth + 1)?),
            }
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, Error> {
        let mut map = Map::new();
        let mut merges = Vec::new();
        loop {
            let (key, at) = match self.next()? {
                (Event::MappingEnd | Event::StreamEnd, _) => break,
                (Event::Scalar(text, style, ..), at) => {
                    self.spend(NODE_WEIGHT + text.len(), at)?;
                    if text == "<<" && style == ScalarStyle::Plain {
                        let event = self.next()?;
                        let merged = self.node(event, depth + 1)?;
                        merges.push((merged, at));
                        continue;
                    }
                    (text.into_owned(), at)
                }
                (_, at) => return Err(fail(at, "key must be a string")),
            };
            let event = self.next()?;
            let value = self.node(event, depth + 1)?;
            if map.contains_key(&key) {
                return Err(fail(at, format!("duplicate key {key:?}")));
            }
            map.insert(key, value);
        }
        for (merged, at) in merges {
            merge(&mut map, merged, at)?;
        }
        Ok(Value::Object(map))
    }
}

/// Merges the value of `<<`, a mapping or a list of mappings, into a mapping. Its own keys win.
fn merge(map: &mut Map<String, Value>, merged: Value, at: Span) -> Result<(), Error> {
    let sources = if let Value::Array(sources) = merged {
        sources
    } else {
        vec![merged]
    };
    for source in sources {
        let Value::Object(source) = source else {
            return Err(fail(
                at,
                "the value of << must be a mapping or a list of mappings",
            ));
        };
        for (key, value) in source {
            map.entry(key).or_insert(value);
        }
    }
    Ok(())
}

fn fail(at: Span, why: impl Into<String>) -> Error {
    Error::Yaml {
        line: at.start.line(),
        column: at.start.col() + 1,
        why: why.into(),
    }
}

fn core_name(tag: &Tag) -> Option<&str> {
    tag.is_yaml_core_schema().then_some(tag.suffix.as_str())
}

fn only_core(tag: Option<&Tag>, name: &str, at: Span) -> Result<(), Error> {
    match tag {
        Some(tag) if core_name(tag) != Some(name) => Err(unknown_tag(tag, at)),
        _ => Ok(()),
    }
}

fn unknown_tag(tag: &Tag, at: Span) -> Error {
    fail(at, format!("unknown tag {}{}", tag.handle, tag.suffix))
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, at: Span) -> Result<Value, Error> {
    match tag {
        Some(tag) => match core_name(tag) {
            Some("str") => Ok(Value::from(text)),
            Some("null" | "bool" | "int" | "float") => Ok(plain(text)),
            _ => Err(unknown_tag(tag, at)),
        },
        None if style == ScalarStyle::Plain => Ok(plain(text)),
        None => Ok(Value::from(text)),
    }
}

/// Converts an unquoted scalar.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Value::from(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            Value::from(false)
        }
        _ => number(text).map_or_else(|| Value::from(text), Value::Number),
    }
}

fn number(text: &str) -> Option<Number> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    if let Some(whole) = integer(digits) {
        return match (negative, i64::try_from(whole)) {
            (false, _) => Some(whole.into()),
            (true, Ok(whole)) => Some((-whole).into()),
            (true, Err(_)) => None,
        };
    }
    let float = digits
        .bytes()
        .all(|b| b.is_ascii_digit() || b".eE+-".contains(&b))
        .then(|| text.parse::<f64>().ok())??;
    Number::from_f64(float)
}

fn integer(digits: &str) -> Option<u64> {
    let radix = |prefix, radix| {
        let digits = digits.strip_prefix(prefix)?;
        digits
            .starts_with(|c: char| c.is_ascii_alphanumeric())
            .then(|| u64::from_str_radix(digits, radix).ok())?
    };
    if digits.bytes().all(|b| b.is_ascii_digit()) && (digits.len() == 1 || !digits.starts_with('0'))
    {
        return digits.parse().ok();
    }
    radix("0x", 16)
        .or_else(|| radix("0o", 8))
        .or_else(|| radix("0b", 2))
        .or_else(|| radix("0", 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn one(text: &str) -> Value {
        documents(text, &mut budget(text)).unwrap().remove(0)
    }

    fn error(text: &str) -> String {
        documents(text, &mut budget(text)).unwrap_err().to_string()
    }

    #[test]
    fn scalars_are_converted_like_kubectl() {
        let rows = [
            ("80", json!(80)),
            ("-1", json!(-1)),
            ("0644", json!(0o644)),
            ("0x1F", json!(31)),
            ("1.5", json!(1.5)),
            ("1e3", json!(1000.0)),
            ("10.0.0.1", json!("10.0.0.1")),
            ("1.2.3", json!("1.2.3")),
            ("fd00::1", json!("fd00::1")),
            ("yes", json!(true)),
            ("Off", json!(false)),
            ("y", json!("y")),
            ("~", json!(null)),
            ("\"80\"", json!("80")),
            ("'true'", json!("true")),
            ("!!str 80", json!("80")),
            ("1h", json!("1h")),
            ("+", json!("+")),
            ("-", json!([null])),
            ("09", json!(9.0)),
            ("2024-01-01", json!("2024-01-01")),
            ("|\n  a\n  b\n", json!("a\nb\n")),
        ];
        for (text, expected) in rows {
            assert_eq!(one(text), expected, "{text}");
        }
    }

    #[test]
    fn documents_aliases_and_merge_keys_are_read() {
        let all = |text| documents(text, &mut budget(text)).unwrap();
        assert_eq!(all("a: 1\n---\nb: 2\n...\n").len(), 2);
        assert_eq!(all(""), Vec::<Value>::new());
        assert_eq!(
            one("x: &x {a: 1, b: 2}\ny: *x\nz: {<<: *x, b: 3}\n"),
            json!({"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 2}, "z": {"a": 1, "b": 3}})
        );
        assert_eq!(
            one("{z: {<<: [{a: 1}, {a: 2, b: 2}]}}"),
            json!({"z": {"a": 1, "b": 2}})
        );
    }

    #[test]
    fn errors_have_line_and_column() {
        assert_eq!(
            error("a: 1\na: 2\n"),
            "line 2, column 1: duplicate key \"a\""
        );
        assert!(error("a: [1\n").starts_with("line "));
        assert!(error("a: !secret b\n").contains("unknown tag !secret"));
        assert!(error("? [a]\n: b\n").contains("key must be a string"));
    }

    #[test]
    fn nesting_and_aliases_are_bounded() {
        let deep = "[".repeat(5_000) + &"]".repeat(5_000);
        assert!(error(&deep).contains("recursion limit"), "{}", error(&deep));
        let deep = "- ".repeat(5_000);
        assert!(error(&deep).contains("deep"), "{}", error(&deep));
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..12 {
            let of = vec![format!("*a{}", i - 1); 10].join(",");
            bomb += &format!("a{i}: &a{i} [{of}]\n");
        }
        assert!(error(&bomb).contains("alias expansion exceeds"));
    }
}
