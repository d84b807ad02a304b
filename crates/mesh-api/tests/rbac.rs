// SPDX-License-Identifier: Apache-2.0
//! The RBAC rules and admission policies in `deploy` match the table of kinds.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use mesh_api::manifests::{Format, objects};
use mesh_api::{Kind, Origin, Scope};
use serde_json::Value;

/// The directories with generated manifests, and their source.
const INSTALLS: [&str; 3] = ["base", "helm/templates", "kustomize"];

/// The objects of a manifest below `deploy`. Templates of the chart are rendered as far as they are used
/// in these files.
fn manifest(path: &str) -> Vec<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../deploy")
        .join(path);
    let text = fs::read_to_string(&file).expect(path);
    let rendered: String = text
        .lines()
        .filter(|line| !line.starts_with("{{-"))
        .map(|line| line.replace("{{ .Release.Namespace }}", "mesh-system") + "\n")
        .collect();
    objects(&rendered, Format::Yaml).expect(path)
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.expect(name)
}

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    let items = value.as_array().into_iter().flatten();
    items.map(|item| item.as_str().expect("a list of strings"))
}

/// The pairs of API group and resource for which the rules grant a verb.
fn granted<'a>(role: &'a Value, verb: &str) -> BTreeSet<(&'a str, &'a str)> {
    let rules = role["rules"].as_array().expect("a role has rules");
    let rules = rules
        .iter()
        .filter(|rule| texts(&rule["verbs"]).any(|granted| granted == verb));
    pairs(rules)
}

fn pairs<'a>(rules: impl Iterator<Item = &'a Value>) -> BTreeSet<(&'a str, &'a str)> {
    let mut pairs = BTreeSet::new();
    for rule in rules {
        for group in texts(&rule["apiGroups"]) {
            pairs.extend(texts(&rule["resources"]).map(|resource| (group, resource)));
        }
    }
    pairs
}

fn is_policy(kind: Kind) -> bool {
    kind.origin() == Origin::Crd && kind != Kind::MeshNode
}

#[test]
fn agent_role_can_list_and_watch_exactly_the_kinds_of_the_table() {
    let expected: BTreeSet<_> = Kind::ALL.iter().map(|k| (k.group(), k.plural())).collect();
    for install in INSTALLS {
        let objects = manifest(&format!("{install}/agent-rbac.yaml"));
        let role = find(&objects, "ClusterRole", "mesh-agent");
        for verb in ["list", "watch"] {
            assert_eq!(granted(role, verb), expected, "{install}: {verb}");
        }
    }
}

#[test]
fn controller_role_can_write_the_status_of_every_own_policy() {
    let own = |kind: &&Kind| is_policy(**kind) && kind.group() == Kind::MeshPolicy.group();
    let expected: BTreeSet<_> = Kind::ALL.iter().filter(own).map(|k| k.plural()).collect();
    for install in INSTALLS {
        let objects = manifest(&format!("{install}/controller-rbac.yaml"));
        let role = find(&objects, "ClusterRole", "mesh-controller");
        let patched: BTreeSet<_> = granted(role, "patch")
            .into_iter()
            .filter_map(|(_, resource)| resource.strip_suffix("/status"))
            .collect();
        assert_eq!(patched, expected, "{install}");
    }
}

#[test]
fn admission_policy_keeps_agents_from_writing_every_policy_kind() {
    let mut expected = BTreeSet::new();
    for kind in Kind::ALL.iter().filter(|kind| is_policy(**kind)) {
        expected.insert((kind.group(), kind.plural().to_owned()));
        expected.insert((kind.group(), format!("{}/status", kind.plural())));
    }
    for install in INSTALLS {
        let objects = manifest(&format!("{install}/admission.yaml"));
        let policy = find(
            &objects,
            "ValidatingAdmissionPolicy",
            "mesh-agent-no-policy",
        );
        let rules = &policy["spec"]["matchConstraints"]["resourceRules"];
        let matched = pairs(rules.as_array().expect("resource rules").iter());
        let matched: BTreeSet<_> = matched
            .into_iter()
            .map(|(group, resource)| (group, resource.to_owned()))
            .collect();
        assert_eq!(matched, expected, "{install}");
    }
}

#[test]
fn custom_resource_definitions_match_the_table() {
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let defined: BTreeSet<_> = mesh_api::crd::definitions()
        .expect("definitions are JSON")
        .iter()
        .map(|(_, definition)| {
            let spec = &definition["spec"];
            [
                text(&spec["names"]["kind"]),
                text(&spec["group"]),
                text(&spec["versions"][0]["name"]),
                text(&spec["names"]["plural"]),
                text(&spec["scope"]),
            ]
        })
        .collect();
    let expected: BTreeSet<_> = Kind::ALL
        .iter()
        .filter(|kind| kind.origin() == Origin::Crd)
        .map(|kind| {
            let scope = match kind.scope() {
                Scope::Cluster => "Cluster",
                Scope::Namespaced => "Namespaced",
            };
            [
                kind.name(),
                kind.group(),
                kind.version(),
                kind.plural(),
                scope,
            ]
            .map(str::to_owned)
        })
        .collect();
    assert_eq!(defined, expected);
}
