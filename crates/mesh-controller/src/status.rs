// SPDX-License-Identifier: Apache-2.0
//! Writes the status of the mesh's own kinds while this replica leads, and removes the MeshNodes of
//! nodes that are gone.
//!
//! What is to be written follows from what the API server has now: a status that says already what
//! it should is not written, and nothing is remembered. Writes are paced; a burst of changes is
//! folded once.

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
    ClusterMeshPolicy, MeshAuthentication, MeshNode, MeshPolicy, MeshTrafficPolicy, PolicyStatus,
};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::fold::Reports;
use super::keeper::MANAGER;
use super::numbers::Numbers;
use mesh_log::warn_limited;

/// From a change until it is folded: many come together.
const SETTLE: Duration = Duration::from_millis(500);
/// From one write to the next: at most 20 a second.
const PACE: Duration = Duration::from_millis(50);
/// Writes until everything is folded anew.
const PORTION: usize = 40;
/// Folded at least so often, whatever happened.
const ANYWAY: Duration = Duration::from_secs(60);

/// Everything that is watched.
pub(super) struct Folder {
    client: Client,
    numbers: Numbers,
    now: fn() -> Timestamp,
    kinds: Vec<(ApiResource, Store<DynamicObject>)>,
    nodes: Store<PartialObjectMeta<Node>>,
    mesh_nodes: Store<MeshNode>,
    changed: Arc<Notify>,
    watches: JoinSet<()>,
}

impl Folder {
    /// Watches from now on.
    pub(super) fn watch(client: Client, numbers: Numbers, now: fn() -> Timestamp) -> Self {
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
            numbers,
            now,
            kinds,
            nodes,
            mesh_nodes,
            changed,
            watches,
        }
    }

    /// Writes for ever, while it leads.
    pub(super) async fn run(mut self, mut leads: watch::Receiver<bool>) {
        self.all_known().await;
        loop {
            if leads.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            let complete = self.fold(&leads).await;
            sleep(SETTLE).await;
            if !complete {
                continue;
            }
            tokio::select! {
                _elapsed = timeout(ANYWAY, self.changed.notified()) => sleep(SETTLE).await,
                _ = self.watches.join_next() => return,
            }
        }
    }

    /// Waits until every kind was listed once: what is not known yet is not gone.
    async fn all_known(&self) {
        for (_, store) in &self.kinds {
            // Only a writer that is gone is an error; its task is looked after in `run`.
            drop(store.wait_until_ready().await);
        }
        drop(self.nodes.wait_until_ready().await);
        drop(self.mesh_nodes.wait_until_ready().await);
    }

    /// Brings every status up to date; whether it came to the end.
    async fn fold(&self, leads: &watch::Receiver<bool>) -> bool {
        let nodes: BTreeSet<String> = self
            .nodes
            .state()
            .iter()
            .map(|node| node.name_any())
            .collect();
        let (here, gone): (Vec<_>, Vec<_>) = self
            .mesh_nodes
            .state()
            .into_iter()
            .partition(|node| nodes.contains(&node.name_any()));
        for node in gone {
            self.remove(&node).await;
        }
        let reports = Reports::of(
            here.iter()
                .filter_map(|node| Some((node.metadata.name.as_deref()?, node.status.as_ref()?))),
        );
        self.numbers.nodes(reports.nodes());
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
                    unread(generation, &before, &now)
                } else {
                    reports.status((uid, generation), &before, &now)
                };
                if status == before {
                    continue;
                }
                self.write(kind, &object, &status).await;
                written += 1;
                if written == PORTION {
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
            // Not of an object that was made anew under the same name.
            "metadata": {"name": name, "uid": object.metadata.uid},
            "status": status,
        });
        let params = PatchParams::apply(MANAGER).force();
        let result = api.patch_status(&name, &params, &Patch::Apply(patch)).await;
        self.numbers.status_write(result.is_ok());
        match result {
            Ok(_) => {}
            // It is gone, or another by now.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => {
                warn_limited!("status", error, "the status of a policy cannot be written")
            }
        }
    }

    /// Removes the report of a node that is no more.
    async fn remove(&self, node: &MeshNode) {
        let name = node.name_any();
        // The watch may be behind: a node that just came is asked for itself.
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
            Ok(_) => tracing::info!(node = name, "the node is gone; its MeshNode is removed"),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => warn_limited!("mesh_node", error, "a MeshNode cannot be removed"),
        }
    }
}

fn config() -> watcher::Config {
    watcher::Config::default().page_size(500)
}

/// Of a policy only who it is and its status are needed.
fn shrink(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
    let status = object.data.get_mut("status").map(Value::take);
    object.data = match status {
        Some(status) => json!({"status": status}),
        None => json!({}),
    };
}

/// Keeps what a watch brings, and tells that something came.
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
                Err(error) => warn_limited!("status_watch", error, "a kind cannot be watched"),
            }
        }
    });
    store
}

/// The status of a kind that agents do not act on.
fn unread(generation: i64, before: &PolicyStatus, now: &Time) -> PolicyStatus {
    let mut status = Reports::default().status(("", generation), before, now);
    for condition in &mut status.conditions {
        let old = before
            .conditions
            .iter()
            .find(|one| one.type_ == condition.type_);
        condition.status = "False".to_owned();
        condition.reason = "NotActedUpon".to_owned();
        condition.message = "this version does not act on this kind".to_owned();
        condition.last_transition_time = match old.filter(|old| old.status == "False") {
            Some(old) => old.last_transition_time.clone(),
            None => now.clone(),
        };
    }
    status.nodes = String::new();
    status
}
