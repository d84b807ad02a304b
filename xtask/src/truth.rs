// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask truth FILE...`: prepares the machine, builds, and runs the `truth` program of mesh-test.
//!
//! The programs are not optimized: rows are right or wrong, not fast or slow.

use std::{ffi::OsString, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{demo, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments of the program: `FILE... [--mtls on|off] [--only NAME]`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) args: Vec<OsString>,
}

/// Exits with the code of the program: 1 if a row differs, 2 if a table cannot be run.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut truth = demo::hand_over("truth", false)?;
    truth.args(&args.args);
    // Files are named from where the user is.
    truth.current_dir(std::env::current_dir().context("there is no working directory")?);
    let status = truth
        .status()
        .with_context(|| format!("cannot start {}", run::line(&truth)))?;
    Ok(match status.code() {
        Some(0) => ExitCode::SUCCESS,
        Some(1) => ExitCode::from(1),
        _ => ExitCode::from(2),
    })
}
