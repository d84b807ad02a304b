// SPDX-License-Identifier: Apache-2.0
//! What is real: the API server, one node with an agent, a client and a server in its pods among
//! others, and a program that sees what is in force.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::api::{Proxy, Request};
use super::label;
use super::objects::{ObjectCounts, policy, running};
use crate::agent::{Agent, AgentConfig};
use crate::kube::Kube;
use crate::lab::Lab;
use crate::mesh::Mesh;
use crate::pod::PodSpec;
use crate::process::{Cmd, Proc};
use crate::topology::Topology;

/// Real pods of the node, client and server among them.
const PODS: usize = 10;
const CLIENT: &str = "client";
const SERVER: &str = "server";
const PORT: u16 = 7000;
/// The policy that decides whether the client reaches the server.
const POLICY: &str = "decides";
/// The label that it asks the client for.
const FRIEND: &str = "friend";
/// An agent of a large cluster reads it all before it is ready.
const READY: Duration = Duration::from_secs(120);

/// The real part.
#[derive(Debug)]
pub(super) struct BenchCluster {
    /// Ends before its place goes.
    servers: Vec<Proc>,
    pub(super) pods: Names,
    lab: Lab,
}

/// Whose connection shows what is in force.
#[derive(Clone, Debug)]
pub(super) struct Names {
    namespace: String,
}

impl Names {
    /// Everybody may connect to the server, or only who has the label.
    pub(super) fn everybody(&self, open: bool) -> Request {
        let body = json!({"spec": spec(open)});
        let path = format!(
            "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
            self.namespace
        );
        Request::merge(format!("{path}/{POLICY}"), body)
    }

    /// The client has the label, or has not.
    pub(super) fn friend(&self, open: bool) -> Request {
        let path = format!("/api/v1/namespaces/{}/pods/{CLIENT}", self.namespace);
        Request::merge(path, label(FRIEND, open.then_some("yes")))
    }
}

fn spec(everybody: bool) -> Value {
    let who = match everybody {
        true => json!({"podSelector": {}}),
        false => json!({"podSelector": {"matchLabels": {FRIEND: "yes"}}}),
    };
    json!({
        "podSelector": {"matchLabels": {"app": SERVER}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [who], "ports": [{"protocol": "TCP", "port": PORT}]}],
    })
}

impl BenchCluster {
    /// A node without pods, and an API server with the mesh's kinds.
    pub(super) fn open() -> Result<(Kube, Self)> {
        let lab = Lab::builder(Topology::Routed).nodes(1).build()?;
        let kube = Kube::builder().start_in(&lab)?;
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds");
        let crds = crds.to_str().context("the path of the CRDs")?;
        kube.kubectl(["apply", "--server-side", "-f", crds])?;
        kube.crds_established()?;
        let pods = Names {
            namespace: ObjectCounts::namespace(0),
        };
        let servers = Vec::new();
        Ok((kube, Self { servers, pods, lab }))
    }

    /// The real node, its pods, and the policy; their namespace must be there.
    pub(super) fn add_pods(&mut self, proxy: &Proxy<'_>) -> Result<()> {
        let mut api = proxy.connect()?;
        let node = Arc::clone(self.lab.node(1));
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "spec": {"podCIDR": node.pod_cidrs()[0], "podCIDRs": node.pod_cidrs()},
            "status": {"addresses": [{"type": "InternalIP", "address": node.v4()}]},
        });
        api.send(&Request::create("/api/v1/nodes", object))?;
        let path = format!("/api/v1/namespaces/{}/pods", self.pods.namespace);
        let others = (2..PODS).map(|number| format!("other-{number}"));
        for name in [CLIENT.to_owned(), SERVER.to_owned()]
            .into_iter()
            .chain(others)
        {
            let object = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "labels": {"app": name}},
                "spec": {
                    "nodeName": node.name(),
                    "automountServiceAccountToken": false,
                    "containers": [{"name": "app", "image": "localhost/none:1"}],
                },
            });
            let stored = api.send(&Request::create(&*path, object))?;
            let uid = stored["metadata"]["uid"].as_str().context("a UID")?;
            let spec = PodSpec::new(&name, 1)
                .namespace(&self.pods.namespace)
                .uid(uid);
            let pod = self.lab.add_pod(spec)?;
            // What holds its cgroup, as a sandbox does.
            self.servers.push(pod.serve(&format!("--tcp [::]:{PORT}"))?);
            let addresses: Vec<String> = pod.addresses().iter().map(ToString::to_string).collect();
            let status = json!({"status": running(&addresses)});
            api.send(&Request::merge(format!("{path}/{name}/status"), status))?;
        }
        api.send(&policy(&self.pods.namespace, POLICY, &spec(false)))?;
        Ok(())
    }

    /// The agent, with the flags that it has in a cluster.
    pub(super) fn start_agent(&self, kube: &Kube) -> Result<Agent> {
        let config = AgentConfig::new(&Mesh::own_ca(&self.lab))
            .source("kubernetes")
            .flag("--kubeconfig", kube.kubeconfig())
            .ready_within(READY);
        self.lab.node(1).start_agent(config)
    }

    /// A program in the client that connects to the server again and again.
    pub(super) fn watch(&self) -> Result<Watcher> {
        let to = format!("{}:{PORT}", self.lab.pod(SERVER).v4());
        let program = Cmd::new("/proc/self/exe").args(["load-watch", "--to", &to]);
        let process = self.lab.pod(CLIENT).spawn_lines(program)?;
        Ok(Watcher {
            process,
            open: Cell::new(None),
        })
    }
}

/// Sees whether the client reaches the server.
#[derive(Debug)]
pub(super) struct Watcher {
    process: Proc,
    open: Cell<Option<bool>>,
}

impl Watcher {
    /// Waits until it does, or does not; when that was known here.
    pub(super) fn until(&self, open: bool, deadline: Duration) -> Result<Instant> {
        while self.open.get() != Some(open) {
            let line = self.process.line(deadline);
            let line =
                line.with_context(|| format!("waiting for a connection that shows {open}"))?;
            let line = line.with_context(|| self.process.log_tail())?;
            self.open.set(Some(line == "open"));
        }
        Ok(Instant::now())
    }
}
