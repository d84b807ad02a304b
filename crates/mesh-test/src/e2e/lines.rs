// SPDX-License-Identifier: Apache-2.0
//! The end-to-end checks, in the order in which they run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::shop::{CLIENT, INTRUDER, PLAIN, WEB};
use super::traces::Traces;
use super::{Installed, Line, SYSTEM, open};
use crate::cluster::SOON;
use crate::mesh::TUNNEL_PORT;
use crate::wait::eventually;

/// Checks of the mesh's features that change nothing in the installation.
pub const DEMO: &[Line] = &[
    Line {
        title: "requests across nodes succeed, and are encrypted between nodes",
        check: encrypted,
    },
    Line {
        title: "policy and Strict authentication are enforced",
        check: policy,
    },
    Line {
        title: "the kubelet's probes pass under Strict",
        check: probes,
    },
    super::KINDS,
];

/// Checks that change workloads and namespaces, replace the agents, and finally uninstall the mesh.
pub const CHANGES: &[Line] = &[
    Line {
        title: "no request is lost while pods are scaled, deleted and restarted",
        check: pods_come_and_go,
    },
    Line {
        title: "init containers and native sidecars are in the mesh with their pod",
        check: super::containers::check,
    },
    Line {
        title: "a namespace leaves the mesh and comes back, under load",
        check: enrolment,
    },
    Line {
        title: "the agents are replaced, under load",
        check: agents_replaced,
    },
    Line {
        title: "every granted RBAC permission is used, and none is missing",
        check: super::rights::check,
    },
    Line {
        title: "after the uninstallation pods communicate, and nothing is left on the nodes",
        check: uninstalled,
    },
];

/// Deadline for a change to be enforced everywhere.
pub(super) const IN_FORCE: Duration = Duration::from_secs(30);

/// The drain time of the chart's default values, in seconds.
const DRAIN: f64 = 10.0;

pub(super) fn answered(on: &Installed, from: (&str, &str), url: &str) -> Result<String> {
    let mut last = String::new();
    let text = eventually("an answer", IN_FORCE, || match on.curl(from, url) {
        Ok(output) if output.status.success() => Some(output.text()),
        Ok(output) => {
            last = output.to_string();
            None
        }
        Err(e) => {
            last = format!("{e:#}");
            None
        }
    });
    text.with_context(|| format!("{from:?} to {url}: {last}\n{}", on.cluster().report(SYSTEM)))
}

fn refused(on: &Installed, from: (&str, &str), url: &str) -> Result<String> {
    let mut last = String::new();
    let said = eventually("a refusal", IN_FORCE, || {
        let output = on.curl(from, url).ok()?;
        last = output.to_string();
        (!output.status.success()).then(|| last.clone())
    });
    said.with_context(|| format!("{from:?} to {url}: {last}"))
}

fn encrypted(on: &Installed) -> Result<Vec<String>> {
    let word = format!("teapot{}", std::process::id());
    let url = format!("{WEB}/order?item={word}");
    answered(on, CLIENT, &url)?;
    let answer = answered(on, CLIENT, &format!("{WEB}/"))?;
    ensure!(answer.contains(&word), "the order is missing: {answer}");
    let captured = on.capture.so_far()?;
    let hits = captured.find(word.as_bytes())?;
    ensure!(
        hits.is_empty(),
        "{word} was sent between nodes in plaintext: {hits:?}"
    );
    ensure!(
        captured.tcp_ports().contains(&TUNNEL_PORT),
        "no packets of port {TUNNEL_PORT}"
    );
    Ok(vec![
        format!("client -> web -> app -> redis, postgres: {}", answer.trim()),
        format!("{word} is nowhere on the wire, which has port {TUNNEL_PORT}"),
    ])
}

/// The shop's application pod, which queries the database.
const APP: (&str, &str) = ("shop", "app");
/// Script that asks PostgreSQL whether it supports TLS; the answer is one byte.
const POSTGRES: &str = "import socket
s = socket.create_connection(('10.96.0.23', 5432), 5); s.settimeout(5)
s.sendall(bytes([0, 0, 0, 8, 4, 210, 22, 47])); answer = s.recv(1); assert answer in (b'S', b'N'), answer
print('it answers', answer)
";

