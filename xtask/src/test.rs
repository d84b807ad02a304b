// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test [FILTER]`: every test of the workspace, as root.
//!
//! One cargo command builds all test programs. Unit tests run first, each program with as many
//! threads as there are processors. Kernel tests, which share the machine's kernel and measure time,
//! run one at a time. A failure stops nothing. The last line is the sum over all test programs. With
//! `policy --coverage`, it reports what the truth tables prove instead.

mod programs;
mod tally;

use std::{
    io::{BufRead as _, BufReader},
    process::{ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use self::{programs::Program, tally::Tally};
use crate::{build, coverage, run, setup};

/// The number of slowest kernel tests that are listed.
const SLOWEST: usize = 15;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Run no tests, but report per clause what the truth tables prove (with the filter `policy`)
    #[arg(long)]
    coverage: bool,
}

/// Runs all tests; exits with 1 if one fails. The last line has the counts.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.coverage {
        return match args.filter.as_deref() {
            Some("policy") => coverage::run(),
            _ => bail!("coverage is measured for policy only: test policy --coverage"),
        };
    }
    if !run::is_root() {
        bail!("the tests create network namespaces and load kernel programs: run them as root");
    }
    let mut tally = Tally::default();
    if let Err(err) = all(args.filter.as_deref(), &mut tally) {
        tally.fail(format!("{err:#}"));
    } else if tally.passed == 0 && tally.failed == 0 {
        tally.fail("no test has a name that contains the filter".to_owned());
    }
    for name in &tally.failures {
        println!("failed: {name}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn all(filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    setup::run(&setup::Args::default())?;
    // Tests start the programs of the workspace, and cargo builds with tests only those of packages
    // that have integration tests.
    build::bins()?;
    let programs = run::timed("build tests", programs::build)?;
    let (kernel, unit): (Vec<_>, Vec<_>) = programs.iter().partition(|it| it.is_kernel());
    tally.add(part("unit tests", &unit, filter)?);
    let mut kernel = part("kernel tests", &kernel, filter)?;
    for (seconds, name) in kernel.slowest(SLOWEST) {
        println!("{seconds:7.1} s  {name}");
    }
    tally.add(kernel);
    Ok(())
}

/// Runs test programs one after another.
fn part(name: &str, programs: &[&Program], filter: Option<&str>) -> Result<Tally> {
    let start = Instant::now();
    let mut part = Tally::default();
    for program in programs {
        part.add(run_program(program, filter)?);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{name}: {} passed, {} failed ({seconds:.1} s)",
        part.passed, part.failed
    );
    Ok(part)
}

fn run_program(program: &Program, filter: Option<&str>) -> Result<Tally> {
    let start = Instant::now();
    println!("\nrunning {}", program.name());
    let mut command = program.command(filter);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", run::line(&command)))?;
    let output = child.stdout.take().context("the output was not piped")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read the tests' output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        tally.read(&line);
    }
    let status = child.wait().context("cannot wait for the test program")?;
    if !status.success() && tally.failed == 0 {
        // The program died before it could report.
        tally.fail(format!("{}: {status}", program.name()));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{}: {seconds:.1} s", program.name());
    Ok(tally)
}
