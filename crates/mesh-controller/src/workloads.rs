// SPDX-License-Identifier: Apache-2.0
//! Which service accounts have pods on which node, from a watch of all pods.
//!
//! Of a pod only its node and account are kept. Pods that have ended do not count, nor do those of
//! the host's network, which have no identity of their own.

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

/// A pod's node, namespace and service account.
type Place = (String, String, String);

#[derive(Debug, Default)]
struct Index {
    pods: BTreeMap<(String, String), Place>,
    /// How many pods there are of each.
    places: BTreeMap<Place, usize>,
}

impl Index {
    fn put(&mut self, pod: &Pod) {
        self.remove(pod);
        if let Some(place) = place(pod) {
            *self.places.entry(place.clone()).or_default() += 1;
            self.pods.insert(key(pod), place);
        }
    }

    fn remove(&mut self, pod: &Pod) {
        let Some(place) = self.pods.remove(&key(pod)) else {
            return;
        };
        if let Some(count) = self.places.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                self.places.remove(&place);
            }
        }
    }
}

fn key(pod: &Pod) -> (String, String) {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    (text(&pod.metadata.namespace), text(&pod.metadata.name))
}

/// Where a pod runs, if it can have an identity there.
fn place(pod: &Pod) -> Option<Place> {
    let spec = pod.spec.as_ref()?;
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if spec.host_network == Some(true) || matches!(phase, Some("Succeeded" | "Failed")) {
        return None;
    }
    let account = spec.service_account_name.clone();
    Some((
        spec.node_name.clone().filter(|name| !name.is_empty())?,
        pod.metadata.namespace.clone()?,
        account.unwrap_or_else(|| "default".to_owned()),
    ))
}

/// All pods, as far as the CA must know them. Clones share them.
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

    /// Whether a pod of that account runs on the node. The agent may know a pod before we do: it is
    /// waited for, up to `patience`.
    pub(super) async fn is_there(
        &self,
        (node, namespace, account): (&str, &str, &str),
        patience: Duration,
    ) -> bool {
        let place = (node.to_owned(), namespace.to_owned(), account.to_owned());
        let mut revision = self.revision.clone();
        let look = async {
            loop {
                revision.mark_unchanged();
                if self.index.read().await.places.contains_key(&place) {
                    return true;
                }
                if revision.changed().await.is_err() {
                    return false;
                }
            }
        };
        timeout(patience, look).await.unwrap_or(false)
    }
}

async fn follow(client: Client, index: Arc<RwLock<Index>>, changed: watch::Sender<u64>) {
    let config = watcher::Config::default().page_size(500);
    let mut events = watcher(Api::<Pod>::all(client), config)
        .default_backoff()
        .boxed();
    // What a list that is under way has brought.
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
                    "pods cannot be watched; those that are known count"
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
    fn a_place_is_there_as_long_as_one_pod_is() {
        let place = ("n1".to_owned(), "shop".to_owned(), "web".to_owned());
        let mut index = Index::default();
        index.put(&pod("a", "Pending", false));
        index.put(&pod("b", "Running", false));
        index.put(&pod("b", "Running", false));
        assert_eq!(index.places.get(&place), Some(&2));
        index.remove(&pod("a", "Running", false));
        assert!(index.places.contains_key(&place));
        index.put(&pod("b", "Succeeded", false));
        assert!(index.places.is_empty() && index.pods.is_empty());
        index.put(&pod("c", "Running", true));
        assert!(index.places.is_empty());
    }
}
