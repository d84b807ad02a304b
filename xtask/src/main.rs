// SPDX-License-Identifier: Apache-2.0
//! The build language of this workspace: one arm is one module.
//!
//! xtask calls cargo and the tools of the machine, and prints the duration of each part. It depends on
//! no crate that needs the kernel programs, so that it builds before the machine is set up.

#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command for people at a terminal"
)]

mod bench;
mod build;
mod chart;
mod coverage;
mod demo;
mod e2e;
mod fuzz;
mod generate;
mod image;
mod kernels;
mod lint;
mod reach;
mod run;
mod setup;
mod test;
mod tidy;
mod truth;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tests and shows the mesh.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prepare a Debian 12 machine with Rust: packages, bpf-linker, Kubernetes servers
    Setup(setup::Args),
    /// Build the agent, the command line and the kernel programs
    Build(build::Args),
    /// Run all tests, as root; the last line is `N passed, N failed`
    Test(test::Args),
    /// Format, clippy for the host and for the kernel target, tidy, generated files
    Lint,
    /// Check rules that rustfmt and clippy do not know
    Tidy,
    /// Write the generated files
    Generate(generate::Args),
    /// Show the mesh at work: two nodes, a small shop, evidence for each promise
    Demo(demo::Args),
    /// Build the container image, without docker
    Image(image::Args),
    /// Install the image on a real cluster of two nodes and check that it works
    E2e(e2e::Args),
    /// Run the tests of the kernel programs on other kernels, in emulated machines
    Kernels(kernels::Args),
    /// Measure the cost of the mesh
    Bench(bench::Args),
    /// Fuzz the parsers of untrusted bytes, starting from the committed corpus
    Fuzz(fuzz::Args),
    /// Run truth tables over real connections; exit code 1 if a row differs
    Truth(truth::Args),
}

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Cli::parse().command {
        Command::Setup(args) => setup::run(&args).map(done),
        Command::Build(args) => build::run(&args).map(done),
        Command::Test(args) => test::run(&args),
        Command::Lint => lint::run().map(done),
        Command::Tidy => tidy::run().map(done),
        Command::Generate(args) => generate::run(&args).map(done),
        Command::Demo(args) => demo::run(&args).map(done),
        Command::Image(args) => image::run(&args).map(done),
        Command::E2e(args) => e2e::run(&args).map(done),
        Command::Kernels(args) => kernels::run(&args),
        Command::Bench(args) => bench::run(&args).map(done),
        Command::Fuzz(args) => fuzz::run(&args).map(done),
        Command::Truth(args) => truth::run(&args),
    };
    result.unwrap_or_else(|err| {
        eprintln!("error: {err:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn demo_and_bench_arguments_are_passed_unchanged() {
        let cli = Cli::try_parse_from(["x", "demo", "--keep"]).expect("it parses");
        assert!(matches!(cli.command, Command::Demo(args) if args.args == ["--keep"]));
        let line = ["x", "bench", "bulk", "--rounds", "3", "--json", "out.json"];
        let cli = Cli::try_parse_from(line).expect("it parses");
        assert!(matches!(cli.command, Command::Bench(args) if args.args == line[2..]));
        let cli = Cli::try_parse_from(["x", "bench", "--seconds", "1"]).expect("it parses");
        assert!(matches!(cli.command, Command::Bench(args) if args.args == ["--seconds", "1"]));
    }
}
