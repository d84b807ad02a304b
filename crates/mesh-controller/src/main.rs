// SPDX-License-Identifier: Apache-2.0
//! `mesh-controller`: runs the controller, requests a new root, or uninstalls the mesh. Exit codes
//! follow sysexits.h: 0 done, 1 failed, 2 usage, 70 internal, 78 configuration.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use mesh_config::ControllerCommand;
use mesh_controller::uninstall;
use mesh_log::Chain;

fn main() -> ExitCode {
    match mesh_config::parse_controller(std::env::args_os(), &mesh_config::Process) {
        Ok(command) => run(command).into(),
        Err(mesh_config::Error::Usage(usage)) => usage.exit(),
        Err(error) => fail(&error, error.exit_code()).into(),
    }
}

fn run(command: ControllerCommand) -> u8 {
    match command {
        ControllerCommand::Run(config) => match mesh_log::init(&config.log) {
            Ok(_level) => mesh_controller::run(*config)
                .map_or_else(|error| fail(&error, error.exit_code()), |()| 0),
            Err(error) => fail(&error, 78),
        },
        ControllerCommand::RotateRoot(config) => mesh_controller::rotate_root(&config).map_or_else(
            |error| fail(&error, error.exit_code()),
            |done| {
                print(&done);
                0
            },
        ),
        ControllerCommand::Uninstall(config) => {
            match uninstall::run(&config.namespace, config.kubeconfig.as_deref()) {
                Ok(nodes) => {
                    print(&format_args!("removed the mesh from {nodes} nodes"));
                    0
                }
                Err(error) => fail(&error, 1),
            }
        }
    }
}

fn fail(error: &(dyn Error + 'static), code: u8) -> u8 {
    print(&format_args!("mesh-controller: {}", Chain(error)));
    code
}

/// Writes a line to standard error, and ignores failures.
fn print(text: &dyn std::fmt::Display) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
