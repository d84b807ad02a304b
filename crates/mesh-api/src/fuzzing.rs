// SPDX-License-Identifier: Apache-2.0
//! The fuzzing entry point for manifests, with the invariants of any text. It is compiled only for tests
//! and for `cargo xtask fuzz`.

use crate::manifests::{Format, documents, objects};
use crate::{LastGood, Object, Options, convert};

/// Parses and converts a text like `--source dir:` and `meshctl`. Returns the outcomes that occurred.
///
/// # Panics
/// An invariant is violated.
pub fn manifests(text: &str) -> Vec<&'static str> {
    let Ok(values) = objects(text, Format::Yaml) else {
        return vec!["not YAML"];
    };
    // Every value from YAML can be written as JSON, and is the same when read again.
    for value in &values {
        let json = serde_json::to_string(value).expect("a value without foreign keys");
        let again = documents(&json, Format::Json).expect("JSON of our own is read");
        assert_eq!(again, std::slice::from_ref(value));
    }
    let objects: Vec<_> = values
        .into_iter()
        .map(|value| Object {
            origin: "a.yaml".to_owned(),
            value,
        })
        .collect();
    let standalone = Options { standalone: true };
    let outcome = convert(&objects, &LastGood::default(), standalone);
    let again = convert(&objects, &outcome.last_good, standalone);
    assert_eq!(
        outcome.cluster, again.cluster,
        "converting again with the last good versions gives the same snapshot"
    );
    let mut seen = vec!["read"];
    if !outcome.rejections.is_empty() {
        seen.push("rejected");
    }
    if !outcome.warnings.is_empty() {
        seen.push("warning");
    }
    seen
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn corpus_covers_every_outcome() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let in_dir = |dir: &str| {
            let entries = fs::read_dir(root.join(dir)).expect("the corpus is there");
            entries.map(|entry| entry.expect("it can be listed").path())
        };
        let golden = in_dir("tests/golden").map(|case| case.join("objects.yaml"));
        let mut gone = BTreeSet::new();
        for file in in_dir("../../fuzz/corpus/manifests").chain(golden) {
            gone.extend(manifests(&fs::read_to_string(file).expect("text")));
        }
        assert_eq!(
            gone,
            BTreeSet::from(["not YAML", "read", "rejected", "warning"])
        );
    }
}
