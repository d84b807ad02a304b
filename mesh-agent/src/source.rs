// SPDX-License-Identifier: Apache-2.0
//! Reads the cluster snapshot from manifests or from the Kubernetes API.
//!
//! [`watch`] publishes the latest [`ClusterSnapshot`] snapshot, the latest [`Report`] of objects that could not
//! be used, and whether the snapshot is complete: nothing may be decided on an incomplete one. This
//! module knows nothing of local pods, plans or maps.

mod dir;
mod files;
pub(crate) mod kubernetes;
pub mod state;
pub(crate) mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::Warning;
use mesh_plan::cluster::{ClusterSnapshot, ObjectRef, Rejection, Version};
use tokio::sync::watch;

use mesh_config::Source;
use mesh_log::log_limited;

/// The settings of a source.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The kind of source.
    pub source: Source,
    /// The directory that keeps the last good versions across restarts.
    pub state_dir: PathBuf,
    /// The pod CIDRs in addition to those of Node objects.
    pub pod_cidrs: Vec<IpNet>,
    /// The kubeconfig for the Kubernetes API; `None` uses the service account of the agent's pod.
    pub kubeconfig: Option<PathBuf>,
}

/// A subscription to the latest snapshot. The source stops when both receivers are dropped.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The snapshot. It is replaced only by a different one.
    pub cluster: watch::Receiver<Arc<ClusterSnapshot>>,
    /// The report of rejections and warnings.
    pub report: watch::Receiver<Arc<Report>>,
    /// Whether the snapshot is complete. Until then it is empty, and nothing may be decided on it.
    pub complete: watch::Receiver<bool>,
}

/// Messages about objects and about the source itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The rejected objects and their consequences, sorted.
    pub rejections: Vec<Rejection>,
    /// The warnings about valid objects, sorted.
    pub warnings: Vec<Warning>,
    /// The reason why the source cannot be read now. The last snapshot stays in force.
    pub stale: Option<String>,
    /// The reason why the last good versions cannot be saved.
    pub not_kept: Option<String>,
    /// The kinds that are not installed in the cluster.
    pub absent: Vec<String>,
    /// The versions of the rejected objects, if the source has versions.
    pub rejected: BTreeMap<ObjectRef, Version>,
}

/// The reason why a source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be read.
    #[error("cannot read manifests in {path}")]
    Read {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The thread of the source did not start, or ended.
    #[error("cannot run the thread that reads the cluster state")]
    Thread(#[source] io::Error),
    /// There is no client of the Kubernetes API.
    #[error(transparent)]
    Client(#[from] mesh_kube::Error),
}

impl Error {
    /// Whether the error persists until the configuration changes.
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Thread(_) => false,
            Self::Client(_) => true,
        }
    }
}

/// Starts to read a source, which continues until every receiver is dropped.
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

/// Logs the rejections and warnings that were not in the previous report.
fn log_new_messages(before: &Report, now: &Report) {
    let known: BTreeSet<&Rejection> = before.rejections.iter().collect();
    for rejection in &now.rejections {
        if !known.contains(rejection) {
            log_limited!(error, rejection.object, object = %rejection.object, field = rejection.field,
                why = rejection.why, consequence = rejection.consequence, "object rejected");
        }
    }
    let known: BTreeSet<&Warning> = before.warnings.iter().collect();
    for warning in &now.warnings {
        if !known.contains(warning) {
            log_limited!(warn, warning.object, object = %warning.object, field = warning.field,
                what = warning.what, "object accepted with a warning");
        }
    }
}
