// SPDX-License-Identifier: Apache-2.0
//! A client of the API server, with the credentials of a kubeconfig or of the agent's own pod.
//!
//! Tokens and CA certificates that are files are read again by the client while it runs.

use std::path::Path;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::super::Error;

/// An address that does not answer is given up after this time.
const CONNECT: Duration = Duration::from_secs(5);

/// Builds a client; it connects when it is used. Must be called in a runtime.
pub(crate) async fn connect(kubeconfig: Option<&Path>) -> Result<Client, Error> {
    let mut config = match kubeconfig {
        Some(path) => {
            let wrong = |source| Error::Kubeconfig {
                path: path.to_owned(),
                source: Box::new(source),
            };
            let read = Kubeconfig::read_from(path).map_err(wrong)?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(read, &options)
                .await
                .map_err(wrong)?
        }
        None => Config::incluster().map_err(|source| Error::InCluster(Box::new(source)))?,
    };
    config.connect_timeout = Some(CONNECT);
    Client::try_from(config).map_err(|source| Error::Client(Box::new(source)))
}
