// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench`: sets up, builds, and hands over to the `bench` program of mesh-test.

use anyhow::Result;

use crate::{demo, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed to the bench as they are: `[GROUP] [--rounds N] [--seconds S] [--json PATH]`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    run::show(&mut demo::hand_over("bench", &args.args)?)
}
