// SPDX-License-Identifier: Apache-2.0
//! The pages of the admin interface.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use mesh_common::Protocol;
use mesh_common::pod::PodState;
use mesh_plan::cluster::{ClusterSnapshot, PeerMatch};
use mesh_plan::plan::LocalPod;
use mesh_telemetry::http::{
    Answer, Handler, JSON, JSON_LINES, Probes, TEXT, answer, internal_error, method_not_allowed,
    not_found,
};
use serde_json::{Value, json};

use super::{Access, Views};
use crate::source::Report;
use mesh_datapath::Handles;
use mesh_datapath::pods::{PodHandle, open};

/// Bytes of a request's body.
const MAX_BODY: usize = 4096;

/// Answers the requests of one listener.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    views: Views,
    access: Access,
    probes: Probes,
}

impl Pages {
    pub(super) fn new(views: Views, access: Access) -> Self {
        Self {
            probes: views.probes(),
            views,
            access,
        }
    }
}

impl Handler for Pages {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let views = &self.views;
        if request.uri().path() == "/log-level" {
            return log_level(request, self.access, views).await;
        }
        if let Some(answer) = self.probes.try_answer(&request).await {
            return answer;
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return method_not_allowed("GET, HEAD");
        }
        match request.uri().path() {
            "/status" => answer(StatusCode::OK, JSON, pretty(&status(views))),
            "/plan" => {
                let plan = Arc::clone(&views.in_force.borrow().plan);
                answer(StatusCode::OK, TEXT, (views.plan_text)(&plan))
            }
            "/pods" => answer(StatusCode::OK, JSON, pretty(&pods(views))),
            "/facts" => snapshot(views),
            "/connections" => connections(views).await,
            "/flows" => answer(StatusCode::OK, JSON_LINES, flows(views).await),
            _ => not_found(
                "/status, /plan, /pods, /facts, /connections, /flows, /log-level, /metrics, /livez and /readyz",
            ),
        }
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn status(views: &Views) -> Value {
    let in_force = views.in_force.borrow().clone();
    let plan = &in_force.plan;
    let rejections = views.rejections.borrow().clone();
    let snapshot = views.snapshots.borrow().clone();
    let report = views.source.borrow().clone();
    let rules = plan.names.rules.values();
    let policies: BTreeSet<String> = rules.map(|rule| rule.object.to_string()).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": views.node,
        "ready": views.readiness().is_ready(),
        "conditions": views.readiness().conditions(),
        "policy_revision": in_force.status.applied,
        "log_level": views.level.as_ref().map(mesh_log::Level::get),
        "pods": {
            "planned": plan.pods.len(),
            "adopted": in_force.pods.len(),
        },
        "plan": {
            "peers": plan.peers.len(),
            "policy_sets": plan.sets.len(),
            "services": plan.services.len(),
        },
        "policies": {
            "known": snapshot.policies.len(),
            "about_this_node": policies.len(),
        },
        "policies_in_force": policies,
        "match_nothing": match_nothing(&snapshot),
        "warnings": report.warnings,
        "rejections": *rejections,
        "source": source(&report),
        "network": **views.cni_conflicts.borrow(),
    })
}

fn source(report: &Report) -> Value {
    json!({
        "stale": report.stale,
        "not_kept": report.not_kept,
        "absent": report.absent,
        "warnings": report.warnings.len(),
    })
}

/// Lists the peers of policies that match nothing, because the mesh does not support them.
fn match_nothing(snapshot: &ClusterSnapshot) -> Vec<String> {
    let mut all = Vec::new();
    for (object, policy) in &snapshot.policies {
        let rules = policy.ingress.iter().chain(&policy.egress).flatten();
        for peer in rules.flat_map(|rule| rule.peers.iter().flatten()) {
            if let PeerMatch::Nothing { what } = peer {
                all.push(format!("{object}: {what}"));
            }
        }
    }
    all
}

