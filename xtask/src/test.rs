// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test [FILTER]`: every test of the workspace, as root.
//!
//! First all crates but mesh-test, in parallel; then mesh-test, one test at a time, because its
//! tests share the machine's kernel and measure time. Both run to their end. The last line is
//! the sum over all test programs. With `policy --coverage`: what the truth tables prove instead.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{build, coverage, run, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Run no tests, but say per clause what the truth tables prove (with the filter `policy`)
    #[arg(long)]
    coverage: bool,
}

/// Whether every test passed; the counts are the last line that it prints.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.coverage {
        return match args.filter.as_deref() {
            Some("policy") => coverage::run(),
            _ => bail!("coverage is known of the policy only: test policy --coverage"),
        };
    }
    if !run::is_root() {
        bail!("the tests make network namespaces and load kernel programs: run them as root");
    }
    let mut tally = Tally::default();
    if let Err(err) = all(args.filter.as_deref(), &mut tally) {
        tally.failed += 1;
        tally.failures.push(format!("{err:#}"));
    } else if tally.passed == 0 && tally.failed == 0 {
        tally.failed = 1;
        tally
            .failures
            .push("no test has a name that contains the filter".to_owned());
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
    // mesh-test starts the agent as a process.
    build::build(false)?;
    let mut unit = run::cargo([
        "test",
        "--no-fail-fast",
        "--workspace",
        "--exclude",
        "mesh-test",
    ]);
    unit.args(filter);
    run_part("unit tests", &mut unit, tally)?;
    let mut kernel = run::cargo(["test", "--no-fail-fast", "--package", "mesh-test"]);
    kernel.args(filter).args(["--", "--test-threads=1"]);
    run_part("kernel tests", &mut kernel, tally)
}

fn run_part(name: &str, command: &mut Command, tally: &mut Tally) -> Result<()> {
    let start = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", run::line(command)))?;
    let output = child.stdout.take().context("the output was not piped")?;
    let mut part = Tally::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read the tests' output")?;
        println!("{line}");
        part.read(&line);
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if !status.success() && part.failed == 0 {
        // It did not compile, or a test program died before it could report.
        part.failed = 1;
        part.failures.push(format!(
            "{name}: {} ended with {status}",
            run::line(command)
        ));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{name}: {} passed, {} failed ({seconds:.1} s)",
        part.passed, part.failed
    );
    tally.passed += part.passed;
    tally.failed += part.failed;
    tally.failures.append(&mut part.failures);
    Ok(())
}

#[derive(Debug, Default, PartialEq)]
struct Tally {
    passed: u32,
    failed: u32,
    failures: Vec<String>,
}

impl Tally {
    fn read(&mut self, line: &str) {
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            match (
                words.next().and_then(|word| word.parse::<u32>().ok()),
                words.next(),
            ) {
                (Some(count), Some("passed")) => self.passed += count,
                (Some(count), Some("failed")) => self.failed += count,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_sums_all_programs_and_names_what_failed() {
        let mut tally = Tally::default();
        for line in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.01s",
            "the test result: ok. 9 passed",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 2.00s",
        ] {
            tally.read(line);
        }
        assert_eq!(
            tally,
            Tally {
                passed: 13,
                failed: 1,
                failures: vec!["a::c".to_owned()]
            }
        );
    }
}
