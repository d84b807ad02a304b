// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask truth FILE...`: truth tables over real connections. Exits with 1 if a row differs,
//! with 2 if a table cannot be run.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use mesh_test::remove_on_interrupt;
use mesh_test::truth::{self, Report};

#[derive(Parser)]
#[command(about = "Truth tables over real connections between real pods")]
struct Cli {
    /// Tables in YAML or JSON, in the format of `meshctl policy test`
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// on: enroll all namespaces, or those with the table's own labels; off: enroll none
    #[arg(long, default_value = "on")]
    mtls: Switch,
    /// Run only tables whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Default)]
struct Total {
    checks: usize,
    right: usize,
    differ: usize,
    not_run: usize,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            say(&format_args!("truth tables could not be run: {error:#}"));
            ExitCode::from(2)
        }
    }
}

#[expect(clippy::print_stdout, reason = "a program for people")]
fn say(what: &impl std::fmt::Display) {
    println!("{what}");
}

fn run(cli: &Cli) -> Result<bool> {
    remove_on_interrupt()?;
    let mut total = Total::default();
    for file in &cli.files {
        for (number, table) in truth::read(file)?.iter().enumerate() {
            let name = table.name.clone();
            let name = name.unwrap_or_else(|| format!("table {}", number + 1));
            if cli.only.as_ref().is_some_and(|only| !name.contains(only)) {
                continue;
            }
            let place = format!("{}: {name}", file.display());
            let report = truth::run(table, file, cli.mtls == Switch::On);
            show(&place, &report.with_context(|| place.clone())?, &mut total);
        }
    }
    say(&format_args!(
        "{} checks, {} as expected, {} differ, {} not run",
        total.checks, total.right, total.differ, total.not_run
    ));
    Ok(total.differ == 0)
}

fn show(place: &str, report: &Report, total: &mut Total) {
    for note in &report.notes {
        say(&format_args!("{place}: {note}"));
    }
    for row in &report.not_run {
        say(&format_args!("{place}: not run: {row}"));
    }
    for row in &report.differ {
        say(&format_args!("{place}: differs: {row}"));
    }
    say(&format_args!(
        "{place}: {} checks, {} as expected, {} differ, {} not run ({:.1} s)",
        report.checks,
        report.right,
        report.differ.len(),
        report.not_run.len(),
        report.took.as_secs_f64()
    ));
    total.checks += report.checks;
    total.right += report.right;
    total.differ += report.differ.len();
    total.not_run += report.not_run.len();
}
