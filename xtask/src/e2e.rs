// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask e2e`: builds the image and runs the `e2e` program of mesh-test.

use anyhow::Result;

use crate::{demo, image, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build programs without optimization: quicker
    #[arg(long)]
    dev: bool,
    /// Arguments of the program: `[--only helm|kustomize] [--keep]`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs `cargo xtask demo --kubernetes`.
pub(crate) fn demo(args: &[String]) -> Result<()> {
    let args = args.iter().filter(|arg| *arg != "--kubernetes");
    let args = ["--demo".to_owned()].into_iter().chain(args.cloned());
    run(&Args {
        dev: false,
        args: args.collect(),
    })
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut e2e = demo::hand_over("e2e", false)?;
    image::run(&image::Args::for_tests(args.dev))?;
    run::show(e2e.args(&args.args))
}
