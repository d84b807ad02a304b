// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask tidy`: checks that rustfmt and clippy do not make.
//!
//! Source files that no `mod` reaches, crates that differ from ARCHITECTURE.md, missing license
//! lines, files that are too long, words and servers that do not belong in the tree, code in doc
//! comments, Windows line ends. It reads the files that git would commit and changes nothing.

mod crates;
mod modules;
mod text;

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::run;

/// One file of the tree.
pub(crate) struct File {
    /// Below the root, with forward slashes.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl File {
    fn has_extension(&self, extension: &str) -> bool {
        self.path
            .rsplit_once('.')
            .is_some_and(|(_, found)| found == extension)
    }
}

pub(crate) fn run() -> Result<()> {
    let files = files()?;
    let mut findings = modules::orphans(&files);
    findings.extend(crates::check(&files));
    for file in &files {
        findings.extend(text::check(file));
    }
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!(
            "tidy has {} findings in {} files",
            findings.len(),
            files.len()
        );
    }
    Ok(())
}

/// The text files that are or would be committed.
pub(crate) fn files() -> Result<Vec<File>> {
    let mut git = run::command("git");
    // Checkouts of another user's are fine to read.
    git.args([
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
    ])
    .arg("--exclude-standard");
    let list = run::capture(&mut git).context("tidy asks git which files are the tree's")?;
    let mut files = Vec::new();
    for path in list.split('\0').filter(|path| !path.is_empty()) {
        let full = run::root().join(path);
        if !full.is_file() {
            continue;
        }
        let bytes = fs::read(&full).with_context(|| format!("cannot read {path}"))?;
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(File {
                path: path.to_owned(),
                text,
            });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}
