// SPDX-License-Identifier: Apache-2.0
//! Compares the CRDs in `deploy/crds` with the types. `MESH_BLESS=1` (`cargo xtask generate`) rewrites
//! them.

use std::path::Path;
use std::{env, fs};

#[test]
fn crds_are_up_to_date() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds");
    let bless = env::var_os("MESH_BLESS").is_some();
    let mut expected = Vec::new();
    for (plural, definition) in mesh_api::crd::definitions().unwrap() {
        let name = format!("{plural}.yaml");
        let text = format!(
            "# SPDX-License-Identifier: Apache-2.0\n\
             # Generated from crates/mesh-api/src/crd by `cargo xtask generate`; do not edit.\n{}",
            serde_saphyr::to_string(&definition).unwrap()
        );
        let path = dir.join(&name);
        if bless {
            fs::create_dir_all(&dir).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == text,
            "deploy/crds/{name} is not as generated; run `cargo xtask generate`"
        );
        expected.push(name);
    }
    for entry in fs::read_dir(&dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(expected.contains(&name), "deploy/crds/{name} has no kind");
    }
}
