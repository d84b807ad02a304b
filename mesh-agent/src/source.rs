// SPDX-License-Identifier: Apache-2.0
//! Where the facts about the cluster come from.
//!
//! [`watch`] gives the latest [`Cluster`] and the latest [`Report`] of what could not be used, and
//! says when the facts are complete: nothing is ever decided on half of them. This room knows
//! nothing of nodes, pods on this machine, plans or maps.

mod dir;
mod files;
pub(crate) mod kubernetes;
pub mod state;
pub(crate) mod status;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::Warning;
use mesh_plan::cluster::{Cluster, ObjectRef, Rejection, Version};
use tokio::sync::watch;

use mesh_config::Source;

/// What the room needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the state comes from.
    pub source: Source,
    /// Where last good versions are kept over a restart.
    pub state_dir: PathBuf,
    /// Pod CIDRs beside those of Node objects.
    pub pod_cidrs: Vec<IpNet>,
    /// How the Kubernetes API is reached; `None` = as a pod of the cluster.
    pub kubeconfig: Option<PathBuf>,
}

/// The latest facts. When both receivers are dropped, the room ends.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The facts; a new value only when they differ.
    pub cluster: watch::Receiver<Arc<Cluster>>,
    /// What could not be used, and what is probably not meant.
    pub report: watch::Receiver<Arc<Report>>,
    /// Turns true with the first facts; before that they are empty, and nothing may be decided on
    /// them.
    pub complete: watch::Receiver<bool>,
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
    /// Kinds that are not installed in the cluster.
    pub absent: Vec<String>,
    /// Which versions the rejections are of, where the source has versions.
    pub rejected: BTreeMap<ObjectRef, Version>,
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
    #[error("cannot run the thread that reads the cluster's state")]
    Thread(#[source] io::Error),
    /// There is no client of the Kubernetes API.
    #[error(transparent)]
    Client(#[from] mesh_kube::Error),
}

impl Error {
    /// Whether the configuration must change before it goes away.
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Thread(_) => false,
            Self::Client(_) => true,
        }
    }
}

/// Reads the source and goes on doing so until every receiver is dropped.
///
/// # Errors
/// The source cannot be read at all.
pub async fn watch(settings: Settings) -> Result<Watched, Error> {
    match settings.source.clone() {
        Source::Dir(path) => dir::watch(path, settings).await,
        Source::Kubernetes => kubernetes::watch(settings).await,
    }
}

fn replace<T: PartialEq>(to: &watch::Sender<Arc<T>>, value: T) {
    to.send_if_modified(|current| {
        let changed = **current != value;
        if changed {
            *current = Arc::new(value);
        }
        changed
    });
}

/// Logs what was not said before.
fn announce(before: &Report, now: &Report) {
    for rejection in &now.rejections {
        if !before.rejections.contains(rejection) {
            tracing::error!(object = %rejection.object, field = rejection.field,
                why = rejection.why, consequence = rejection.consequence, "object rejected");
        }
    }
    for warning in &now.warnings {
        if !before.warnings.contains(warning) {
            tracing::warn!(object = %warning.object, field = warning.field,
                what = warning.what, "object is odd");
        }
    }
}
