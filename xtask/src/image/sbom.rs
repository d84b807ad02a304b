// SPDX-License-Identifier: Apache-2.0
//! The bill of materials of the image in CycloneDX: every crate that its programs link.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::PROGRAMS;
use crate::run;

/// JSON by CycloneDX 1.5, from cargo's own resolution. No serial number and no time: the same lock
/// file gives the same bytes.
pub(super) fn sbom() -> Result<Vec<u8>> {
    let mut metadata = run::cargo(["metadata", "--format-version=1", "--locked", "--quiet"]);
    for target in ["x86_64-unknown-linux-gnu", "bpfel-unknown-none"] {
        metadata.args(["--filter-platform", target]);
    }
    let text = run::capture(&mut metadata)?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata is no JSON")?;
    let linked = linked(&metadata).context("cargo metadata has no such packages")?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let mut components: BTreeMap<String, Value> = BTreeMap::new();
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        if !linked.contains(text("id")) {
            continue;
        }
        let url = format!("pkg:cargo/{}@{}", text("name"), text("version"));
        let component = json!({
            "type": "library", "bom-ref": url, "purl": url,
            "name": text("name"), "version": text("version"),
            "licenses": [{ "expression": text("license") }],
        });
        components.insert(url, component);
    }
    let bom = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": { "component": {
            "type": "container", "name": "mesh", "version": env!("CARGO_PKG_VERSION"),
        }},
        "components": components.into_values().collect::<Vec<_>>(),
    });
    Ok((serde_json::to_string_pretty(&bom)? + "\n").into_bytes())
}

/// The ids of everything that the programs depend on, build and test dependencies aside; and the
/// kernel programs, which a build script makes.
fn linked(metadata: &Value) -> Option<BTreeSet<&str>> {
    let nodes = metadata["resolve"]["nodes"].as_array()?;
    let by_id: BTreeMap<&str, &Value> = nodes
        .iter()
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let packages = metadata["packages"].as_array()?;
    let id_of = |name: &str| {
        let found = packages.iter().find(|package| package["name"] == name)?;
        found["id"].as_str()
    };
    let names = PROGRAMS.iter().map(|(package, _)| *package);
    let mut todo = names
        .chain(["mesh-ebpf"])
        .map(id_of)
        .collect::<Option<Vec<_>>>()?;
    let mut linked = BTreeSet::new();
    while let Some(id) = todo.pop() {
        if !linked.insert(id) {
            continue;
        }
        for dependency in by_id.get(id)?["deps"].as_array()? {
            let kinds = dependency["dep_kinds"].as_array()?;
            if kinds.iter().any(|kind| kind["kind"].is_null()) {
                todo.push(dependency["pkg"].as_str()?);
            }
        }
    }
    Some(linked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sbom_lists_only_linked_crates() {
        let bom: Value = serde_json::from_slice(&sbom().expect("sbom")).expect("JSON");
        let components = bom["components"].as_array().expect("components");
        let has = |name: &str| components.iter().any(|one| one["name"] == name);
        assert!(has("rustls") && has("aya") && has("aya-ebpf") && has("mesh-plan"));
        assert!(!has("aya-build") && !has("mesh-test") && !has("xtask"));
        assert!(
            components
                .iter()
                .all(|one| one["licenses"][0]["expression"] != "")
        );
    }
}
