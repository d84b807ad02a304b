// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask generate [--check]`: writes or checks every generated file of the tree.
//!
//! [`generated`] returns the files that xtask generates; tests of other crates write the rest.
//! `--check` writes nothing and fails if a file differs; lint runs it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::{build, chart, run};

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Write nothing; fail if a file differs from what would be written
    #[arg(long)]
    pub(crate) check: bool,
}

/// Path below the root and text of each file that xtask generates itself.
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

/// Runs the test of mesh-api that writes or compares the CRDs.
fn crds(write: bool) -> Result<()> {
    let mut test = build::workspace("test");
    test.args(["--quiet", "--test", "crds"]);
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
        "mesh-config",
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
            "generated files are out of date: {}; run `cargo xtask generate`",
            stale.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generate_check_fails_for_missing_and_edited_files() {
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
