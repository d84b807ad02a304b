// SPDX-License-Identifier: Apache-2.0
//! Pruned objects convert to the same snapshot as whole objects.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use mesh_api::manifests::{Format, objects};
use mesh_api::{Kind, LastGood, Object, Options, convert};
use serde_json::Value;

/// Kinds that the golden examples do not have.
const REPORTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, uid: shop-1, labels: {mesh.rs/dataplane: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: a, uid: a-1}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web-1}
spec: {nodeName: a, containers: [{name: web, image: none}]}
status: {phase: Running, podIP: 10.1.0.1}
---
apiVersion: mesh.rs/v1alpha1
kind: MeshNode
metadata: {name: a, uid: a-2, managedFields: [{manager: mesh-agent}]}
spec: {}
status:
  version: 0.1.0
  observedAt: 2026-01-01T00:00:00Z
  enrolledNamespaces: [shop-1]
  enrolledPods: [web-1]
  inForce: [{kind: MeshPolicy, namespace: shop, name: p, uid: p-1, generation: 1}]
---
apiVersion: mesh.rs/v1alpha1
kind: MeshTrafficPolicy
metadata: {name: web, namespace: shop, uid: t-1}
spec: {targetRef: {name: web}}
";

fn kind(object: &Value) -> Option<Kind> {
    let is =
        |kind: &&Kind| object["apiVersion"] == kind.api_version() && object["kind"] == kind.name();
    Kind::ALL.iter().find(is).copied()
}

fn pruned(object: &Value, kind: Kind) -> Value {
    let mut pruned = kind
        .read_pruned(&object.to_string())
        .expect("an object is JSON");
    for field in ["apiVersion", "kind"] {
        pruned[field] = object[field].clone();
    }
    pruned
}

#[test]
fn pruned_objects_convert_like_whole_objects() {
    let options = Options { standalone: false };
    let outcome = |values: Vec<Value>| {
        let object = |value| Object {
            origin: "API".to_owned(),
            value,
        };
        let objects: Vec<_> = values.into_iter().map(object).collect();
        convert(&objects, &LastGood::default(), options)
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let examples = fs::read_dir(root).expect("tests/golden").map(|example| {
        let path = example.expect("an example").path();
        let text = fs::read_to_string(path.join("objects.yaml")).expect("objects.yaml");
        (path.display().to_string(), text)
    });
    let examples = examples.chain([("reports".to_owned(), REPORTS.to_owned())]);
    let mut seen = BTreeSet::new();
    for (example, text) in examples {
        let mut whole = objects(&text, Format::Yaml).expect("YAML");
        whole.retain(|object| kind(object).is_some());
        let pruned = whole.iter().map(|object| {
            let kind = kind(object).expect("others are left out");
            seen.insert(kind);
            pruned(object, kind)
        });
        let pruned = pruned.collect();
        assert_eq!(outcome(whole), outcome(pruned), "{example}");
    }
    let missing: Vec<_> = Kind::ALL
        .iter()
        .filter(|kind| !seen.contains(*kind))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
