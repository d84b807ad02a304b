// SPDX-License-Identifier: Apache-2.0
//! Creates the client of the API server, from a kubeconfig or from the service account of the agent's pod.
//!
//! The client reloads tokens and CA certificates from their files while it runs.

use std::path::Path;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::super::Error;

/// The timeout of a connection attempt.
const CONNECT: Duration = Duration::from_secs(5);

/// Creates a client, which connects at its first use. Must be called in a tokio runtime.
pub(crate) async fn connect(kubeconfig: Option<&Path>) -> Result<Client, Error> {
    let mut config = match kubeconfig {
        Some(path) => {
            let invalid = |source| Error::Kubeconfig {
                path: path.to_owned(),
                source: Box::new(source),
            };
            let read = Kubeconfig::read_from(path).map_err(invalid)?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(read, &options)
                .await
                .map_err(invalid)?
        }
        None => Config::incluster().map_err(|source| Error::InCluster(Box::new(source)))?,
    };
    config.connect_timeout = Some(CONNECT);
    Client::try_from(config).map_err(|source| Error::Client(Box::new(source)))
}
