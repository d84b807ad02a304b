// SPDX-License-Identifier: Apache-2.0
//! Writes the status of the mesh's kinds while this replica leads, and deletes the MeshNodes of deleted
//! nodes.
//!
//! Each pass compares the wanted status with the status at the API server, and writes only
//! differences; no state is kept between passes. Writes are paced, and a burst of changes causes one
//! pass.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions,
};
use kube::runtime::reflector::Store;
use kube::runtime::reflector::store::Writer;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use mesh_api::crd::{
    ClusterMeshPolicy, MeshAuthentication, MeshNode, MeshPolicy, MeshTrafficPolicy, NO_EFFECT,
    PolicyStatus,
};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::ca_store::MANAGER;
use super::metrics::Metrics;
use super::status_aggregation::NodeReports;
use mesh_log::warn_limited;

/// The delay from a change to a pass, so that one pass handles a burst of changes.
const SETTLE: Duration = Duration::from_millis(500);
/// The delay between two writes: at most 20 writes per second.
const PACE: Duration = Duration::from_millis(50);
/// Maximum number of writes of a pass. The next pass starts from fresh reports.
const MAX_WRITES: usize = 40;
/// Maximum time between two passes.
const RESYNC: Duration = Duration::from_secs(60);

/// Watches nodes and policies, and writes the status of policies.
pub(super) struct StatusWriter {
    client: Client,
    metrics: Metrics,
    now: fn() -> Timestamp,
    kinds: Vec<(ApiResource, Store<DynamicObject>)>,
    nodes: Store<PartialObjectMeta<Node>>,
    mesh_nodes: Store<MeshNode>,
    changed: Arc<Notify>,
    watches: JoinSet<()>,
}

impl StatusWriter {
    /// Starts the watches.
    pub(super) fn watch(client: Client, metrics: Metrics, now: fn() -> Timestamp) -> Self {
        let changed = Arc::new(Notify::new());
        let mut watches = JoinSet::new();
        let mut kinds = Vec::new();
        for kind in [
            ApiResource::erase::<MeshPolicy>(&()),
            ApiResource::erase::<ClusterMeshPolicy>(&()),
            ApiResource::erase::<MeshAuthentication>(&()),
            ApiResource::erase::<MeshTrafficPolicy>(&()),
        ] {
            let api = Api::all_with(client.clone(), &kind);
            let events = watcher(api, config()).default_backoff().modify(shrink);
            let writer = Writer::new(kind.clone());
            kinds.push((kind, follow(events, writer, &changed, &mut watches)));
        }
        let events = watcher(
            Api::<PartialObjectMeta<Node>>::all(client.clone()),
            config(),
        );
        let events = events.default_backoff().modify(|node| {
            node.metadata.managed_fields = None;
            node.metadata.annotations = None;
            node.metadata.labels = None;
        });
        let nodes = follow(events, Writer::default(), &changed, &mut watches);
        let events = watcher(Api::<MeshNode>::all(client.clone()), config());
        let events = events.default_backoff().modify(|node| {
            node.metadata.managed_fields = None;
        });
        let mesh_nodes = follow(events, Writer::default(), &changed, &mut watches);
        Self {
            client,
            metrics,
            now,
            kinds,
            nodes,
            mesh_nodes,
            changed,
            watches,
        }
    }

    /// Writes status while this replica leads, until a watch ends.
    pub(super) async fn run(mut self, mut leads: watch::Receiver<bool>) {
        self.all_known().await;
        loop {
            if leads.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            let complete = self.reconcile(&leads).await;
            sleep(SETTLE).await;
            if !complete {
                continue;
            }
            tokio::select! {
                _elapsed = timeout(RESYNC, self.changed.notified()) => sleep(SETTLE).await,
                _ = self.watches.join_next() => return,
            }
        }
    }

    /// Waits until every kind is listed: an object that is not known yet must not count as deleted.
    async fn all_known(&self) {
        for (_, store) in &self.kinds {
            // An error means that the watch has ended; `run` notices that.
            drop(store.wait_until_ready().await);
        }
        drop(self.nodes.wait_until_ready().await);
        drop(self.mesh_nodes.wait_until_ready().await);
    }

