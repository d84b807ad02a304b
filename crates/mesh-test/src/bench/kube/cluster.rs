// SPDX-License-Identifier: Apache-2.0
//! The real part of the benchmark cluster: the API server, one node with an agent, its pods with a
//! client and a server, and a program that observes which policy is enforced.

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

/// Number of real pods on the node, including client and server.
const PODS: usize = 10;
const CLIENT: &str = "client";
const SERVER: &str = "server";
const PORT: u16 = 7000;
/// Name of the policy that decides whether the client reaches the server.
const POLICY: &str = "decides";
/// Label that the policy requires of the client.
const FRIEND: &str = "friend";
/// Deadline for the agent to become ready; it reads all objects of the cluster first.
const READY: Duration = Duration::from_secs(120);

/// The API server's real node, with its pods and servers.
#[derive(Debug)]
pub(super) struct BenchCluster {
    /// Servers in the pods; dropped before the lab.
    servers: Vec<Proc>,
    pub(super) pods: Names,
    lab: Lab,
}

/// The real pods, and the writes that change what the client may reach.
#[derive(Clone, Debug)]
pub(super) struct Names {
    namespace: String,
}

impl Names {
    /// Returns the write that lets all clients, or only those with the label, reach the server.
    pub(super) fn everybody(&self, open: bool) -> Request {
        let body = json!({"spec": spec(open)});
        let path = format!(
            "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
            self.namespace
        );
        Request::merge(format!("{path}/{POLICY}"), body)
    }

    /// Returns the write that adds the label to the client or removes it.
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
    /// Starts a node without pods, and an API server with the mesh's CRDs.
    pub(super) fn open() -> Result<(Kube, Self)> {
        let lab = Lab::builder(Topology::Routed).nodes(1).build()?;
        let kube = Kube::builder().start_in(&lab)?;
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds");
        let crds = crds.to_str().context("the path of the CRDs is not UTF-8")?;
        kube.kubectl(["apply", "--server-side", "-f", crds])?;
        kube.crds_established()?;
        let pods = Names {
            namespace: ObjectCounts::namespace(0),
        };
        let servers = Vec::new();
        Ok((kube, Self { servers, pods, lab }))
    }

    /// Adds the real node, its pods and the policy; their namespace must exist.
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
            let uid = stored["metadata"]["uid"]
                .as_str()
                .context("the pod has no UID")?;
            let spec = PodSpec::new(&name, 1)
                .namespace(&self.pods.namespace)
                .uid(uid);
            let pod = self.lab.add_pod(spec)?;
            // A process keeps the pod's cgroup in use, as a sandbox container does.
            self.servers.push(pod.serve(&format!("--tcp [::]:{PORT}"))?);
            let addresses: Vec<String> = pod.addresses().iter().map(ToString::to_string).collect();
            let status = json!({"status": running(&addresses)});
            api.send(&Request::merge(format!("{path}/{name}/status"), status))?;
        }
        api.send(&policy(&self.pods.namespace, POLICY, &spec(false)))?;
        Ok(())
    }

    /// Starts the agent with the flags that it has in a cluster.
    pub(super) fn start_agent(&self, kube: &Kube) -> Result<Agent> {
        let config = AgentConfig::new(&Mesh::own_ca(&self.lab))
            .source("kubernetes")
            .flag("--kubeconfig", kube.kubeconfig())
            .ready_within(READY);
        self.lab.node(1).start_agent(config)
    }

    /// Starts a program in the client pod that connects to the server repeatedly.
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

/// Observes whether the client reaches the server.
#[derive(Debug)]
pub(super) struct Watcher {
    process: Proc,
    open: Cell<Option<bool>>,
}

impl Watcher {
    /// Waits until the server is reachable (`open`) or not, and returns when this was observed.
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
