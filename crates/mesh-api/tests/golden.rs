// SPDX-License-Identifier: Apache-2.0
//! Compares the maps that example objects produce with golden files.
//!
//! A case is a directory of `tests/golden`. `MESH_BLESS=1 cargo test -p mesh-api --test golden` rewrites
//! the golden files; review the difference before you commit it. Each case is also converted in other
//! orders, which must not matter, and with all objects deleted, which must leave empty maps.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_api::manifests::{Format, objects};
use mesh_api::{LastGood, Object, Options, Outcome, convert};
use mesh_plan::{Plan, compile, text};

const STANDALONE: Options = Options { standalone: true };

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut cases: Vec<_> = fs::read_dir(root)
        .expect("tests/golden is there")
        .map(|entry| entry.expect("it can be listed").path())
        .collect();
    cases.sort();
    assert!(!cases.is_empty());
    cases
}

fn read(case: &Path) -> Vec<Object> {
    let text = fs::read_to_string(case.join("objects.yaml")).expect("a case has objects.yaml");
    objects(&text, Format::Yaml)
        .expect("objects.yaml is YAML")
        .into_iter()
        .map(|value| Object {
            origin: "objects.yaml".to_owned(),
            value,
        })
        .collect()
}

/// Formats the rejections and warnings, and the maps of every node.
fn render(outcome: &Outcome) -> String {
    let mut lines: BTreeSet<String> = BTreeSet::new();
    lines.extend(outcome.rejections.iter().map(|r| format!("rejected: {r}")));
    lines.extend(outcome.warnings.iter().map(|w| format!("warning: {w}")));
    let mut nodes = String::new();
    for node in outcome.cluster.nodes.keys() {
        let (plan, rejections) = compile(&outcome.cluster, node);
        lines.extend(rejections.iter().map(|r| format!("rejected: {r}")));
        let _infallible = write!(nodes, "== {node}\n{}", text::render(&plan));
    }
    let mut all: String = lines.into_iter().map(|line| line + "\n").collect();
    all += &nodes;
    all
}

/// Other orders of the objects: riffled, reversed and rotated.
fn shuffles(objects: &[Object]) -> Vec<Vec<Object>> {
    let mut backwards = objects.to_vec();
    backwards.reverse();
    let mut cut = backwards.clone();
    cut.rotate_left(objects.len() / 3);
    let (even, odd): (Vec<_>, Vec<_>) = (0..objects.len()).partition(|i| i % 2 == 0);
    let riffled = odd.into_iter().chain(even).map(|i| objects[i].clone());
    vec![riffled.collect(), backwards, cut]
}

#[test]
fn golden_maps_match_in_any_order() {
    // Only this test reads the variable.
    #[allow(
        clippy::disallowed_methods,
        reason = "a test's switch, not configuration"
    )]
    let bless = std::env::var("MESH_BLESS").is_ok_and(|value| value == "1");
    let mut wrong = Vec::new();
    for case in cases() {
        let objects = read(&case);
        let outcome = convert(&objects, &LastGood::default(), STANDALONE);
        assert!(
            !outcome.cluster.nodes.is_empty(),
            "{} has no Node",
            case.display()
        );
        let text = render(&outcome);
        for other in shuffles(&objects) {
            let other = convert(&other, &LastGood::default(), STANDALONE);
            assert_eq!(
                render(&other),
                text,
                "{}: the order matters",
                case.display()
            );
        }
        let path = case.join("maps.txt");
        if bless {
            fs::write(&path, &text).expect("maps.txt can be written");
        } else if fs::read_to_string(&path).unwrap_or_default() != text {
            wrong.push(format!(
                "{} differs from the output:\n{text}",
                path.display()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn deleting_all_objects_leaves_empty_maps() {
    for case in cases() {
        let full = convert(&read(&case), &LastGood::default(), STANDALONE);
        let empty = convert(&[], &full.last_good, STANDALONE);
        for node in full.cluster.nodes.keys() {
            let (plan, rejections) = compile(&empty.cluster, node);
            assert_eq!(plan, Plan::default(), "{}", case.display());
            assert!(rejections.is_empty());
        }
    }
}
