// SPDX-License-Identifier: Apache-2.0
//! The steps of an uninstallation, by the Kubernetes API. Each can be interrupted and repeated: the
//! DaemonSet for cleanup exists, but is not scheduled, before the first agent ends.

use std::path::Path;
use std::time::Duration;

use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::Error;
use mesh_kube::connect;

/// The DaemonSet of the agents.
const AGENT: &str = "mesh-agent";
/// The DaemonSet that cleans the nodes.
const CLEANUP: &str = "mesh-cleanup";
/// The label that distinguishes the pods of the two DaemonSets.
const NAME: &str = "app.kubernetes.io/name";
/// A node selector that no node matches: it prevents cleanup before the agents have ended.
const HELD: &str = "mesh.rs/agents-are-gone";
/// Interval of checks of the progress.
const POLL: Duration = Duration::from_millis(500);
/// The time that agents may take to end, and nodes to be cleaned.
const STEP_TIMEOUT: Duration = Duration::from_secs(240);

pub(super) fn run(namespace: &str, kubeconfig: Option<&Path>) -> Result<usize, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let client = connect(kubeconfig).await?;
        uninstall(client, namespace).await
    })
}

fn api(client: &Client, group: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let gvk = kube::api::GroupVersionKind::gvk(group, "v1", kind);
    let resource = ApiResource::from_gvk(&gvk);
    Api::namespaced_with(client.clone(), namespace, &resource)
}

fn failed(what: &'static str) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Api {
        what,
        why: source.to_string(),
    }
}

async fn uninstall(client: Client, namespace: &str) -> Result<usize, Error> {
    let sets = api(&client, "apps", "DaemonSet", namespace);
    let pods = api(&client, "", "Pod", namespace);
    let cleaner = sets
        .get_opt(CLEANUP)
        .await
        .map_err(failed("look for an earlier uninstallation"))?;
    let agent = sets
        .get_opt(AGENT)
        .await
        .map_err(failed("read the agents' DaemonSet"))?;
    if let Some(agent) = agent {
        if cleaner.is_none() {
            let made = cleanup_of(&agent)?;
            // Must exist before the agents are deleted: a repeated command then finds it.
            create(&sets, &made).await?;
        }
        delete(&sets, AGENT).await?;
    } else if cleaner.is_none() {
        return Ok(0);
    }
    wait("agents still run", async || {
        let running = list(&pods, AGENT).await?;
        Ok((0, running.iter().map(node).collect()))
    })
    .await?;
    let begin = json!({ "spec": { "template": { "spec": { "nodeSelector": { HELD: null } } } } });
    sets.patch(CLEANUP, &PatchParams::default(), &Patch::Merge(begin))
        .await
        .map_err(failed("start the cleanup of the nodes"))?;
    let cleaned = wait("nodes are not clean yet", async || {
        let wanted = scheduled(&sets).await?;
        let list = list(&pods, CLEANUP).await?;
        let unclean = list.iter().filter(|pod| !cleaned(pod));
        let mut left: Vec<String> = unclean.map(node).collect();
        // The pods of the DaemonSet appear some time after it.
        match wanted {
            Some(wanted) if wanted <= list.len() => {}
            Some(wanted) => left.push(format!("{} more", wanted - list.len())),
            None => left.push("nodes to which the DaemonSet is not scheduled yet".to_owned()),
        }
        Ok((list.len(), left))
    })
    .await?;
    delete(&sets, CLEANUP).await?;
    Ok(cleaned)
}

async fn create(sets: &Api<DynamicObject>, object: &DynamicObject) -> Result<(), Error> {
    match sets.create(&PostParams::default(), object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(failed("create the DaemonSet for cleanup")(error)),
    }
}

async fn delete(sets: &Api<DynamicObject>, name: &str) -> Result<(), Error> {
    match sets.delete(name, &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(failed("delete a DaemonSet")(error)),
    }
}

/// Lists the pods of a DaemonSet.
async fn list(pods: &Api<DynamicObject>, name: &str) -> Result<Vec<DynamicObject>, Error> {
    let selected = ListParams::default().labels(&format!("{NAME}={name}"));
    let list = pods.list(&selected).await;
    Ok(list.map_err(failed("list pods"))?.items)
}

/// Returns the number of nodes to clean, once the DaemonSet controller has seen the newest version.
async fn scheduled(sets: &Api<DynamicObject>) -> Result<Option<usize>, Error> {
    let set = sets.get(CLEANUP).await;
    let set = set.map_err(failed("read the DaemonSet for cleanup"))?;
    let number = |path| set.data.pointer(path).and_then(Value::as_u64);
    let seen = number("/status/observedGeneration");
    let newest = set.metadata.generation.and_then(|n| u64::try_from(n).ok());
    if seen.is_none() || seen < newest {
        return Ok(None);
    }
    let wanted = number("/status/desiredNumberScheduled");
    Ok(wanted.and_then(|wanted| usize::try_from(wanted).ok()))
}

/// Waits until `look` returns no unfinished nodes. Returns the number that `look` returns then.
async fn wait(
    what: &'static str,
    look: impl AsyncFn() -> Result<(usize, Vec<String>), Error>,
) -> Result<usize, Error> {
    let until = Instant::now() + STEP_TIMEOUT;
    loop {
        let (found, waiting) = look().await?;
        if waiting.is_empty() {
            return Ok(found);
        }
        if Instant::now() > until {
            let left = waiting.join(", ");
            let seconds = STEP_TIMEOUT.as_secs();
            return Err(Error::Timeout {
                what,
                seconds,
                left,
            });
        }
        sleep(POLL).await;
    }
}

fn node(pod: &DynamicObject) -> String {
    let node = pod.data.pointer("/spec/nodeName").and_then(Value::as_str);
    node.map_or_else(|| pod.name_any(), str::to_owned)
}

/// Tells whether the pod's first container has succeeded.
fn cleaned(pod: &DynamicObject) -> bool {
    let code = "/status/initContainerStatuses/0/state/terminated/exitCode";
    pod.data.pointer(code).and_then(Value::as_i64) == Some(0)
}

/// Returns a DaemonSet with the agents' pods, but with `cleanup` as the command. It runs as an init
/// container, whose exit code is the result, and again as the container that a DaemonSet must have;
/// repetition is harmless.
fn cleanup_of(agent: &DynamicObject) -> Result<DynamicObject, Error> {
    let mut template = agent
        .data
        .pointer("/spec/template")
        .cloned()
        .ok_or(Error::Template("no pod template"))?;
    let container = template
        .pointer("/spec/containers/0")
        .cloned()
        .ok_or(Error::Template("no container in the pod template"))?;
    let mut container = container;
    template["spec"]["nodeSelector"][HELD] = json!("");
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        if let Some(fields) = container.as_object_mut() {
            fields.remove(probe);
        }
    }
    container["args"] = json!(["cleanup"]);
    container["name"] = json!("cleanup");
    let mut again = container.clone();
    again["name"] = json!("again");
    template["metadata"]["labels"] = json!({ NAME: CLEANUP });
    template["spec"]["initContainers"] = json!([container]);
    template["spec"]["containers"] = json!([again]);
    template["spec"]["terminationGracePeriodSeconds"] = json!(1);
    let object = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": { "name": CLEANUP },
        "spec": {
            "selector": { "matchLabels": { NAME: CLEANUP } },
            "template": template,
        },
    });
    serde_json::from_value(object).map_err(|_shape| Error::Template("invalid pod template"))
}
