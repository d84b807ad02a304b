// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask build`: the agent and `meshctl`, optimized with `--release`.

use std::process::Command;

use anyhow::Result;

use crate::run;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Optimized, as shipped
    #[arg(long)]
    release: bool,
}

/// Makes cargo choose the same features for every dependency as `cargo test --workspace` does.
///
/// Cargo unifies features over the packages and kinds of targets that one command selects, and
/// builds a dependency again for each other set of features. Tests need tokio's test clock; with it
/// in every unoptimized build there is one set, so that each dependency is built once.
/// `--workspace` belongs to it.
pub(crate) const TEST_FEATURES: [&str; 2] = ["--features", "tokio/test-util"];

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.release {
        let mut cargo = run::cargo(["build", "--release"]);
        let packages = ["mesh-agent", "mesh-controller", "mesh-cli"];
        cargo.args(packages.iter().flat_map(|package| ["--package", package]));
        return run::timed("build", || run::show(&mut cargo));
    }
    bins()
}

/// Builds every program of the workspace but its tests, not optimized.
pub(crate) fn bins() -> Result<()> {
    run::timed("build", || run::show(workspace("build").arg("--bins")))
}

/// A cargo command for the whole workspace that shares its dependencies with the tests.
pub(crate) fn workspace(command: &str) -> Command {
    let mut cargo = run::cargo([command, "--workspace"]);
    cargo.args(TEST_FEATURES);
    cargo
}
