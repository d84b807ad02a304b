// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask demo`: prepares the machine, builds, and runs the `demo` program of mesh-test.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{build, e2e, run, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments of the demo: `--keep`; or `--kubernetes` first, for a real cluster
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.args.iter().any(|arg| arg == "--kubernetes") {
        return e2e::demo(&args.args);
    }
    // The demo shows what the mesh does, not how fast: optimizing would take most of the time.
    run::show(hand_over("demo", false)?.args(&args.args))
}

/// Prepares the machine, builds all programs, optimized or not, and returns the command that runs
/// the binary `name` of mesh-test. That binary starts the agent and the small clients and servers of
/// mesh-test as processes.
pub(crate) fn hand_over(name: &str, optimized: bool) -> Result<Command> {
    if !run::is_root() {
        bail!("`{name}` creates network namespaces and loads kernel programs: run it as root");
    }
    setup::run(&setup::Args::default())?;
    if optimized {
        let packages = ["mesh-agent", "mesh-controller", "mesh-cli", "mesh-test"];
        let mut cargo = run::cargo(["build", "--release", "--bins"]);
        cargo.args(packages.iter().flat_map(|package| ["--package", package]));
        run::timed("build", || run::show(&mut cargo))?;
    } else {
        build::bins()?;
    }
    Ok(run::command(built(name, optimized)?))
}

/// Path of the binary `name`: in the directory of its profile, beside that of this program.
fn built(name: &str, optimized: bool) -> Result<PathBuf> {
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    let target = this.ancestors().nth(2);
    let target = target.with_context(|| format!("{} is in no target directory", this.display()))?;
    let profile = if optimized { "release" } else { "debug" };
    Ok(target.join(profile).join(name))
}
