// SPDX-License-Identifier: Apache-2.0
//! bpf-linker, which links the kernel programs, in exactly one version.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Outcome;
use crate::run;

const NAME: &str = "bpf-linker";
const VERSION: &str = "0.10.3";

pub(super) fn ensure() -> Result<Outcome> {
    let found = version();
    if found.as_deref() == Some(VERSION) {
        return Ok(Outcome::Present);
    }
    let args = ["install", "--quiet", "--locked", NAME, "--version", VERSION];
    run::capture(&mut run::cargo(args)).with_context(|| {
        format!(
            "{NAME} {VERSION} cannot be installed; it needs the crates registry and a C \
             compiler. By hand: cargo {}",
            args.join(" ")
        )
    })?;
    match version() {
        Some(version) if version == VERSION => Ok(Outcome::Done(format!("installed {VERSION}"))),
        other => bail!(
            "{NAME} {VERSION} was installed, but {} is what runs: an older one is first in PATH",
            other.as_deref().unwrap_or("none")
        ),
    }
}

fn version() -> Option<String> {
    let text = run::capture(run::command(program()?).arg("--version")).ok()?;
    text.trim()
        .strip_prefix(NAME)
        .map(|version| version.trim().to_owned())
}

/// Finds the linker as the build does: in the search path, else in cargo's directory.
fn program() -> Option<PathBuf> {
    run::find(NAME).or_else(|| {
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::home_dir().map(|home| home.join(".cargo")))?;
        Some(home.join("bin").join(NAME)).filter(|file| file.is_file())
    })
}