fn policy(on: &Installed) -> Result<Vec<String>> {
    let denied = refused(on, INTRUDER, &format!("{WEB}/front"))?;
    // Policy allows plain, but Strict authentication refuses it. A client with an identity passes.
    let answer = on.python(APP, POSTGRES)?;
    ensure!(answer.status.success(), "app -> postgres: {answer}");
    let strict = on.python(PLAIN, POSTGRES)?;
    ensure!(
        strict.to_string().contains("ConnectionRefusedError"),
        "plain -> postgres: {strict}"
    );
    let permissive = answered(on, PLAIN, &format!("{WEB}/front"))?;
    Ok(vec![
        format!("intruder -> web: {}", short(&denied)),
        format!("app -> postgres, which is Strict: {}", answer.text().trim()),
        "plain -> postgres: connection refused".to_owned(),
        format!("plain -> web, which is not: {}", permissive.trim()),
    ])
}

fn short(said: &str) -> &str {
    said.rsplit("curl: ")
        .next()
        .unwrap_or(said)
        .lines()
        .next()
        .unwrap_or_default()
}

pub(super) fn items(value: &Value) -> &[Value] {
    value["items"].as_array().map_or(&[], Vec::as_slice)
}

fn probes(on: &Installed) -> Result<Vec<String>> {
    let all = on.cluster().kube().get(["pods", "-n", "shop"])?;
    let mut seen = Vec::new();
    for pod in items(&all) {
        let status = &pod["status"]["containerStatuses"][0];
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        ensure!(
            status["ready"] == true && status["restartCount"] == 0,
            "{name}: {status}"
        );
        seen.push(name.to_owned());
    }
    ensure!(seen.len() >= 4, "only {seen:?}");
    Ok(vec![format!(
        "ready, and never restarted: {}",
        seen.join(", ")
    )])
}

/// Stops the load and returns its result as a sentence, or an error if a request failed.
pub(super) fn lossless(load: super::Load, on: &Installed, what: &str) -> Result<String> {
    let (good, bad) = load.end(on)?;
    ensure!(bad.is_empty(), "{what}: {good} good, failed: {bad:?}");
    ensure!(good > 20, "{what}: only {good} requests");
    Ok(format!(
        "{what}: {good} requests, each on a new connection, none failed"
    ))
}

fn pods_come_and_go(on: &Installed) -> Result<Vec<String>> {
    let kube = on.cluster().kube();
    let load = on.load(CLIENT, &format!("{WEB}/front"))?;
    kube.kubectl(["scale", "-n", "shop", "deployment/web", "--replicas=3"])?;
    on.cluster().rolled_out("shop", "deployment/web")?;
    kube.kubectl(["rollout", "restart", "-n", "shop", "deployment/web"])?;
    on.cluster().rolled_out("shop", "deployment/web")?;
    kube.kubectl(["scale", "-n", "shop", "deployment/web", "--replicas=1"])?;
    on.cluster().rolled_out("shop", "deployment/web")?;
    let kept = lossless(load, on, "web scaled to 3, restarted, scaled to 1")?;
    let delete = [
        "delete",
        "pod",
        "-n",
        "shop",
        "--selector=app=app",
        "--wait=true",
    ];
    kube.kubectl(delete)?;
    on.cluster().rolled_out("shop", "deployment/app")?;
    let answer = answered(on, CLIENT, &format!("{WEB}/"))?;
    Ok(vec![
        kept,
        format!("app deleted and made again: {}", answer.trim()),
    ])
}

/// Sends requests with new words until one is sent in plaintext, or encrypted, as expected.
fn until_on_the_wire(on: &Installed, phase: &str, in_clear: bool) -> Result<String> {
    let mut number = 0;
    let seen = eventually(phase, IN_FORCE, || {
        number += 1;
        let word = format!("{phase}{number}word{}", std::process::id());
        let url = format!("{WEB}/front?{word}");
        let answer = on.curl(CLIENT, &url).ok()?;
        let found = on.capture.so_far().ok()?.find(word.as_bytes()).ok()?;
        (answer.status.success() && found.is_empty() != in_clear).then_some(word)
    });
    seen.with_context(|| format!("{phase}: in clear: {in_clear}"))
}

