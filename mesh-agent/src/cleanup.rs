// SPDX-License-Identifier: Apache-2.0
//! `mesh-agent cleanup`: removes the mesh from this node, for uninstalling.
//!
//! Removes what [`mesh_datapath::cleanup`] names, and the last good versions of policies in the state
//! directory. Everything else in the state directory stays, such as the CA of `--ca self`.

use std::io;
use std::path::PathBuf;

use mesh_config::HostConfig;
use mesh_datapath::cleanup::{self, Removed};

use crate::host;
use crate::source::state;

/// The first failure; everything else is removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Kernel programs, maps or network configuration.
    #[error(transparent)]
    Datapath(#[from] cleanup::Error),
    /// The last good versions of policies.
    #[error("cannot remove {path}", path = path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Removes the mesh from this node. Idempotent.
///
/// # Errors
/// The first thing that could not be removed; everything that can be removed is.
pub fn run(config: &HostConfig) -> Result<Removed, Error> {
    let removed = cleanup::run(&host(config));
    state::remove(&config.state_dir).map_err(|(path, source)| Error::State { path, source })?;
    Ok(removed?)
}
