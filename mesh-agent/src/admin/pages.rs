// SPDX-License-Identifier: Apache-2.0
//! The answers, page by page.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt::Write as _;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use mesh_common::Protocol;
use mesh_common::pod::PodState;
use mesh_plan::cluster::{Cluster, PeerMatch};
use serde_json::{Value, json};

use super::{Door, Views};
use crate::metrics::Form;
use crate::source::Report;
use mesh_datapath::datapath::Handles;
use mesh_datapath::pods::{PodHandle, open};

type Answer = Response<Full<Bytes>>;

/// Bytes of a request's body.
const BODY: usize = 4096;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";

pub(super) async fn answer(
    request: Request<Incoming>,
    door: Door,
    views: Views,
) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    if path == "/log-level" && door != Door::Public {
        return Ok(log_level(request, door, &views).await);
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return Ok(only("GET, HEAD"));
    }
    let open = match path.as_str() {
        "/metrics" => Some(metrics(&request, views.clone()).await),
        "/livez" => Some(page(StatusCode::OK, TEXT, "ok\n")),
        "/readyz" => Some(readyz(&views)),
        _ => None,
    };
    if let Some(answer) = open {
        return Ok(answer);
    }
    if door == Door::Public {
        return Ok(missing("/metrics, /livez and /readyz"));
    }
    Ok(match path.as_str() {
        "/status" => page(StatusCode::OK, JSON, pretty(&status(&views))),
        "/plan" => {
            let plan = views.plan.borrow().clone();
            page(StatusCode::OK, TEXT, (views.plan_text)(&plan))
        }
        "/pods" => page(StatusCode::OK, JSON, pretty(&pods(&views))),
        "/facts" => facts(&views),
        "/connections" => connections(&views).await,
        "/flows" => page(StatusCode::OK, LINES, flows(&views).await),
        _ => missing(
            "/status, /plan, /pods, /facts, /connections, /flows, /log-level, /metrics, /livez and /readyz",
        ),
    })
}

fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let value = HeaderValue::from_static(content_type);
    answer.headers_mut().insert(CONTENT_TYPE, value);
    answer
}

fn missing(pages: &str) -> Answer {
    let text = format!("no such page; there are {pages}\n");
    page(StatusCode::NOT_FOUND, TEXT, text)
}

