// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask kernels [VERSION..]`: the tests that ask the kernel, on other kernels than this one.
//!
//! Debian's cloud kernels are started in qemu, without KVM. The machine's root is this one's own file
//! system (virtiofs) below a layer of memory, so that it runs what is built here and changes nothing.

mod machine;
mod packages;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};

use self::machine::Machine;
use crate::{build, run, setup};

/// Series that are tried unless others are given.
const SERIES: [&str; 2] = ["6.12", "7.3"];

/// What SCTP is tried with: no kernel without the protocol can.
const TABLE: &str = "crates/mesh-test/kernels/sctp.yaml";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Series of kernels, of which the newest of Debian is taken; without: 6.12 and 7.3
    versions: Vec<String>,
    /// Only programs whose name contains this: load, parity, check, sctp or sctp-plain
    #[arg(long)]
    only: Option<String>,
}

/// A program that is run in the machine.
struct Program {
    name: &'static str,
    line: String,
}

/// Whether every program succeeded on every kernel.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !run::is_root() {
        bail!("`kernels` installs qemu and gives the machine this one's files: run it as root");
    }
    setup::run(&setup::Args::default())?;
    build::bins()?;
    let programs: Vec<Program> = programs()?
        .into_iter()
        .filter(|program| {
            args.only
                .as_ref()
                .is_none_or(|only| program.name.contains(only))
        })
        .collect();
    ensure!(!programs.is_empty(), "no program has such a name");
    packages::ensure()?;
    let defaults = SERIES.map(str::to_owned).to_vec();
    let series = if args.versions.is_empty() {
        &defaults
    } else {
        &args.versions
    };
    let mut rows = Vec::new();
    for series in series {
        let kernel = run::timed(&format!("kernel {series}"), || packages::fetch(series))?;
        let machine = Machine::of(&kernel)?;
        for program in &programs {
            let name = format!("{}: {}", kernel.version, program.name);
            let said = run::timed(&name, || machine.run(&program.line))?;
            println!("{}", said.text);
            rows.push((name, said.status));
        }
    }
    let failed = rows.iter().filter(|(_, status)| *status != Some(0)).count();
    for (name, status) in &rows {
        let word = match status {
            Some(0) => "ok".to_owned(),
            Some(code) => format!("exit {code}"),
            None => "did not end".to_owned(),
        };
        println!("{name}: {word}");
    }
    println!("{} passed, {failed} failed", rows.len() - failed);
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// What is run, already built.
fn programs() -> Result<Vec<Program>> {
    let mut tests = build::workspace("test");
    tests.args(["--no-run", "--test", "load", "--test", "parity"]);
    let built = run::output(&mut tests)?;
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    ensure!(built.status.success(), "the tests cannot be built: {said}");
    // `Executable tests/load.rs (target/debug/deps/load-0123456789abcdef)`
    let executable = |name: &str| -> Result<PathBuf> {
        let line = said
            .lines()
            .find(|line| line.contains(&format!("/{name}-")));
        let path = line.and_then(|line| line.split(['(', ')']).nth(1));
        let path = path.with_context(|| format!("cargo does not say where {name} is: {said}"))?;
        Ok(run::root().join(path))
    };
    let debug = run::root().join("target/debug");
    let truth = format!(
        "{} {}",
        debug.join("truth").display(),
        run::root().join(TABLE).display()
    );
    let test = |path: PathBuf| format!("{} --test-threads=1", path.display());
    let program = |name, line| Program { name, line };
    Ok(vec![
        program(
            "check",
            format!("{} check", debug.join("mesh-agent").display()),
        ),
        program("load", test(executable("load")?)),
        program("parity", test(executable("parity")?)),
        program("sctp", format!("{truth} --mtls on")),
        program("sctp-plain", format!("{truth} --mtls off")),
    ])
}
