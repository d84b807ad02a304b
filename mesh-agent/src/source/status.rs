// SPDX-License-Identifier: Apache-2.0
//! Writes the report of this node to its MeshNode, which has the name of the Node and is owned by it.
//!
//! Changes are coalesced to at most one write per second, and an unchanged report is not written. A
//! failed write is retried with backoff, and enforcement does not depend on it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::api::{Patch, PatchParams};
use kube::core::params::GetParams;
use kube::{Api, Client};
use mesh_api::Kind;
use mesh_api::crd::{MeshNode, MeshNodeStatus};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::kubernetes::RETRY;

/// The shortest interval between two writes.
const INTERVAL: Duration = Duration::from_secs(1);
/// The interval at which an unchanged report is written again, in case the MeshNode was changed or
/// deleted. The API server does not store an unchanged object.
const REPEAT: Duration = Duration::from_secs(300);
/// The timeout of a request.
const ANSWER: Duration = Duration::from_secs(30);
/// The field manager for server-side apply.
const MANAGER: &str = "mesh-agent";

/// Writes MeshNode reports.
#[derive(Clone)]
pub(crate) struct Writer {
    /// The client of the API server.
    pub(crate) client: Client,
    /// The name of this node.
    pub(crate) node: String,
    /// The wall clock.
    pub(crate) now: fn() -> SystemTime,
}

impl Writer {
    /// Writes the newest report until the channel closes.
    pub(crate) async fn run(self, mut reports: watch::Receiver<Option<Arc<MeshNodeStatus>>>) {
        let mut written: Option<Arc<MeshNodeStatus>> = None;
        let mut failures: u32 = 0;
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
                    sleep(RETRY.delay(failures, rand::random())).await;
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
                        tracing::info!("node report written after failures");
                    }
                    failures = 0;
                }
                Err(why) => {
                    if failures == 0 {
                        tracing::warn!(why, "cannot write the node report; enforcement continues");
                    }
                    failures += 1;
                }
            }
            sleep_until(started + INTERVAL).await;
        }
    }

    /// Writes a report. `exists` is true if the MeshNode was written before.
    async fn write(&self, report: &MeshNodeStatus, exists: bool) -> Result<(), String> {
        let nodes: Api<MeshNode> = Api::all(self.client.clone());
        let params = PatchParams::apply(MANAGER).force();
        let status = Patch::Apply(self.status(report));
        if exists {
            match answer(nodes.patch_status(&self.node, &params, &status)).await {
                Ok(_) => return Ok(()),
                // The MeshNode was deleted.
                Err(Failure::Absent) => {}
                Err(Failure::Other(why)) => return Err(why),
            }
        }
        let object = Patch::Apply(self.object().await?);
        let created = answer(nodes.patch(&self.node, &params, &object)).await;
        created.map_err(Failure::text)?;
        let patched = answer(nodes.patch_status(&self.node, &params, &status)).await;
        patched.map_err(Failure::text)?;
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

    /// The MeshNode without its status, owned by the Node so that it is deleted with it.
    async fn object(&self) -> Result<Value, String> {
        let request =
            kube::core::Request::new("/api/v1/nodes").get(&self.node, &GetParams::default());
        let request = request.map_err(|error| error.to_string())?;
        let node = match answer(self.client.request::<Value>(request)).await {
            Ok(node) => node,
            Err(Failure::Absent) => return Err(format!("Node {} not found", self.node)),
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
        object["apiVersion"] = Kind::MeshNode.api_version().into();
        object["kind"] = Kind::MeshNode.name().into();
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
                "the API server has no resource meshnodes.mesh.rs; check that the CRDs are installed".to_owned()
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
        Err(_elapsed) => Err(Failure::Other(
            "the API server did not answer in time".to_owned(),
        )),
    }
}
