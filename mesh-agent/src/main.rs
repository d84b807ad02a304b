// SPDX-License-Identifier: Apache-2.0
//! `mesh-agent`: runs the agent of a node, checks the kernel, or cleans up. Exit codes follow sysexits.h:
//! 0 done, 1 failed, 2 usage, 69 a kernel feature is missing, 70 internal, 78 configuration.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use mesh_agent::{agent, cleanup, host};
use mesh_config::AgentCommand;
use mesh_datapath::check;
use mesh_log::Chain;
use mesh_sys::sysctls;

fn main() -> ExitCode {
    match mesh_config::parse_agent(std::env::args_os(), &mesh_config::Process) {
        Ok(command) => run(command).into(),
        Err(mesh_config::Error::Usage(usage)) => usage.exit(),
        Err(error) => fail(&error, error.exit_code()).into(),
    }
}

fn run(command: AgentCommand) -> u8 {
    // A sysctl that cannot be set is reported where it is needed.
    drop(sysctls::make_writable());
    match command {
        AgentCommand::Run(config) => match mesh_log::init(&config.log) {
            Ok(level) => agent::run(*config, Some(level))
                .map_or_else(|error| fail(&error, error.exit_code()), |()| 0),
            Err(error) => fail(&error, 78),
        },
        AgentCommand::Check(config) => {
            let report = check::run(&host(&config));
            // The report is the output, not a message: a closed pipe is no reason to fail.
            drop(write!(std::io::stdout(), "{report}"));
            report.exit_code()
        }
        AgentCommand::Cleanup(config) => match cleanup::run(&config) {
            Ok(removed) => {
                say(&removed);
                0
            }
            Err(error) => fail(&error, 1),
        },
    }
}

fn fail(error: &(dyn Error + 'static), code: u8) -> u8 {
    say(&format_args!("mesh-agent: {}", Chain(error)));
    code
}

/// Writes a line to standard error. A closed standard error is no reason to fail.
fn say(text: &dyn std::fmt::Display) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
