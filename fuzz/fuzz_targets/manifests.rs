// SPDX-License-Identifier: Apache-2.0
//! Manifests in YAML, and the objects in them: what `--source dir:` and `meshctl` read.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _seen = mesh_api::fuzzing::manifests(text);
});
