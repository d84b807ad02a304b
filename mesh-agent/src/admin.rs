// SPDX-License-Identifier: Apache-2.0
//! The admin interface: the agent's own pages beside those of metrics and probes.
//!
//! The `--metrics` address serves `/metrics`, `/livez` and `/readyz`, and so does the `--probes` address, which
//! pods cannot reach, so that no pod can keep the kubelet from an answer. The admin socket (mode 0600)
//! serves these and `/status`, `/plan`, `/pods`, `/facts`, `/connections`, `/flows` and
//! `/log-level`. The pages change nothing but the log level.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use mesh_plan::{ClusterSnapshot, Plan, Rejection};
use mesh_telemetry::flows::FlowSink;
use mesh_telemetry::http::{self, Listener, Probes};
use mesh_telemetry::metrics::Metrics;
use mesh_telemetry::readiness::Readiness;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::control::InForce;
use crate::source::Report;
use mesh_config::AdminAddr;
use mesh_datapath::Handles;
use mesh_datapath::cni::CniConflicts;
use mesh_log::Level;

mod pages;

/// A failure to open a listener.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The metrics address is in use, or does not exist.
    #[error("cannot listen on {addr} for metrics (--metrics)")]
    Metrics {
        /// The address.
        addr: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The address of probes is in use, or does not exist.
    #[error("cannot listen on {addr} for probes (--probes)")]
    Probes {
        /// The address.
        addr: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The admin address is in use, or does not exist.
    #[error("cannot listen on {addr} for the admin interface (--admin)")]
    Tcp {
        /// The address.
        addr: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The admin socket cannot be created.
    #[error("cannot create the admin socket {path} (--admin)", path = path.display())]
    Unix {
        /// Path of the socket.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// The content of the pages.
#[derive(Clone)]
pub struct Views {
    /// Name of the node.
    pub node: String,
    /// The metrics.
    pub metrics: Metrics,
    /// The newest snapshot of the cluster.
    pub snapshots: watch::Receiver<Arc<ClusterSnapshot>>,
    /// The policy in force, the managed pods and their status.
    pub in_force: watch::Receiver<Arc<InForce>>,
    /// Formats a plan.
    pub plan_text: fn(&Plan) -> String,
    /// The fields that are rejected now.
    pub rejections: watch::Receiver<Arc<Vec<Rejection>>>,
    /// The node's CNI plugin and its conflicts with the mesh.
    pub cni_conflicts: watch::Receiver<Arc<CniConflicts>>,
    /// The state of the source of the cluster's state.
    pub source: watch::Receiver<Arc<Report>>,
    /// Tells tunnels from connections of applications; `None` = there are no tunnels.
    pub datapath: Option<Handles>,
    /// The last flow records.
    pub flows: FlowSink,
    /// The log level, if the process logs.
    pub level: Option<Level>,
}

impl Views {
    fn readiness(&self) -> &Readiness {
        self.metrics.readiness()
    }

    fn probes(&self) -> Probes {
        let metrics = self.metrics.clone();
        let page = move |format| metrics.page(format);
        Probes::new(page, self.readiness().clone())
    }
}

impl std::fmt::Debug for Views {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Views")
    }
}

/// The clients that can reach a listener of the admin interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Any user of the node: read only.
    Local,
    /// Root: read and change.
    Root,
}

/// The open listeners, before they are served.
pub struct Admin {
    /// The listeners of metrics and probes.
    probes: [Listener; 2],
    listeners: Vec<(Access, Listener)>,
    metrics_addr: SocketAddr,
    views: Views,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin")
            .field("metrics", &self.metrics_addr)
            .finish_non_exhaustive()
    }
}

impl Admin {
    /// Opens every listener and takes over those of a predecessor: the addresses of metrics and probes are
    /// shared until the predecessor ends, the admin socket is replaced. Must be called inside the runtime that serves.
    ///
    /// # Errors
    /// When a listener cannot be opened.
    pub fn bind(
        [metrics_addr, probes_addr]: [SocketAddr; 2],
        admin: &[AdminAddr],
        views: Views,
    ) -> Result<Self, Error> {
        let metrics = Listener::tcp(metrics_addr).map_err(|source| Error::Metrics {
            addr: metrics_addr,
            source,
        })?;
        let probes = Listener::tcp(probes_addr).map_err(|source| Error::Probes {
            addr: probes_addr,
            source,
        })?;
        let mut listeners = Vec::new();
        for addr in admin {
            listeners.push(match addr {
                AdminAddr::Tcp(addr) => {
                    let failed = |source| Error::Tcp {
                        addr: *addr,
                        source,
                    };
                    (Access::Local, Listener::tcp(*addr).map_err(failed)?)
                }
                AdminAddr::Unix(path) => {
                    let failed = |source| Error::Unix {
                        path: path.clone(),
                        source,
                    };
                    (Access::Root, Listener::unix(path).map_err(failed)?)
                }
            });
        }
        Ok(Self {
            metrics_addr: metrics.addr().unwrap_or(metrics_addr),
            probes: [metrics, probes],
            listeners,
            views,
        })
    }

    /// Returns the metrics address, with the assigned port if port 0 was requested.
    #[must_use]
    pub fn metrics_addr(&self) -> SocketAddr {
        self.metrics_addr
    }

    /// Serves until `stop` turns true. The file of the admin socket is removed then, unless a successor
    /// has replaced it.
    pub async fn serve(self, stop: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        let probes = self.views.probes();
        for listener in self.probes {
            tasks.spawn(http::serve(listener, probes.clone(), stop.clone()));
        }
        for (access, listener) in self.listeners {
            let pages = pages::Pages::new(self.views.clone(), access);
            tasks.spawn(http::serve(listener, pages, stop.clone()));
        }
        while tasks.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests;
