// SPDX-License-Identifier: Apache-2.0
//! `meshctl`: queries agents, and evaluates policy without agents.
//!
//! Exit codes: 0 success; 1 a check failed or a problem was found; 2 invalid usage or input.

#![forbid(unsafe_code)]

mod agent;
mod args;
mod input;
mod policy;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command, PolicyCommand};

/// The result of a command that ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// No problem was found.
    Good,
    /// A problem was found.
    Bad,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let result = run(&args.command, &mut out);
    let result = result.and_then(|outcome| Ok(out.flush().map(|()| outcome)?));
    match result {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(1),
        // The reader of a pipe, such as `head`, has closed it.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _nowhere_else = writeln!(io::stderr(), "meshctl: {error:#}");
            ExitCode::from(args.command.failure())
        }
    }
}

fn run(command: &Command, out: &mut impl Write) -> anyhow::Result<Outcome> {
    match command {
        Command::Policy(PolicyCommand::Test(args)) => policy::test::run(args, out),
        Command::Policy(PolicyCommand::Explain(args)) => policy::explain::run(args, out),
        Command::Policy(PolicyCommand::Diff(args)) => policy::diff::run(args, out),
        Command::Policy(PolicyCommand::Matrix(args)) => policy::matrix::run(args, out),
        Command::Status(args) => agent::status(args, out),
        Command::Dump(args) => agent::page(&args.agent, "/plan", out),
        Command::Pods(args) => agent::page(args, "/pods", out),
        Command::Flows(args) => agent::page(args, "/flows", out),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
