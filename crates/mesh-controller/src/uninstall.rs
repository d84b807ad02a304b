// SPDX-License-Identifier: Apache-2.0
//! `mesh-controller uninstall`: removes the mesh from every node of the cluster, before its objects are
//! deleted.
//!
//! The command deletes the DaemonSet of the agents, runs `cleanup` on every node by a DaemonSet with
//! the same pods, waits until every node is clean, and deletes that DaemonSet too. An unreachable node
//! keeps the mesh until `mesh-agent cleanup` runs there; the error names such nodes.

mod nodes;

use std::path::Path;

/// A failure of the uninstallation. The command can be repeated after each.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The Kubernetes API cannot be reached.
    #[error(transparent)]
    Connect(#[from] mesh_kube::Error),
    /// The API server refused a request.
    #[error("cannot {what}: {why}")]
    Api {
        /// Failed operation.
        what: &'static str,
        /// Message of the API server.
        why: String,
    },
    /// The DaemonSet of the agents has an unexpected form.
    #[error("unsupported DaemonSet of the agents: {0}")]
    Template(&'static str),
    /// A step timed out.
    #[error("timed out after {seconds} s: {what}: {left}")]
    Timeout {
        /// Unfinished step.
        what: &'static str,
        /// The time that has passed.
        seconds: u64,
        /// Unfinished nodes.
        left: String,
    },
    /// The runtime cannot be built.
    #[error("cannot build the async runtime")]
    Runtime(#[from] std::io::Error),
}

/// Removes the mesh from all nodes. Returns the number of cleaned nodes.
///
/// # Errors
/// When a step fails. Clean nodes stay clean.
pub fn run(namespace: &str, kubeconfig: Option<&Path>) -> Result<usize, Error> {
    nodes::run(namespace, kubeconfig)
}
