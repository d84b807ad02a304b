// SPDX-License-Identifier: Apache-2.0
//! Replaces every field of every golden object by invalid values: conversion does not panic, and a
//! rejected object allows no traffic, with or without a last good version.

use std::fs;
use std::path::Path;

use mesh_api::manifests::{Format, objects};
use mesh_api::{LastGood, Object, Options, Outcome, convert};
use mesh_plan::cluster::{Authentication, Mtls, ObjectName, ObjectRef, Policy, RuleAction};
use serde_json::{Value, json};

fn convert_one(value: &Value, previous: &LastGood) -> Outcome {
    let object = Object {
        origin: String::new(),
        value: value.clone(),
    };
    convert(&[object], previous, Options { standalone: true })
}

fn all_objects() -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut all = Vec::new();
    for case in fs::read_dir(root).expect("tests/golden is there") {
        let path = case.expect("it can be listed").path().join("objects.yaml");
        let text = fs::read_to_string(path).expect("a case has objects.yaml");
        all.extend(objects(&text, Format::Yaml).expect("it is YAML"));
    }
    all
}

/// The JSON pointers of all values below a value.
fn pointers(value: &Value, at: &str, into: &mut Vec<String>) {
    if !at.is_empty() {
        into.push(at.to_owned());
    }
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    if let Value::Object(map) = value {
        for (key, below) in map {
            pointers(below, &format!("{at}/{}", escaped(key)), into);
        }
    } else if let Value::Array(items) = value {
        for (i, below) in items.iter().enumerate() {
            pointers(below, &format!("{at}/{i}"), into);
        }
    }
}

fn replacements() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(70000),
        json!(1.5),
        json!(""),
        json!("x"),
        json!("*/*"),
        json!("10.0.0.0/8"),
        json!([]),
        json!([[]]),
        json!([null]),
        json!({}),
        json!({"x": {}}),
    ]
}

fn name(value: &Value) -> Option<ObjectRef> {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind")?;
    let namespace = match kind.starts_with("Cluster") {
        true => "",
        false => text("/metadata/namespace").unwrap_or("default"),
    };
    Some(ObjectRef::new(kind, namespace, text("/metadata/name")?))
}

/// The policy of an object, if it has one.
fn policy<'a>(outcome: &'a Outcome, object: &ObjectRef) -> Option<&'a Policy> {
    outcome.cluster.policies.get(object).map(|policy| &**policy)
}

fn authentication<'a>(outcome: &'a Outcome, object: &ObjectRef) -> Option<&'a Authentication> {
    let name = ObjectName::new(&*object.namespace, &*object.name);
    outcome.cluster.authentications.get(&name)
}

/// Whether a policy allows nothing in its directions.
fn is_closed(policy: &Policy) -> bool {
    let mut rules = policy.ingress.iter().chain(&policy.egress).flatten();
    rules.all(|rule| rule.action == RuleAction::Deny)
}

#[test]
fn invalid_field_never_panics_and_never_allows_traffic() {
    let mut rejected = 0;
    for original in all_objects() {
        let good = convert_one(&original, &LastGood::default());
        let mut all = Vec::new();
        pointers(&original, "", &mut all);
        for pointer in all {
            for replacement in replacements() {
                let mut broken = original.clone();
                *broken.pointer_mut(&pointer).expect("it was there") = replacement;
                let new = convert_one(&broken, &LastGood::default());
                let update = convert_one(&broken, &good.last_good);
                let same = name(&broken).is_some_and(|object| Some(object) == name(&original));
                // An object with another name is another object.
                if new.rejections.is_empty() || !same || !good.rejections.is_empty() {
                    continue;
                }
                let Some(object) = name(&original) else {
                    continue;
                };
                let head = new.rejections[0].field.as_str();
                if head == "apiVersion" || head.starts_with("metadata") {
                    continue;
                }
                rejected += 1;
                let context = || format!("{pointer} of {original}: {broken}");
                assert_eq!(
                    policy(&update, &object),
                    policy(&good, &object),
                    "{}",
                    context()
                );
                assert_eq!(
                    authentication(&update, &object),
                    authentication(&good, &object),
                    "{}",
                    context()
                );
                if let Some(policy) = policy(&new, &object) {
                    assert!(is_closed(policy) && !policy.audit, "{}", context());
                }
                if object.kind == "NetworkPolicy" {
                    assert!(policy(&new, &object).is_some(), "{}", context());
                }
                if let Some(made) = authentication(&new, &object) {
                    let before = authentication(&good, &object).and_then(|good| good.mtls);
                    let laxer = made.mtls == Some(Mtls::Permissive) && before == Some(Mtls::Strict);
                    assert!(!laxer, "{}", context());
                }
            }
        }
    }
    assert!(rejected > 3000, "only {rejected} were rejected");
}
