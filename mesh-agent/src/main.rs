// SPDX-License-Identifier: Apache-2.0
//! `mesh-agent`: runs a command. The exit code is one of sysexits.h: 0 success, 1 failure, 2 usage, 69 a
//! kernel feature is missing, 70 internal error, 78 configuration error.

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use mesh_agent::config::{self, Command};
use mesh_agent::logging::Chain;
use mesh_agent::sys::sysctls;
use mesh_agent::{agent, check, cleanup, controller, logging, uninstall};

fn main() -> ExitCode {
    match config::parse(std::env::args_os(), &config::Process) {
        Ok(command) => run(command).into(),
        Err(config::Error::Usage(usage)) => usage.exit(),
        Err(error) => fail(&error, error.exit_code()).into(),
    }
}

fn run(command: Command) -> u8 {
    if matches!(
        command,
        Command::Run(_) | Command::Check(_) | Command::Cleanup(_)
    ) {
        // A sysctl that cannot be set then is reported where it is needed.
        drop(sysctls::make_writable());
    }
    match command {
        Command::Run(config) => match logging::init(&config.log) {
            Ok(level) => agent::run(*config, Some(level))
                .map_or_else(|error| fail(&error, error.exit_code()), |()| 0),
            Err(error) => fail(&error, 78),
        },
        Command::Check(host) => {
            let report = check::run(&host);
            // A closed pipe is no failure.
            drop(write!(std::io::stdout(), "{report}"));
            report.exit_code()
        }
        Command::Controller(config) => match logging::init(&config.log) {
            Ok(_level) => controller::run(*config)
                .map_or_else(|error| fail(&error, error.exit_code()), |()| 0),
            Err(error) => fail(&error, 78),
        },
        Command::RotateRoot(config) => controller::rotate_root(&config).map_or_else(
            |error| fail(&error, error.exit_code()),
            |done| {
                say(&done);
                0
            },
        ),
        Command::Uninstall(config) => {
            match uninstall::run(&config.namespace, config.kubeconfig.as_deref()) {
                Ok(nodes) => {
                    say(&format_args!("mesh removed from {nodes} nodes"));
                    0
                }
                Err(error) => fail(&error, 1),
            }
        }
        Command::Cleanup(host) => match cleanup::run(&host) {
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

/// Writes to standard error; a closed one is no failure.
fn say(text: &dyn std::fmt::Display) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
