// SPDX-License-Identifier: Apache-2.0
//! Manifests in YAML, and the objects in them: what `--source dir:` and `meshctl` read.
#![no_main]

use mesh_api::manifests::{Format, documents, objects};
use mesh_api::{LastGood, Object, Options, convert};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(values) = objects(text, Format::Yaml) else {
        return;
    };
    // What was read as YAML is JSON too, and is read as the same.
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
    assert_eq!(outcome.cluster, again.cluster, "last good is what was good");
});