fn enrolment(on: &Installed) -> Result<Vec<String>> {
    let kube = on.cluster().kube();
    let load = on.load(CLIENT, &format!("{WEB}/front"))?;
    let within = until_on_the_wire(on, "within", false)?;
    kube.kubectl(["label", "namespace", "clients", "mesh.rs/dataplane-"])?;
    // Traffic is now plaintext, and still allowed because web is Permissive.
    let outside = until_on_the_wire(on, "outside", true)?;
    kube.kubectl(["label", "namespace", "clients", "mesh.rs/dataplane=enabled"])?;
    let again = until_on_the_wire(on, "again", false)?;
    // Requests sent within the mesh must not appear in plaintext later either.
    let captured = on.capture.so_far()?;
    for (word, in_clear) in [(&within, false), (&outside, true), (&again, false)] {
        let found = captured.find(word.as_bytes())?;
        ensure!(found.is_empty() != in_clear, "{word}: {found:?}");
    }
    Ok(vec![
        lossless(load, on, "clients un-enrolled and enrolled again")?,
        format!("on the wire in clear: {outside}; not: {within}, {again}"),
    ])
}

fn agents_replaced(on: &Installed) -> Result<Vec<String>> {
    let kube = on.cluster().kube();
    let load = on.load(CLIENT, &format!("{WEB}/front"))?;
    let open = open::Held::start(on, CLIENT, WEB)?;
    let begun = Instant::now();
    kube.kubectl(["rollout", "restart", "-n", SYSTEM, "daemonset/mesh-agent"])?;
    on.cluster().rolled_out(SYSTEM, "daemonset/mesh-agent")?;
    // Wait for the old agents to drain.
    let one_each = |pods: &Value| items(pods).len() == on.cluster().nodes().len();
    let pods = [
        "pods",
        "-n",
        SYSTEM,
        "-l",
        "app.kubernetes.io/name=mesh-agent",
    ];
    kube.until(SOON, &pods, one_each)?;
    let took = begun.elapsed().as_secs_f64();
    let open = open.end(on)?;
    // As documented, open connections end with the old agent, after its drain time.
    ensure!(
        open.reset == open::COUNT && open.silent == 0,
        "open connections: {open:?}"
    );
    ensure!(
        open.shortest_s >= DRAIN - 1.0,
        "open connections were closed before the drain time: {open:?}"
    );
    Ok(vec![
        lossless(
            load,
            on,
            &format!("both agents replaced within {took:.0} s"),
        )?,
        format!(
            "of {} connections open before it {} were reset, the first {:.1} s after it began to \
             be asked, after {} requests; none was left silent",
            open::COUNT,
            open.reset,
            open.shortest_s,
            open.requests
        ),
    ])
}

fn uninstalled(on: &Installed) -> Result<Vec<String>> {
    let nodes = on.cluster().nodes();
    // The same inspection must find something while the mesh is installed.
    let before: Vec<Traces> = nodes.iter().map(Traces::look).collect::<Result<_>>()?;
    for (node, traces) in nodes.iter().zip(&before) {
        let unseen = traces.unseen();
        ensure!(
            unseen.is_empty(),
            "{}: the inspection finds no {unseen:?}",
            node.name()
        );
    }
    on.uninstall()?;
    let answer = answered(on, PLAIN, &format!("{WEB}/front"))?;
    let open = answered(on, INTRUDER, &format!("{WEB}/front"))?;
    let mut said = vec![format!(
        "plain -> web: {}; intruder -> web, policy gone with the mesh: {}",
        answer.trim(),
        open.trim()
    )];
    for (node, before) in nodes.iter().zip(before) {
        let left = Traces::look(node)?;
        ensure!(left.is_clean(), "{}: left behind: {left:?}", node.name());
        said.push(format!("{}: nothing of {before}", node.name()));
    }
    // The controller's pods end after the release is gone.
    let kube = on.cluster().kube();
    eventually("the mesh's own pods to be gone", IN_FORCE, || {
        let left = kube.kubectl(["get", "pods", "-n", SYSTEM, "-o", "name"]);
        left.is_ok_and(|left| left.trim().is_empty()).then_some(())
    })?;
    Ok(said)
}