    /// Updates the status of every object. Returns false if the pass is incomplete.
    async fn reconcile(&self, leads: &watch::Receiver<bool>) -> bool {
        let nodes: BTreeSet<String> = self
            .nodes
            .state()
            .iter()
            .map(|node| node.name_any())
            .collect();
        let (current, deleted): (Vec<_>, Vec<_>) = self
            .mesh_nodes
            .state()
            .into_iter()
            .partition(|node| nodes.contains(&node.name_any()));
        for node in deleted {
            self.remove(&node).await;
        }
        let reports = NodeReports::new(
            current
                .iter()
                .filter_map(|node| Some((node.metadata.name.as_deref()?, node.status.as_ref()?))),
        );
        self.metrics.nodes(reports.nodes());
        let now = Time((self.now)());
        let mut written = 0;
        for (kind, store) in &self.kinds {
            for object in store.state() {
                if !*leads.borrow() {
                    return false;
                }
                let before = object.data.get("status").cloned().unwrap_or(Value::Null);
                let before: PolicyStatus = serde_json::from_value(before).unwrap_or_default();
                let uid = object.metadata.uid.as_deref().unwrap_or_default();
                let generation = object.metadata.generation.unwrap_or_default();
                let status = if kind.kind == "MeshTrafficPolicy" {
                    not_implemented(generation, &before, &now)
                } else {
                    reports.status((uid, generation), &before, &now)
                };
                if status == before {
                    continue;
                }
                self.write(kind, &object, &status).await;
                written += 1;
                if written == MAX_WRITES {
                    return false;
                }
                sleep(PACE).await;
            }
        }
        true
    }

    async fn write(&self, kind: &ApiResource, object: &DynamicObject, status: &PolicyStatus) {
        let name = object.name_any();
        let api: Api<DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), &namespace, kind),
            None => Api::all_with(self.client.clone(), kind),
        };
        let patch = json!({
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            // The UID prevents a write to a new object with the same name.
            "metadata": {"name": name, "uid": object.metadata.uid},
            "status": status,
        });
        let params = PatchParams::apply(MANAGER).force();
        let result = api.patch_status(&name, &params, &Patch::Apply(patch)).await;
        self.metrics.status_write(result.is_ok());
        match result {
            Ok(_) => {}
            // The object was deleted, or replaced by another.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => {
                warn_limited!("status", error, "cannot write the status of a policy")
            }
        }
    }

    /// Deletes the MeshNode of a deleted node.
    async fn remove(&self, node: &MeshNode) {
        let name = node.name_any();
        // The watch may lag: the API server tells whether the node is new.
        let there = Api::<Node>::all(self.client.clone())
            .get_metadata_opt(&name)
            .await;
        if !matches!(there, Ok(None)) {
            return;
        }
        let params = DeleteParams::default().preconditions(Preconditions {
            uid: node.metadata.uid.clone(),
            resource_version: None,
        });
        let deleted = Api::<MeshNode>::all(self.client.clone())
            .delete(&name, &params)
            .await;
        match deleted {
            Ok(_) => tracing::info!(node = name, "MeshNode of a deleted node removed"),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => warn_limited!(
                "mesh_node",
                error,
                "cannot delete the MeshNode of a deleted node"
            ),
        }
    }
}

fn config() -> watcher::Config {
    watcher::Config::default().page_size(500)
}

/// Removes everything of a policy except its identity and status.
fn shrink(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
    let status = object.data.get_mut("status").map(Value::take);
    object.data = match status {
        Some(status) => json!({"status": status}),
        None => json!({}),
    };
}

/// Stores the objects of a watch, and notifies `changed` of each event.
fn follow<K>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    writer: Writer<K>,
    changed: &Arc<Notify>,
    watches: &mut JoinSet<()>,
) -> Store<K>
where
    K: Resource + Clone + Send + Sync + 'static,
    K::DynamicType: Clone + Eq + std::hash::Hash + Send + Sync,
{
    let store = writer.as_reader();
    let changed = Arc::clone(changed);
    let events = events.reflect(writer);
    watches.spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(_) => changed.notify_one(),
                Err(error) => warn_limited!("status_watch", error, "cannot watch a kind"),
            }
        }
    });
    store
}

/// Returns the status of a kind that agents do not implement.
fn not_implemented(generation: i64, before: &PolicyStatus, now: &Time) -> PolicyStatus {
    let mut status = NodeReports::default().status(("", generation), before, now);
    for condition in &mut status.conditions {
        let old = before
            .conditions
            .iter()
            .find(|one| one.type_ == condition.type_);
        condition.status = "False".to_owned();
        condition.reason = "NotActedUpon".to_owned();
        condition.message = NO_EFFECT.to_owned();
        condition.last_transition_time = match old.filter(|old| old.status == "False") {
            Some(old) => old.last_transition_time.clone(),
            None => now.clone(),
        };
    }
    status.nodes = String::new();
    status
}
