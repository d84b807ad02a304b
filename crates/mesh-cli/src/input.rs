// SPDX-License-Identifier: Apache-2.0
//! Reads manifests from files and directories.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mesh_api::Object;
use mesh_api::manifests::{Format, objects};

/// Reads a file and detects its format.
pub(crate) fn read(path: &Path) -> Result<(String, Format)> {
    let Some(format) = path.to_str().and_then(Format::of) else {
        bail!(
            "{}: file name must end in .yaml, .yml or .json",
            path.display()
        );
    };
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok((text, format))
}

/// Reads the objects of a file, or of every manifest below a directory, as an agent does.
pub(crate) fn manifests(path: &Path, into: &mut Vec<Object>) -> Result<()> {
    if !path.is_dir() {
        let (text, format) = read(path)?;
        let found = objects(&text, format).with_context(|| path.display().to_string())?;
        into.extend(found.into_iter().map(|value| Object {
            origin: path.display().to_string(),
            value,
        }));
        return Ok(());
    }
    let mut entries: Vec<PathBuf> = fs::read_dir(path)
        .with_context(|| path.display().to_string())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    entries.sort();
    for entry in entries {
        let name = entry.file_name().and_then(|name| name.to_str());
        let is_hidden = name.is_none_or(|name| name.starts_with('.'));
        if !is_hidden && (entry.is_dir() || name.and_then(Format::of).is_some()) {
            manifests(&entry, into)?;
        }
    }
    Ok(())
}
