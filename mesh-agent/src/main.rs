// SPDX-License-Identifier: Apache-2.0
//! `mesh-agent`: does what it was asked to do, and says by its exit code how it went (sysexits.h):
//! 0 done, 1 failed, 2 usage, 69 a feature is missing, 70 internal, 78 configuration.

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
        // What cannot be set then is reported where it is needed.
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
            // What was asked for, not a message: a closed pipe is no reason to fail.
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
                    say(&format_args!("the mesh was taken off {nodes} nodes"));
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

/// To people; a closed standard error is no reason to fail.
fn say(text: &dyn std::fmt::Display) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
