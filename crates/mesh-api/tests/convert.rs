// SPDX-License-Identifier: Apache-2.0
//! Tests of the conversion of valid and invalid objects.

#[path = "convert/invalid.rs"]
mod invalid;
#[path = "convert/last_good.rs"]
mod last_good;
#[path = "convert/mesh_kinds.rs"]
mod mesh_kinds;
#[path = "convert/network_policy.rs"]
mod network_policy;
#[path = "convert/workloads.rs"]
mod workloads;

use mesh_api::manifests::{Format, objects};
use mesh_api::{LastGood, Object, Options, Outcome, convert};
use mesh_plan::cluster::{ObjectName, ObjectRef, Policy, Service};

const STANDALONE: Options = Options { standalone: true };
const KUBERNETES: Options = Options { standalone: false };

fn read(text: &str) -> Vec<Object> {
    objects(text, Format::Yaml)
        .expect("test manifests are YAML")
        .into_iter()
        .map(|value| Object {
            origin: "test.yaml".to_owned(),
            value,
        })
        .collect()
}

fn standalone(text: &str) -> Outcome {
    convert(&read(text), &LastGood::default(), STANDALONE)
}

fn in_cluster(text: &str) -> Outcome {
    convert(&read(text), &LastGood::default(), KUBERNETES)
}

/// Converts objects that must have no rejections and warnings.
fn clean(text: &str) -> Outcome {
    let outcome = standalone(text);
    assert_eq!(outcome.rejections, [], "{text}");
    assert_eq!(outcome.warnings, [], "{text}");
    outcome
}

fn policy<'a>(outcome: &'a Outcome, kind: &str, name: &str) -> Option<&'a Policy> {
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    let object = ObjectRef::new(kind, namespace, name);
    outcome
        .cluster
        .policies
        .get(&object)
        .map(|policy| &**policy)
}

fn service<'a>(outcome: &'a Outcome, name: &str) -> &'a Service {
    let name = ObjectName::try_from(name.to_owned()).expect("NAMESPACE/NAME");
    &outcome.cluster.services[&name]
}

/// The rejections as text.
fn rejections(outcome: &Outcome) -> Vec<String> {
    outcome.rejections.iter().map(ToString::to_string).collect()
}

fn warnings(outcome: &Outcome) -> Vec<String> {
    outcome.warnings.iter().map(ToString::to_string).collect()
}
