// SPDX-License-Identifier: Apache-2.0
//! Least privilege: each capability of the agents is taken away, and the agents have to miss it.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::lines::{IN_FORCE, items};
use super::{Installed, SYSTEM};
use crate::cluster::SOON;
use crate::wait::eventually;

const AGENT: &str = "daemonset/mesh-agent";

/// Where the list is in the DaemonSet.
const LIST: &str = "/spec/template/spec/containers/0/securityContext/capabilities/add";

pub(super) fn check(on: &Installed) -> Result<Vec<String>> {
    let kube = on.cluster().kube();
    let agent = kube.get([AGENT, "-n", SYSTEM])?;
    let all = agent.pointer(LIST).and_then(Value::as_array).cloned();
    let all = all.context("the DaemonSet lists no capabilities")?;
    let mut said = Vec::new();
    for one in &all {
        let rest: Vec<&Value> = all.iter().filter(|other| *other != one).collect();
        patch(on, &json!(rest))?;
        let missed = eventually("an agent to miss it", SOON, || missed(on).ok()?);
        let name = one.as_str().unwrap_or_default();
        let missed = missed.with_context(|| format!("nobody misses {name}"))?;
        said.push(format!("without {name}: {missed}"));
        // Else what is missed next could be a report of before.
        patch(on, &json!(all))?;
        on.cluster().rolled_out(SYSTEM, AGENT)?;
        eventually("the agents to miss nothing", IN_FORCE, || {
            matches!(self::missed(on), Ok(None)).then_some(())
        })?;
    }
    Ok(said)
}

/// Gives the agents this list.
fn patch(on: &Installed, list: &Value) -> Result<()> {
    let patch = json!([{ "op": "replace", "path": LIST, "value": list }]).to_string();
    let kube = on.cluster().kube();
    let args = ["patch", "-n", SYSTEM, AGENT, "--type=json", "-p", &patch];
    kube.kubectl(args).map(drop)
}

/// How the last run of an agent that does not start ended.
fn ended(on: &Installed) -> Result<Option<String>> {
    let pods = [
        "pods",
        "-n",
        SYSTEM,
        "-l",
        "app.kubernetes.io/name=mesh-agent",
    ];
    let pods = on.cluster().kube().get(pods)?;
    Ok(items(&pods).iter().find_map(|pod| {
        let container = &pod["status"]["containerStatuses"][0];
        let code = container.pointer("/lastState/terminated/exitCode")?;
        Some(format!("an agent does not start: exit code {code}"))
    }))
}

/// That an agent does not start, or what one reports that it cannot do, or whom it does not protect.
fn missed(on: &Installed) -> Result<Option<String>> {
    if let Some(ended) = ended(on)? {
        return Ok(Some(ended));
    }
    let nodes = on.cluster().kube().get(["meshnodes"])?;
    Ok(items(&nodes).iter().find_map(|node| {
        let status = &node["status"];
        let list = |field: &str| {
            status[field]
                .as_array()
                .filter(|all| !all.is_empty())
                .cloned()
        };
        if let Some(features) = list("missingFeatures") {
            return Some(format!("the report misses {}", json!(features)));
        }
        let pods = list("unprotected")?;
        Some(format!(
            "{} pods are not protected: {}",
            pods.len(),
            pods[0]["reason"].as_str().unwrap_or_default()
        ))
    }))
}