fn only(methods: &'static str) -> Answer {
    let text = format!("only {methods}\n");
    let mut answer = page(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
    let value = HeaderValue::from_static(methods);
    answer.headers_mut().insert(ALLOW, value);
    answer
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

async fn metrics(request: &Request<Incoming>, views: Views) -> Answer {
    let accept = request.headers().get(ACCEPT);
    let accept = accept.and_then(|value| value.to_str().ok()).unwrap_or("");
    let form = Form::accepted(accept);
    // Hundreds of system calls: not on a thread that serves connections.
    match tokio::task::spawn_blocking(move || views.metrics.page(form)).await {
        Ok(text) => page(StatusCode::OK, form.content_type(), text),
        Err(error) => {
            let text = format!("{error}\n");
            page(StatusCode::INTERNAL_SERVER_ERROR, TEXT, text)
        }
    }
}

fn readyz(views: &Views) -> Answer {
    let conditions = views.readiness.conditions();
    let mut text = String::new();
    for (condition, holds) in &conditions {
        let (sign, state) = if *holds {
            ('+', "ok")
        } else {
            ('-', "not yet")
        };
        writeln!(text, "[{sign}] {condition}: {state}").expect("a String takes everything");
    }
    if conditions.values().all(|holds| *holds) {
        text.push_str("ready\n");
        page(StatusCode::OK, TEXT, text)
    } else {
        text.push_str("not ready\n");
        page(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
    }
}

fn status(views: &Views) -> Value {
    let plan = views.plan.borrow().clone();
    let rejections = views.rejections.borrow().clone();
    let facts = views.facts.borrow().clone();
    let report = views.source.borrow().clone();
    let rules = plan.names.rules.values();
    let in_force: BTreeSet<String> = rules.map(|rule| rule.object.to_string()).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": views.node,
        "ready": views.readiness.is_ready(),
        "conditions": views.readiness.conditions(),
        "policy_revision": views.metrics.policy_revision(),
        "log_level": views.level.as_ref().map(mesh_log::Level::get),
        "pods": {
            "planned": plan.pods.len(),
            "adopted": views.pods.borrow().len(),
        },
        "plan": {
            "peers": plan.peers.len(),
            "policy_sets": plan.sets.len(),
            "services": plan.services.len(),
        },
        "policies": {
            "known": facts.policies.len(),
            "about_this_node": in_force.len(),
        },
        "policies_in_force": in_force,
        "match_nothing": match_nothing(&facts),
        "warnings": report.warnings,
        "rejections": *rejections,
        "source": source(&report),
        "network": **views.neighbour.borrow(),
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

/// Parts of policies that are understood and match nobody, as their API says of what an
/// implementation does not support.
fn match_nothing(facts: &Cluster) -> Vec<String> {
    let mut all = Vec::new();
    for (object, policy) in &facts.policies {
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
    let table = views.pods.borrow().clone();
    let status = views.status.borrow().clone();
    let adopted = table.values().map(|pod| {
        let mut page = handle(pod);
        let said = status.pods.get(&pod.uid);
        page["trouble"] = said.and_then(|said| said.trouble.clone()).into();
        page
    });
    // Known, but its namespace was not found, or could not be prepared.
    let missing = status
        .pods
        .iter()
        .filter(|(uid, _)| !table.contains_key(*uid));
    let missing = missing.map(|(uid, pod)| {
        json!({
            "name": pod.name.to_string(),
            "uid": uid,
            "adopted": false,
            "trouble": pod.trouble,
        })
    });
    adopted.chain(missing).collect()
}

fn handle(pod: &PodHandle) -> Value {
    let has = |flag| pod.local.view.has(flag);
    json!({
        "name": pod.local.name.to_string(),
        "uid": pod.uid,
        "adopted": true,
        "addresses": pod.local.addresses,
        "service_account": pod.local.service_account,
        "enrolled": has(PodState::ENROLLED),
        "strict": has(PodState::STRICT),
        "required": has(PodState::REQUIRED),
        "gated": has(PodState::GATED),
        "listening": pod.listeners.is_some(),
        "index": pod.index.0,
        "netns_cookie": pod.netns_cookie,
        "link": pod.link,
    })
}

/// The cluster as the source has it: what `meshctl policy diff` compiles again.
fn facts(views: &Views) -> Answer {
    let cluster = views.facts.borrow().clone();
    match serde_json::to_vec(&*cluster) {
        Ok(text) => page(StatusCode::OK, JSON, text),
        Err(error) => {
            let text = format!("{error}\n");
            page(StatusCode::INTERNAL_SERVER_ERROR, TEXT, text)
        }
    }
}

/// What is open now in the adopted pods, one JSON object a line.
async fn connections(views: &Views) -> Answer {
    let table = views.pods.borrow().clone();
    let datapath = views.datapath.clone();
    let lines = tokio::task::spawn_blocking(move || {
        let datapath = datapath.as_ref();
        let is_tunnel = |socket: &_| datapath.is_some_and(|d| d.is_tunnel(socket));
        let decided = datapath.map(Handles::decided);
        let mut lines = String::new();
        for pod in table.values() {
            // A pod that is just going has nothing open that matters.
            for one in open::open(pod, decided, is_tunnel).unwrap_or_default() {
                let line = json!({
                    "pod": pod.local.name.to_string(),
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
        Ok(lines) => page(StatusCode::OK, LINES, lines),
        Err(error) => {
            let text = format!("{error}\n");
            page(StatusCode::INTERNAL_SERVER_ERROR, TEXT, text)
        }
    }
}

async fn flows(views: &Views) -> String {
    let lines = views.flows.recent().await;
    lines.iter().flat_map(|line| [&**line, "\n"]).collect()
}

async fn log_level(request: Request<Incoming>, door: Door, views: &Views) -> Answer {
    let Some(level) = &views.level else {
        return missing("no logs here");
    };
    match *request.method() {
        Method::GET | Method::HEAD => page(StatusCode::OK, TEXT, format!("{}\n", level.get())),
        Method::PUT if door == Door::Root => {
            let body = match Limited::new(request.into_body(), BODY).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) => {
                    let text = format!("{error}\n");
                    return page(StatusCode::BAD_REQUEST, TEXT, text);
                }
            };
            let directives = String::from_utf8_lossy(&body);
            match level.set(directives.trim()) {
                Ok(()) => {
                    tracing::info!(level = directives.trim(), "the level of logs was changed");
                    page(StatusCode::OK, TEXT, format!("{}\n", level.get()))
                }
                Err(why) => page(StatusCode::BAD_REQUEST, TEXT, format!("{why}\n")),
            }
        }
        Method::PUT => page(
            StatusCode::FORBIDDEN,
            TEXT,
            "only through the Unix socket\n",
        ),
        _ => only("GET, HEAD, PUT"),
    }
}
