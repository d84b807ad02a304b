// SPDX-License-Identifier: Apache-2.0
//! The service accounts in use on each node, from a watch of all pods.
//!
//! Only the node and the service account of a pod are kept. Finished pods do not count, nor do pods in
//! the host network, which have no identity of their own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::sync::{RwLock, watch};
use tokio::time::timeout;

use mesh_log::warn_limited;

/// The node and the service account of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PodIdentity {
    pub(super) node: String,
    pub(super) namespace: String,
    pub(super) service_account: String,
}

#[derive(Debug, Default)]
struct Index {
    pods: BTreeMap<(String, String), PodIdentity>,
    /// Number of pods of each identity.
    counts: BTreeMap<PodIdentity, usize>,
}

impl Index {
    fn put(&mut self, pod: &Pod) {
        self.remove(pod);
        if let Some(identity) = identity(pod) {
            *self.counts.entry(identity.clone()).or_default() += 1;
            self.pods.insert(key(pod), identity);
        }
    }

    fn remove(&mut self, pod: &Pod) {
        let Some(identity) = self.pods.remove(&key(pod)) else {
            return;
        };
        if let Some(count) = self.counts.get_mut(&identity) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&identity);
            }
        }
    }
}

fn key(pod: &Pod) -> (String, String) {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    (text(&pod.metadata.namespace), text(&pod.metadata.name))
}

/// Returns the identity of a pod; `None` if the pod has none.
fn identity(pod: &Pod) -> Option<PodIdentity> {
    let spec = pod.spec.as_ref()?;
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if spec.host_network == Some(true) || matches!(phase, Some("Succeeded" | "Failed")) {
        return None;
    }
    let account = spec.service_account_name.clone();
    Some(PodIdentity {
        node: spec.node_name.clone().filter(|name| !name.is_empty())?,
        namespace: pod.metadata.namespace.clone()?,
        service_account: account.unwrap_or_else(|| "default".to_owned()),
    })
}

/// The identities of all pods. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Workloads {
    index: Arc<RwLock<Index>>,
    /// Counts changes; 0 = the pods are not known yet.
    revision: watch::Receiver<u64>,
}

impl Workloads {
    /// Watches all pods from now on.
    pub(super) fn watch(client: Client) -> (Self, impl Future<Output = ()> + Send) {
        let index = Arc::new(RwLock::new(Index::default()));
        let (changed, revision) = watch::channel(0);
        let task = follow(client, Arc::clone(&index), changed);
        (Self { index, revision }, task)
    }

    /// Waits until all pods are known.
    pub(super) async fn known(&self) {
        let mut revision = self.revision.clone();
        // The sender lives as long as the controller.
        drop(revision.wait_for(|revision| *revision > 0).await);
    }

    /// Waits up to `wait` for a pod with this identity: the agent may know a pod before the controller
    /// does. Returns whether there is one.
    pub(super) async fn wait_for(&self, identity: &PodIdentity, wait: Duration) -> bool {
        let mut revision = self.revision.clone();
        let look = async {
            loop {
                revision.mark_unchanged();
                if self.index.read().await.counts.contains_key(identity) {
                    return true;
                }
                if revision.changed().await.is_err() {
                    return false;
                }
            }
        };
        timeout(wait, look).await.unwrap_or(false)
    }
}

async fn follow(client: Client, index: Arc<RwLock<Index>>, changed: watch::Sender<u64>) {
    let config = watcher::Config::default().page_size(500);
    let mut events = watcher(Api::<Pod>::all(client), config)
        .default_backoff()
        .boxed();
    // The pods of a list in progress.
    let mut fresh = Index::default();
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(pod)) => index.write().await.put(&pod),
            Ok(watcher::Event::Delete(pod)) => index.write().await.remove(&pod),
            Ok(watcher::Event::Init) => {
                fresh = Index::default();
                continue;
            }
            Ok(watcher::Event::InitApply(pod)) => {
                fresh.put(&pod);
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                *index.write().await = std::mem::take(&mut fresh);
            }
            Err(error) => {
                warn_limited!(
                    "pods",
                    error,
                    "cannot watch pods; continuing with the known pods"
                );
                continue;
            }
        }
        changed.send_modify(|revision| *revision += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, phase: &str, host_network: bool) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {
                "nodeName": "n1", "serviceAccountName": "web", "hostNetwork": host_network,
                "containers": [],
            },
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    #[test]
    fn identity_is_present_while_a_pod_has_it() {
        let identity = PodIdentity {
            node: "n1".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
        };
        let mut index = Index::default();
        index.put(&pod("a", "Pending", false));
        index.put(&pod("b", "Running", false));
        index.put(&pod("b", "Running", false));
        assert_eq!(index.counts.get(&identity), Some(&2));
        index.remove(&pod("a", "Running", false));
        assert!(index.counts.contains_key(&identity));
        index.put(&pod("b", "Succeeded", false));
        assert!(index.counts.is_empty() && index.pods.is_empty());
        index.put(&pod("c", "Running", true));
        assert!(index.counts.is_empty());
    }
}
