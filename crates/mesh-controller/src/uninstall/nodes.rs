// SPDX-License-Identifier: Apache-2.0
//! The steps of an uninstallation, by the Kubernetes API. Each may be interrupted and tried again:
//! what cleans is there, held back, before the first agent ends.

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

/// The agents.
const AGENT: &str = "mesh-agent";
/// What cleans the nodes.
const CLEANUP: &str = "mesh-cleanup";
/// The label that tells pods of the two apart.
const NAME: &str = "app.kubernetes.io/name";
/// Nodes have no such label: what cleans is not scheduled before the agents are gone.
const HELD: &str = "mesh.rs/agents-are-gone";
/// How often it is looked how far it is.
const LOOK: Duration = Duration::from_millis(500);
/// How long agents may take to end, and nodes to be cleaned.
const PATIENCE: Duration = Duration::from_secs(240);

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
        .map_err(failed("look for an earlier try"))?;
    let agent = sets
        .get_opt(AGENT)
        .await
        .map_err(failed("read the agents' DaemonSet"))?;
    if let Some(agent) = agent {
        if cleaner.is_none() {
            let made = cleanup_of(&agent)?;
            // First: if this is interrupted now, the next try finds what to clean with.
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
        .map_err(failed("have the nodes cleaned"))?;
    let cleaned = wait("nodes are not clean", async || {
        let wanted = scheduled(&sets).await?;
        let list = list(&pods, CLEANUP).await?;
        let unclean = list.iter().filter(|pod| !cleaned(pod));
        let mut left: Vec<String> = unclean.map(node).collect();
        // Its pods come a moment after their DaemonSet, and not all at once.
        match wanted {
            Some(wanted) if wanted <= list.len() => {}
            Some(wanted) => left.push(format!("{} more", wanted - list.len())),
            None => left.push("all that the DaemonSet is still to be scheduled to".to_owned()),
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
        Err(error) => Err(failed("make the DaemonSet that cleans")(error)),
    }
}

async fn delete(sets: &Api<DynamicObject>, name: &str) -> Result<(), Error> {
    match sets.delete(name, &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(failed("delete a DaemonSet")(error)),
    }
}

/// The pods of one of the two.
async fn list(pods: &Api<DynamicObject>, name: &str) -> Result<Vec<DynamicObject>, Error> {
    let selected = ListParams::default().labels(&format!("{NAME}={name}"));
    let list = pods.list(&selected).await;
    Ok(list.map_err(failed("list pods"))?.items)
}

/// On how many nodes is to be cleaned, once whoever counts them has seen the newest version.
async fn scheduled(sets: &Api<DynamicObject>) -> Result<Option<usize>, Error> {
    let set = sets.get(CLEANUP).await;
    let set = set.map_err(failed("read the DaemonSet that cleans"))?;
    let number = |path| set.data.pointer(path).and_then(Value::as_u64);
    let seen = number("/status/observedGeneration");
    let newest = set.metadata.generation.and_then(|n| u64::try_from(n).ok());
    if seen.is_none() || seen < newest {
        return Ok(None);
    }
    let wanted = number("/status/desiredNumberScheduled");
    Ok(wanted.and_then(|wanted| usize::try_from(wanted).ok()))
}

/// Waits until `look` finds nothing to wait for; gives the number that it has found then.
async fn wait(
    what: &'static str,
    look: impl AsyncFn() -> Result<(usize, Vec<String>), Error>,
) -> Result<usize, Error> {
    let until = Instant::now() + PATIENCE;
    loop {
        let (found, waiting) = look().await?;
        if waiting.is_empty() {
            return Ok(found);
        }
        if Instant::now() > until {
            let left = waiting.join(", ");
            let seconds = PATIENCE.as_secs();
            return Err(Error::Late {
                what,
                seconds,
                left,
            });
        }
        sleep(LOOK).await;
    }
}

fn node(pod: &DynamicObject) -> String {
    let node = pod.data.pointer("/spec/nodeName").and_then(Value::as_str);
    node.map_or_else(|| pod.name_any(), str::to_owned)
}

/// Whether the pod's first container has done its work.
fn cleaned(pod: &DynamicObject) -> bool {
    let code = "/status/initContainerStatuses/0/state/terminated/exitCode";
    pod.data.pointer(code).and_then(Value::as_i64) == Some(0)
}

/// A DaemonSet of the same pods that run `cleanup`: first as what must succeed before anything else
/// runs, which is what is looked at, then again and again, which does no harm.
fn cleanup_of(agent: &DynamicObject) -> Result<DynamicObject, Error> {
    let mut template = agent
        .data
        .pointer("/spec/template")
        .cloned()
        .ok_or(Error::Template("it has no pods"))?;
    let container = template
        .pointer("/spec/containers/0")
        .cloned()
        .ok_or(Error::Template("its pods have no container"))?;
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
    serde_json::from_value(object)
        .map_err(|_shape| Error::Template("its pods are of no known shape"))
}
