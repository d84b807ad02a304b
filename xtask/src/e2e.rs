// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask e2e`: makes the image and hands over to the `e2e` program of mesh-test.

use anyhow::Result;

use crate::{demo, image, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Programs that are not optimised: quicker to build
    #[arg(long)]
    dev: bool,
    /// Passed on as they are: `[--only helm|kustomize] [--keep]`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// `cargo xtask demo --kubernetes`.
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