fn pods(views: &Views) -> Value {
    let in_force = views.in_force.borrow().clone();
    let managed = in_force.pods.keys().filter_map(|uid| {
        let (handle, local) = in_force.pod(uid)?;
        let mut page = pod(handle, local);
        let status = in_force.status.pods.get(uid);
        page["trouble"] = status.and_then(|status| status.trouble.clone()).into();
        Some(page)
    });
    // Their namespace was not found, or could not be prepared.
    let missing = in_force.status.pods.iter();
    let missing = missing.filter(|(uid, _)| !in_force.pods.contains_key(*uid));
    let missing = missing.map(|(uid, pod)| {
        json!({
            "name": pod.name.to_string(),
            "uid": uid,
            "adopted": false,
            "trouble": pod.trouble,
        })
    });
    managed.chain(missing).collect()
}

fn pod(handle: &PodHandle, local: &LocalPod) -> Value {
    let has = |flag| local.view.has(flag);
    json!({
        "name": local.name.to_string(),
        "uid": handle.uid,
        "adopted": true,
        "addresses": local.addresses,
        "service_account": local.service_account,
        "enrolled": has(PodState::ENROLLED),
        "strict": has(PodState::STRICT),
        "required": has(PodState::REQUIRED),
        "gated": has(PodState::GATED),
        "listening": handle.listeners.is_some(),
        "index": handle.index.0,
        "netns_cookie": handle.netns_cookie,
        "link": handle.link,
    })
}

/// The newest snapshot of the cluster, which `meshctl policy diff` compiles again.
fn snapshot(views: &Views) -> Answer {
    let snapshot = views.snapshots.borrow().clone();
    match serde_json::to_vec(&*snapshot) {
        Ok(text) => answer(StatusCode::OK, JSON, text),
        Err(error) => internal_error(&error),
    }
}

/// The open connections of the managed pods, one JSON object a line.
async fn connections(views: &Views) -> Answer {
    let in_force = views.in_force.borrow().clone();
    let datapath = views.datapath.clone();
    let lines = tokio::task::spawn_blocking(move || {
        let datapath = datapath.as_ref();
        let is_tunnel = |socket: &_| datapath.is_some_and(|d| d.is_tunnel(socket));
        let decided = datapath.map(Handles::decided);
        let mut lines = String::new();
        for uid in in_force.pods.keys() {
            let Some((handle, local)) = in_force.pod(uid) else {
                continue;
            };
            // Fails for a pod that is being removed: it has no connections to list.
            for one in open::open(handle, &local.view, decided, is_tunnel).unwrap_or_default() {
                let line = json!({
                    "pod": local.name.to_string(),
                    "direction": one.direction.label(),
                    "protocol": if one.protocol == Protocol::TCP { "tcp" } else { "udp" },
                    "source": one.source.to_string(),
                    "destination": one.destination.to_string(),
                    "tunnelled": one.tunnelled,
                });
                writeln!(lines, "{line}").expect("a String takes everything");
            }
        }
        lines
    });
    match lines.await {
        Ok(lines) => answer(StatusCode::OK, JSON_LINES, lines),
        Err(error) => internal_error(&error),
    }
}

async fn flows(views: &Views) -> String {
    let lines = views.flows.recent().await;
    lines.iter().flat_map(|line| [&**line, "\n"]).collect()
}

async fn log_level(request: Request<Incoming>, access: Access, views: &Views) -> Answer {
    let Some(level) = &views.level else {
        return answer(StatusCode::NOT_FOUND, TEXT, "the process does not log\n");
    };
    match *request.method() {
        Method::GET | Method::HEAD => answer(StatusCode::OK, TEXT, format!("{}\n", level.get())),
        Method::PUT if access == Access::Root => {
            let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) => {
                    let text = format!("{error}\n");
                    return answer(StatusCode::BAD_REQUEST, TEXT, text);
                }
            };
            let directives = String::from_utf8_lossy(&body);
            match level.set(directives.trim()) {
                Ok(()) => {
                    tracing::info!(level = directives.trim(), "log level changed");
                    answer(StatusCode::OK, TEXT, format!("{}\n", level.get()))
                }
                Err(why) => answer(StatusCode::BAD_REQUEST, TEXT, format!("{why}\n")),
            }
        }
        Method::PUT => answer(
            StatusCode::FORBIDDEN,
            TEXT,
            "allowed through the Unix socket only\n",
        ),
        _ => method_not_allowed("GET, HEAD, PUT"),
    }
}
