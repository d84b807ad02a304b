// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask kernels [VERSION..]`: runs the tests of the kernel programs on other kernels.
//!
//! qemu starts Debian's cloud kernels, without KVM. The machine's root is the host's file system
//! (virtiofs) below a layer in memory, so that it runs the programs built here and changes nothing.

mod machine;
mod packages;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};

use self::machine::Machine;
use crate::{build, run, setup};

/// Default series.
const SERIES: [&str; 2] = ["6.12", "7.3"];

/// Truth table for SCTP, which needs a kernel with the protocol.
const TABLE: &str = "crates/mesh-test/kernels/sctp.yaml";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernel series, of each Debian's newest kernel (default: 6.12 and 7.3)
    versions: Vec<String>,
    /// Run only programs whose name contains this: load, parity, check, sctp or sctp-plain
    #[arg(long)]
    only: Option<String>,
}

/// A program to run in the machine.
struct Program {
    name: &'static str,
    line: String,
}

/// Runs the programs on every kernel; exits with 1 if one fails.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !run::is_root() {
        bail!(
            "`kernels` installs qemu and shares the host's files with the machine: run it as root"
        );
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
    ensure!(
        !programs.is_empty(),
        "no program has a name that contains the filter"
    );
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
            None => "timed out".to_owned(),
        };
        println!("{name}: {word}");
    }
    println!("{} passed, {failed} failed", rows.len() - failed);
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Builds and lists the programs to run.
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
