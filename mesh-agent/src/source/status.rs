// SPDX-License-Identifier: Apache-2.0
//! Writes what this node reports: one MeshNode, named after the node and owned by it.
//!
//! Changes are folded: there is at most one write a second, and none where nothing changed. What
//! cannot be written is tried again, later and later; enforcement does not wait for it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::api::{Patch, PatchParams};
use kube::core::params::GetParams;
use kube::{Api, Client};
use mesh_api::crd::{MeshNode, MeshNodeStatus};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::kubernetes::stream::pause;

/// Between two writes.
const INTERVAL: Duration = Duration::from_secs(1);
/// After this time the same is said again: somebody may have changed or deleted it. The server does
/// not store what is the same.
const REPEAT: Duration = Duration::from_secs(300);
/// A request that takes longer is made again.
const ANSWER: Duration = Duration::from_secs(30);
/// The owner of the fields in server-side apply.
const MANAGER: &str = "mesh-agent";

/// What it takes to write.
#[derive(Clone)]
pub(crate) struct Writer {
    /// Where to.
    pub(crate) client: Client,
    /// The node.
    pub(crate) node: String,
    /// The time of day.
    pub(crate) now: fn() -> SystemTime,
}

impl Writer {
    /// Writes the newest report until nobody makes one any more.
    pub(crate) async fn run(self, mut reports: watch::Receiver<Option<Arc<MeshNodeStatus>>>) {
        let mut written: Option<Arc<MeshNodeStatus>> = None;
        let mut failures = 0;
        loop {
            let repeats = match failures {
                0 => tokio::select! {
                    news = reports.changed() => {
                        if news.is_err() {
                            return;
                        }
                        false
                    }
                    () = sleep(REPEAT) => true,
                },
                failures => {
                    sleep(pause(failures)).await;
                    true
                }
            };
            let started = Instant::now();
            let Some(report) = reports.borrow_and_update().clone() else {
                continue;
            };
            if written.as_ref() == Some(&report) && !repeats {
                continue;
            }
            match self.write(&report, written.is_some()).await {
                Ok(()) => {
                    written = Some(report);
                    if failures > 0 {
                        tracing::info!("this node reports again");
                    }
                    failures = 0;
                }
                Err(why) => {
                    if failures == 0 {
                        tracing::warn!(why, "this node cannot report; it goes on all the same");
                    }
                    failures += 1;
                }
            }
            sleep_until(started + INTERVAL).await;
        }
    }

    /// Writes a report; `exists` = it was written before.
    async fn write(&self, report: &MeshNodeStatus, exists: bool) -> Result<(), String> {
        let nodes: Api<MeshNode> = Api::all(self.client.clone());
        let params = PatchParams::apply(MANAGER).force();
        let status = Patch::Apply(self.status(report));
        if exists {
            match answer(nodes.patch_status(&self.node, &params, &status)).await {
                Ok(_) => return Ok(()),
                // Somebody deleted it.
                Err(Failure::Absent) => {}
                Err(Failure::Other(why)) => return Err(why),
            }
        }
        let object = Patch::Apply(self.object().await?);
        let made = answer(nodes.patch(&self.node, &params, &object)).await;
        made.map_err(Failure::text)?;
        let said = answer(nodes.patch_status(&self.node, &params, &status)).await;
        said.map_err(Failure::text)?;
        Ok(())
    }

    fn status(&self, report: &MeshNodeStatus) -> Value {
        let mut status = json!(report);
        if let Ok(now) = k8s_openapi::jiff::Timestamp::try_from((self.now)()) {
            let seconds = now.as_second();
            let whole = k8s_openapi::jiff::Timestamp::from_second(seconds).unwrap_or(now);
            status["observedAt"] = whole.to_string().into();
        }
        self.named(&json!({ "status": status }))
    }

    /// The object itself, owned by its node, so that it goes with it.
    async fn object(&self) -> Result<Value, String> {
        let request =
            kube::core::Request::new("/api/v1/nodes").get(&self.node, &GetParams::default());
        let request = request.map_err(|error| error.to_string())?;
        let node = match answer(self.client.request::<Value>(request)).await {
            Ok(node) => node,
            Err(Failure::Absent) => return Err(format!("there is no Node {}", self.node)),
            Err(Failure::Other(why)) => return Err(why),
        };
        let mut object = self.named(&json!({ "spec": {} }));
        object["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "v1",
            "kind": "Node",
            "name": self.node,
            "uid": node["metadata"]["uid"],
        }]);
        Ok(object)
    }

    fn named(&self, rest: &Value) -> Value {
        let mut object = rest.clone();
        object["apiVersion"] = "mesh.rs/v1alpha1".into();
        object["kind"] = "MeshNode".into();
        object["metadata"] = json!({ "name": self.node });
        object
    }
}

enum Failure {
    Absent,
    Other(String),
}

impl Failure {
    fn text(self) -> String {
        match self {
            Self::Absent => {
                "the API server does not know MeshNodes: are the CRDs installed?".to_owned()
            }
            Self::Other(why) => why,
        }
    }
}

async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match timeout(ANSWER, request).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(Failure::Absent),
        Ok(Err(error)) => Err(Failure::Other(mesh_log::Chain(&error).to_string())),
        Err(_elapsed) => Err(Failure::Other("the API server does not answer".to_owned())),
    }
}
