// SPDX-License-Identifier: Apache-2.0
//! The copy of the crates that `meshctl` is made of, with all mutations in it.
//!
//! Files are written only where their content changes, so that the next build is an incremental one.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::mutation::{self, Edits, Mutation};
use crate::run;

/// The crates, and how each calls the switch.
const CRATES: [(&str, &str); 4] = [
    ("mesh-common", "crate::mutation"),
    ("mesh-plan", "mesh_common::mutation"),
    ("mesh-api", "mesh_plan::mutation"),
    ("mesh-cli", "mesh_plan::mutation"),
];

/// The switch, at the end of mesh-common; on or off for a whole run.
const SWITCH: &str = r#"
#[allow(missing_docs, clippy::all, reason = "only in this copy")]
pub fn mutation(number: u32) -> bool {
    extern crate std;
    static ON: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    let read = || std::env::var("MESH_MUTATION").ok()?.parse().ok();
    *ON.get_or_init(|| read().unwrap_or(0)) == number
}
"#;

/// Builds it; where the program is.
pub(crate) fn build(mutations: &[Mutation]) -> Result<PathBuf> {
    let base = run::root().join("target/mutations");
    let workspace = base.join("workspace");
    let edits = mutation::edits(mutations);
    for file in edits.keys() {
        let known = |(name, _): &(&str, &str)| Path::new(file).starts_with(name);
        ensure!(CRATES.iter().any(known), "{file} is in no crate of meshctl");
    }
    for (name, switch) in CRATES {
        copy(&workspace, Path::new(name), switch, &edits)?;
    }
    let manifest = fs::read_to_string(run::root().join("Cargo.toml"))?;
    write(&workspace.join("Cargo.toml"), &members(&manifest)?)?;
    let lock = fs::read_to_string(run::root().join("Cargo.lock"))?;
    write(&workspace.join("Cargo.lock"), &lock)?;
    let mut cargo = run::cargo(["build", "--quiet", "--package", "mesh-cli"]);
    cargo
        .arg("--manifest-path")
        .arg(workspace.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(base.join("target"))
        // Faults need not be well written.
        .env("RUSTFLAGS", "--cap-lints=allow");
    run::show(&mut cargo)?;
    Ok(base.join("target/debug/meshctl"))
}

/// The workspace's manifest, for the crates that are copied.
fn members(manifest: &str) -> Result<String> {
    let mut manifest: toml::Table = manifest.parse()?;
    let workspace = manifest
        .get_mut("workspace")
        .and_then(toml::Value::as_table_mut);
    let workspace = workspace.context("Cargo.toml is not a workspace's")?;
    let names = CRATES.map(|(name, _)| toml::Value::from(name));
    workspace.insert("members".to_owned(), names.to_vec().into());
    workspace.remove("default-members");
    Ok(manifest.to_string())
}

/// Copies a directory of the workspace, and removes from the copy what is no longer there.
fn copy(workspace: &Path, directory: &Path, switch: &str, edits: &Edits<'_>) -> Result<()> {
    let mut names = BTreeSet::new();
    let from = run::root().join(directory);
    for entry in from
        .read_dir()
        .with_context(|| from.display().to_string())?
    {
        let entry = entry?;
        let path = directory.join(entry.file_name());
        names.insert(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(workspace, &path, switch, edits)?;
            continue;
        }
        let Ok(mut text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        let shown = path.to_string_lossy();
        if let Some(edits) = edits.get(&*shown) {
            text = mutation::apply(&text, edits, switch).with_context(|| shown.to_string())?;
        }
        match &*shown {
            "mesh-common/src/lib.rs" => text += SWITCH,
            "crates/mesh-plan/src/lib.rs" => text += "\npub use mesh_common::mutation;\n",
            _ => {}
        }
        write(&workspace.join(&path), &text)?;
    }
    for entry in workspace.join(directory).read_dir()? {
        let entry = entry?;
        if names.contains(&entry.file_name()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|known| known == text) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text).with_context(|| path.display().to_string())
}
