// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask build`: what a plain `cargo build` builds, with a release switch.

use anyhow::Result;

use crate::run;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Optimised, as shipped
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    build(args.release)
}

/// The agent (with the kernel programs in it) and `meshctl`.
pub(crate) fn build(release: bool) -> Result<()> {
    let mut cargo = run::cargo(["build", "--package", "mesh-agent", "--package", "mesh-cli"]);
    if release {
        cargo.arg("--release");
    }
    run::timed("build", || run::show(&mut cargo))
}
