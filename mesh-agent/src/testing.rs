// SPDX-License-Identifier: Apache-2.0
//! Helpers of unit tests.

use std::path::Path;

/// Compares a generated file of the repository with what it should be; `MESH_BLESS=1` rewrites it.
pub(crate) fn golden(path: &str, expected: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let file = root.join(path);
    if std::env::var_os("MESH_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&file, expected).expect("the generated file can be written");
        return;
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == expected,
        "{path} is not what the code says. Run: cargo xtask generate"
    );
}
