// SPDX-License-Identifier: Apache-2.0
//! Reads truth tables from files.

use std::path::Path;

use anyhow::{Context, Result};
use mesh_api::Object;
use mesh_api::truth::{Manifest, Table, tables};

use crate::input;

/// Reads the tables of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<Table>> {
    let (text, format) = input::read(path)?;
    tables(&text, format).with_context(|| path.display().to_string())
}

/// Reads the objects of a table.
pub(crate) fn objects(table: &Table, file: &Path) -> Result<Vec<Object>> {
    let base = file.parent().unwrap_or(Path::new(""));
    let mut objects = Vec::new();
    for manifest in &table.manifests {
        match manifest {
            Manifest::Path(path) => input::manifests(&base.join(path), &mut objects)?,
            Manifest::Object(value) => {
                let mut flat = Vec::new();
                mesh_api::manifests::flatten(value.clone(), 1, &mut flat)?;
                objects.extend(flat.into_iter().map(|value| Object {
                    origin: file.display().to_string(),
                    value,
                }));
            }
        }
    }
    Ok(objects)
}
