// SPDX-License-Identifier: Apache-2.0
//! Where the facts about the cluster come from.
//!
//! [`watch`] gives the latest [`Cluster`] and the latest [`Report`] of what could not be used. The
//! first value is complete: nothing is ever decided on half of the facts. This room knows nothing
//! of nodes, pods on this machine, plans or maps.

mod dir;
mod files;
mod state;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::Warning;
use mesh_plan::cluster::{Cluster, Rejection};
use tokio::sync::watch;

use crate::config::Source;

/// What the room needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the state comes from.
    pub source: Source,
    /// Where last good versions are kept over a restart.
    pub state_dir: PathBuf,
    /// Pod CIDRs beside those of Node objects.
    pub pod_cidrs: Vec<IpNet>,
}

/// The latest facts. When both receivers are dropped, the room ends.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The facts; a new value only when they differ.
    pub cluster: watch::Receiver<Arc<Cluster>>,
    /// What could not be used, and what is probably not meant.
    pub report: watch::Receiver<Arc<Report>>,
}

/// What the facts do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Objects that could not be used, and what holds instead, in order.
    pub rejections: Vec<Rejection>,
    /// Objects that work and are probably not meant so, in order.
    pub warnings: Vec<Warning>,
    /// Why the source cannot be read at the moment; what was read last stays in force.
    pub stale: Option<String>,
    /// Why last good versions cannot be kept over a restart.
    pub not_kept: Option<String>,
}

/// Why there are no facts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be read.
    #[error("cannot read manifests in {path}")]
    Read {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The thread that reads could not be started, or ended.
    #[error("cannot run the thread that reads manifests")]
    Thread(#[source] io::Error),
    /// The source is not built in.
    #[error("this program has no source {0:?}; use dir:PATH")]
    Unsupported(&'static str),
}

/// Reads the source and goes on doing so until every receiver is dropped. Returns when the first
/// facts are complete.
///
/// # Errors
/// The source cannot be read at all.
pub async fn watch(settings: Settings) -> Result<Watched, Error> {
    match settings.source.clone() {
        Source::Dir(path) => dir::watch(path, settings).await,
        Source::Kubernetes => Err(Error::Unsupported("kubernetes")),
    }
}
