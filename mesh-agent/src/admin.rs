// SPDX-License-Identifier: Apache-2.0
//! What the agent answers: metrics and probes to everybody, its state to root.
//!
//! The `--metrics` address serves `/metrics`, `/livez` and `/readyz`. The admin socket (mode 0600)
//! serves these and `/status`, `/plan`, `/pods`, `/facts`, `/connections`, `/flows` and
//! `/log-level`. Connections, headers and bodies are bounded. Nothing here changes anything but the
//! level of logs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_plan::{Cluster, Index, Plan, Rejection};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use crate::control::Status;
use crate::flows::FlowSink;
use crate::metrics::Metrics;
use crate::source::Report;
use mesh_config::AdminAddr;
use mesh_datapath::cni::Neighbour;
use mesh_datapath::datapath::Handles;
use mesh_datapath::pods::PodTable;
use mesh_log::{Level, warn_limited};

mod bind;
mod pages;
mod ready;

pub use ready::{Readiness, ReadyTask};

/// Connections of one listener at once: a few scrapers, probes and people.
const MOST_CONNECTIONS: usize = 64;
/// A request's header must be there within this, from the connection's beginning or the end of
/// the request before it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(15);
/// After this a connection ends with its current answer.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
/// How long the current answer may then still take.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// Bytes of a request's header, and of the buffer it is read into.
const HEADER_BYTES: usize = 16 * 1024;
/// Fields of a request's header.
const HEADER_FIELDS: usize = 64;

/// Why a listener could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address of metrics is not free, or not there.
    #[error("cannot listen on {addr} for metrics (--metrics)")]
    Metrics {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The admin address is not free, or not there.
    #[error("cannot listen on {addr} for the admin interface (--admin)")]
    Tcp {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The admin socket cannot be made.
    #[error("cannot make the admin socket {path} (--admin)", path = path.display())]
    Unix {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What the answers are made of: read-only handles of other rooms.
#[derive(Clone)]
pub struct Views {
    /// The node's name.
    pub node: String,
    /// Every number.
    pub metrics: Metrics,
    /// Whether the agent is ready.
    pub readiness: Readiness,
    /// The cluster as it was read last.
    pub facts: watch::Receiver<Arc<Cluster>>,
    /// The plan in force.
    pub plan: watch::Receiver<Arc<Index>>,
    /// How a plan is shown.
    pub plan_text: fn(&Plan) -> String,
    /// What is rejected now.
    pub rejections: watch::Receiver<Arc<Vec<Rejection>>>,
    /// The pods that were adopted.
    pub pods: watch::Receiver<Arc<PodTable>>,
    /// How it goes with the node.
    pub status: watch::Receiver<Arc<Status>>,
    /// What is beside the mesh on the node.
    pub neighbour: watch::Receiver<Arc<Neighbour>>,
    /// How it goes with the source of the cluster's state.
    pub source: watch::Receiver<Arc<Report>>,
    /// Tells tunnels from connections of applications; none = there are no tunnels.
    pub datapath: Option<Handles>,
    /// The last records.
    pub flows: FlowSink,
    /// The level of logs, if the process has logs.
    pub level: Option<Level>,
}

impl std::fmt::Debug for Views {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Views")
    }
}

/// Who may be asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    /// Anybody who reaches the node.
    Public,
    /// Any user of the node: may look.
    Local,
    /// Root: may look and change.
    Root,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, bind::SocketFile),
}

/// The listeners, open and not yet served.
pub struct Admin {
    listeners: Vec<(Door, Listener)>,
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
    /// Opens every listener. An older agent's are taken over: the address of metrics is shared
    /// with it until it ends, the admin socket's name is ours from now on.
    ///
    /// # Errors
    /// Which one could not be opened. Must be called inside the runtime that serves.
    pub fn bind(metrics: SocketAddr, admin: &[AdminAddr], views: Views) -> Result<Self, Error> {
        let open = bind::tcp(metrics).or_else(|error| match metrics.ip() {
            // A host without IPv6.
            IpAddr::V6(ip) if ip.is_unspecified() && bind::no_ipv6(&error) => bind::tcp(
                SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), metrics.port()),
            ),
            IpAddr::V6(_) | IpAddr::V4(_) => Err(error),
        });
        let failed = |source| Error::Metrics {
            addr: metrics,
            source,
        };
        let open = open.map_err(failed)?;
        let metrics_addr = open.local_addr().map_err(failed)?;
        let mut listeners = vec![(Door::Public, Listener::Tcp(open))];
        for addr in admin {
            listeners.push(match addr {
                AdminAddr::Tcp(addr) => {
                    let open = bind::tcp(*addr).map_err(|source| Error::Tcp {
                        addr: *addr,
                        source,
                    })?;
                    (Door::Local, Listener::Tcp(open))
                }
                AdminAddr::Unix(path) => {
                    let (open, file) = bind::unix(path).map_err(|source| Error::Unix {
                        path: path.clone(),
                        source,
                    })?;
                    (Door::Root, Listener::Unix(open, file))
                }
            });
        }
        Ok(Self {
            listeners,
            metrics_addr,
            views,
        })
    }

    /// Where metrics are served: the address asked for, with the port that was found if that was 0.
    #[must_use]
    pub fn metrics_addr(&self) -> SocketAddr {
        self.metrics_addr
    }

    /// Answers until `stop` turns true. The admin socket's file is removed then, unless a
    /// successor has already replaced it.
    pub async fn serve(self, stop: watch::Receiver<bool>) {
        let mut tasks = tokio::task::JoinSet::new();
        for (door, listener) in self.listeners {
            let views = self.views.clone();
            let stop = stop.clone();
            tasks.spawn(async move {
                match listener {
                    Listener::Tcp(listener) => accept_all(listener, door, views, stop).await,
                    Listener::Unix(listener, file) => {
                        accept_all(listener, door, views, stop).await;
                        drop(file);
                    }
                }
            });
        }
        while tasks.join_next().await.is_some() {}
    }
}

/// A listener of either kind.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    async fn next(&self) -> io::Result<TcpStream> {
        Ok(self.accept().await?.0)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

async fn accept_all(
    listener: impl Accept,
    door: Door,
    views: Views,
    mut stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        // A connection waits in the backlog until there is a place for it.
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.next().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match (place, accepted) {
            (Ok(place), Ok(stream)) => {
                let views = views.clone();
                tokio::spawn(async move {
                    connection(stream, door, views).await;
                    drop(place);
                });
            }
            (_, Err(error)) => {
                warn_limited!("admin_accept", error, "cannot accept a connection");
                // Out of descriptors, most likely: it does not help to try at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            (Err(_closed), Ok(_)) => return,
        }
    }
}

async fn connection<S>(stream: S, door: Door, views: Views)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let views = views.clone();
        async move { pages::answer(request, door, views).await }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES)
        .max_headers(HEADER_FIELDS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = tokio::time::sleep(CONNECTION_AGE) => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(LAST_ANSWER, connection).await {
                Ok(ended) => ended,
                Err(_elapsed) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection of the admin interface ended");
    }
}

/// The path under which a socket is made before it takes the place of an older one.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

#[cfg(test)]
mod tests;
