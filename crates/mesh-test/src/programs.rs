// SPDX-License-Identifier: Apache-2.0
//! Paths of the workspace's programs: next to the running one, or from an environment variable.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Returns the path of the `probe` program, or the value of `MESH_PROBE_BIN`.
///
/// # Errors
/// The program is not built.
pub fn probe() -> Result<PathBuf> {
    find("probe", "MESH_PROBE_BIN").context("cargo build -p mesh-test --bins builds it")
}

/// Returns the path of the agent, or the value of `MESH_AGENT_BIN`.
///
/// # Errors
/// The program is not built.
pub fn agent() -> Result<PathBuf> {
    find("mesh-agent", "MESH_AGENT_BIN").context("cargo build -p mesh-agent builds it")
}

/// Returns the path of the controller, or the value of `MESH_CONTROLLER_BIN`.
///
/// # Errors
/// The program is not built.
pub fn controller() -> Result<PathBuf> {
    find("mesh-controller", "MESH_CONTROLLER_BIN")
        .context("cargo build -p mesh-controller builds it")
}

/// Returns the path of `meshctl`, or the value of `MESHCTL_BIN`.
///
/// # Errors
/// The program is not built.
pub fn meshctl() -> Result<PathBuf> {
    find("meshctl", "MESHCTL_BIN").context("cargo build -p mesh-cli builds it")
}

/// Finds a program next to the running one, or one directory above it for test programs.
fn find(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(PathBuf::from(path));
    }
    let this = std::env::current_exe()?;
    let mut places = this.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    places
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} beside {} and no {variable}", this.display()))
}
