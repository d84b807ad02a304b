// SPDX-License-Identifier: Apache-2.0
//! Builds a client of the Kubernetes API with the credentials of a kubeconfig or of the pod it runs in.
//!
//! The client reloads token and CA files while it runs.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// The time limit for connecting to the API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the client cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {path}", path = path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<kube::config::KubeconfigError>,
    },
    /// The process does not run in a pod.
    #[error("not running in a pod: set a kubeconfig with --kubeconfig")]
    InCluster(#[source] Box<kube::config::InClusterError>),
    /// The configuration is invalid.
    #[error("cannot build a client of the Kubernetes API")]
    Client(#[source] Box<kube::Error>),
}

/// Builds a client, which connects on first use. Call it in a tokio runtime.
///
/// # Errors
/// The kubeconfig or the pod's credentials cannot be used.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, Error> {
    let mut config = match kubeconfig {
        Some(path) => {
            let failed = |source| Error::Kubeconfig {
                path: path.to_owned(),
                source: Box::new(source),
            };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(failed)?
        }
        None => Config::incluster().map_err(|source| Error::InCluster(Box::new(source)))?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Client::try_from(config).map_err(|source| Error::Client(Box::new(source)))
}
