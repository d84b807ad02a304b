// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask generate [--check]`: every file of the tree that a program writes.
//!
//! A generated file is a row of [`generated`]: its path, and the function that makes its whole
//! text. `--check` writes nothing and fails on the first difference; lint runs it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::run;

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Write nothing; fail if a file differs from what would be written
    #[arg(long)]
    pub(crate) check: bool,
}

/// One generated file.
struct Generated {
    /// Below the root of the workspace.
    path: &'static str,
    text: fn() -> Result<String>,
}

/// Every generated file, by path.
fn generated() -> Vec<Generated> {
    Vec::new()
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let all = generated();
    write_all(run::root(), &all, args.check)?;
    crds(!args.check)?;
    if !args.check {
        bless()?;
    }
    let verb = if args.check { "up to date" } else { "written" };
    println!("generated files {verb}");
    Ok(())
}

/// Has the test of mesh-api, which knows the types, write or compare the CRDs.
fn crds(write: bool) -> Result<()> {
    let mut test = run::cargo(["test", "--quiet", "--package", "mesh-api", "--test", "crds"]);
    if write {
        test.env("MESH_BLESS", "1");
    }
    run::show(&mut test)
}

/// Has the agent's tests write what only the agent knows: settings, metrics, reasons. They compare
/// it whenever tests run, so `--check` leaves it to them.
fn bless() -> Result<()> {
    let mut tests = run::cargo([
        "test",
        "--quiet",
        "--package",
        "mesh-agent",
        "--lib",
        "--",
        "up_to_date",
    ]);
    run::show(tests.env("MESH_BLESS", "1"))
}

fn write_all(root: &Path, all: &[Generated], check: bool) -> Result<()> {
    let mut stale = Vec::new();
    for file in all {
        let text = (file.text)().with_context(|| format!("cannot make {}", file.path))?;
        let path = root.join(file.path);
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        if check {
            stale.push(file.path);
            continue;
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !stale.is_empty() {
        bail!(
            "not as generated: {}; run `cargo xtask generate`",
            stale.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_fails_until_the_file_is_written_and_after_it_was_edited() {
        let dir = std::env::temp_dir().join(format!("xtask-generate-{}", std::process::id()));
        let all = [Generated {
            path: "a/b.txt",
            text: || Ok("text\n".to_owned()),
        }];
        let err = write_all(&dir, &all, true).expect_err("it is not there");
        assert!(err.to_string().contains("a/b.txt"), "{err}");
        write_all(&dir, &all, false).expect("the directory is ours");
        write_all(&dir, &all, true).expect("it was just written");
        fs::write(dir.join("a/b.txt"), "edited\n").expect("the directory is ours");
        assert!(write_all(&dir, &all, true).is_err());
        fs::remove_dir_all(&dir).expect("the directory is ours");
    }
}
