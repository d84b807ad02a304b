// SPDX-License-Identifier: Apache-2.0
//! Builds a client of the Kubernetes API with the credentials of a kubeconfig or of the pod it runs in.
//!
//! The client reads token and CA files again while it runs.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// How long a connection to the API server may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {path}", path = path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<kube::config::KubeconfigError>,
    },
    /// The program does not run in a pod of a cluster.
    #[error("not running in a pod of a cluster: name a kubeconfig with --kubeconfig")]
    InCluster(#[source] Box<kube::config::InClusterError>),
    /// The configuration does not make a client.
    #[error("cannot build a client of the Kubernetes API")]
    Client(#[source] Box<kube::Error>),
}

/// Builds a client, which connects when it is first used. Must be called in a tokio runtime.
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
