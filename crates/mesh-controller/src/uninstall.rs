// SPDX-License-Identifier: Apache-2.0
//! `mesh-controller uninstall`: removes the mesh from every node of the cluster, before its objects are
//! deleted.
//!
//! Ends the agents by deleting their DaemonSet, then runs `cleanup` on every node by another one
//! that is made of the same pods, waits until it is done everywhere, and deletes that too. Nodes
//! that are away keep the mesh until `mesh-agent cleanup` is run there, and are named.

mod nodes;

use std::path::Path;

/// What went wrong. Everything can be tried again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no client of the Kubernetes API.
    #[error(transparent)]
    Connect(#[from] mesh_kube::Error),
    /// The API server refused.
    #[error("cannot {what}: {why}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// What the API server said.
        why: String,
    },
    /// The DaemonSet is not what the chart makes.
    #[error("the DaemonSet of the agents is not of this release: {0}")]
    Template(&'static str),
    /// Not done in time.
    #[error("{what} after {seconds} s: {left}")]
    Late {
        /// What is not done.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// On which nodes.
        left: String,
    },
    /// No runtime.
    #[error("cannot start")]
    Runtime(#[from] std::io::Error),
}

/// Does it all; gives the number of nodes that were cleaned.
///
/// # Errors
/// What could not be done; nodes that were cleaned stay clean.
pub fn run(namespace: &str, kubeconfig: Option<&Path>) -> Result<usize, Error> {
    nodes::run(namespace, kubeconfig)
}
