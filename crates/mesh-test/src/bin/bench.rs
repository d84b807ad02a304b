// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench [GROUP]`: cost of the mesh, as ratios to the same programs without it.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use mesh_test::bench::{self, Options, Program};
use mesh_test::remove_on_interrupt;

#[derive(Parser)]
#[command(
    about = "Measures the cost of the mesh: two labs, one with agents, the same load in turns",
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    program: Option<Program>,
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.program {
        Some(program) => program.run(),
        None => run(&cli.options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    remove_on_interrupt()?;
    let begun = Instant::now();
    let report = bench::run(options, &mut |what| {
        let seconds = begun.elapsed().as_secs_f64();
        say(&format_args!(
            "{seconds:6.1} s  {}",
            what.replace('\n', "\n          ")
        ));
    })?;
    say(&format_args!("\n{report}"));
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a program for people")]
fn say(what: &impl std::fmt::Display) {
    println!("{what}");
}

#[expect(clippy::print_stderr, reason = "a program for people")]
fn complain(error: &anyhow::Error) {
    eprintln!("bench: {error:#}");
}
