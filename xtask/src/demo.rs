// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask demo`: sets up, builds, and hands over to the `demo` program of mesh-test.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{build, run, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed to the demo as they are, for example `--keep`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    run::show(&mut hand_over("demo", &args.args)?)
}

/// Makes the machine and the optimised programs ready, and returns the command that runs the
/// binary `name` of mesh-test. The agent is built first: the binary starts it as a process.
pub(crate) fn hand_over(name: &str, args: &[String]) -> Result<Command> {
    if !run::is_root() {
        bail!("`{name}` makes network namespaces and loads kernel programs: run it as root");
    }
    setup::run(&setup::Args::default())?;
    build::build(true)?;
    // Not only the program itself: it starts the small clients and servers of mesh-test.
    let mut programs = run::cargo(["build", "--release", "--package", "mesh-test", "--bins"]);
    run::timed("build of mesh-test", || run::show(&mut programs))?;
    let mut cargo = run::cargo([
        "run",
        "--quiet",
        "--release",
        "--package",
        "mesh-test",
        "--bin",
        name,
        "--",
    ]);
    cargo.args(args);
    Ok(cargo)
}
