// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench`: sets up, builds, and hands over to the `bench` program of mesh-test.

use anyhow::{Result, bail};

use crate::{demo, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed to the bench as they are: `[GROUP] [--rounds N] [--seconds S] [--json PATH]`; `policy
    /// [--json PATH]` measures compiling and deciding
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let [group, rest @ ..] = args.args.as_slice()
        && group == "policy"
    {
        return policy(rest);
    }
    run::show(&mut demo::hand_over("bench", &args.args)?)
}

/// Compiling, comparing and deciding at 100 to 10,000 pods and policies; needs no root.
fn policy(args: &[String]) -> Result<()> {
    let path = match args {
        [] => "target/bench-policy.json",
        [json, path] if json == "--json" => path,
        _ => bail!("bench policy [--json PATH]"),
    };
    let mut cargo = run::cargo(["run", "--quiet", "--release", "--package", "mesh-plan"]);
    run::show(cargo.args(["--example", "scale", "--", "--json", path]))
}
