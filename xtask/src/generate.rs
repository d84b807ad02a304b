// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask generate [--check]`: every file of the tree that a program writes.
//!
//! [`generated`] gives each with its path; tests write what only other crates know. `--check`
//! writes nothing and fails on the first difference; lint runs it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::{chart, run};

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Write nothing; fail if a file differs from what would be written
    #[arg(long)]
    pub(crate) check: bool,
}

/// Every generated file that this program makes itself: path below the root, and whole text.
fn generated() -> Result<Vec<(String, String)>> {
    chart::files()
}

pub(crate) fn run(args: &Args) -> Result<()> {
    write_all(run::root(), &generated()?, args.check)?;
    crds(!args.check)?;
    // The chart has copies of the CRDs.
    write_all(run::root(), &generated()?, args.check)?;
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

/// Runs the tests that write the references of settings, metrics and reasons. They compare them whenever
/// tests run, so `--check` leaves it to them.
fn bless() -> Result<()> {
    let mut tests = run::cargo([
        "test",
        "--quiet",
        "--package",
        "mesh-agent",
        "--package",
        "mesh-telemetry",
        "--lib",
        "--",
        "up_to_date",
    ]);
    run::show(tests.env("MESH_BLESS", "1"))
}

fn write_all(root: &Path, all: &[(String, String)], check: bool) -> Result<()> {
    let mut stale = Vec::new();
    for (name, text) in all {
        let path = root.join(name);
        if fs::read_to_string(&path).is_ok_and(|old| old == *text) {
            continue;
        }
        if check {
            stale.push(name.as_str());
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
        let all = [("a/b.txt".to_owned(), "text\n".to_owned())];
        let err = write_all(&dir, &all, true).expect_err("it is not there");
        assert!(err.to_string().contains("a/b.txt"), "{err}");
        write_all(&dir, &all, false).expect("the directory is ours");
        write_all(&dir, &all, true).expect("it was just written");
        fs::write(dir.join("a/b.txt"), "edited\n").expect("the directory is ours");
        assert!(write_all(&dir, &all, true).is_err());
        fs::remove_dir_all(&dir).expect("the directory is ours");
    }
}
