// SPDX-License-Identifier: Apache-2.0
//! A real Kubernetes cluster on this machine: a control plane, and nodes with containerd, runc,
//! kubelet and kube-proxy, connected by a bridge as in a lab.
//!
//! Each node has its own network, mount, UTS and cgroup namespaces and its own subtree in every
//! cgroup hierarchy, so all programs find their usual paths and leave nothing on the machine.
//! The cluster is removed on drop; after a SIGKILL the next cluster removes it.

mod image;
mod machine;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::capture::{Capture, Scope};
use crate::kube::Kube;
use crate::lab::{Cleaner, Lab};
use crate::names::LabId;
use crate::netns::Netns;
use crate::process::{Host, Output};
use crate::{cgroup, sweep, topology};
use mesh_sys::testbed;

pub use image::BASE;
use machine::Given;
pub use machine::Machine;

/// Deadline for nodes to become Ready and for rollouts to complete, on a machine that also
/// compiles.
pub const SOON: Duration = Duration::from_secs(120);

/// A running cluster; drop stops and removes it.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Machine>,
    kube: Kube,
    wire: Host,
    audit: PathBuf,
    dir: PathBuf,
    /// Dropped last, after everything else has released its resources.
    #[expect(dead_code, reason = "held for its drop")]
    cleaner: Cleaner,
}

/// The audit policy and audit log of the API server.
struct Audit {
    flags: [String; 2],
    log: PathBuf,
}

impl Audit {
    /// Writes an audit policy that covers only the mesh's own service accounts.
    fn new(dir: &Path) -> Result<Self> {
        let (policy, log) = (dir.join("audit.json"), dir.join("audit.log"));
        let rules = serde_json::json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [
                { "level": "Metadata", "userGroups": ["system:serviceaccounts:mesh-system"] },
                { "level": "None" },
            ],
        });
        std::fs::write(&policy, rules.to_string())?;
        Ok(Self {
            flags: [
                format!("--audit-policy-file={}", policy.display()),
                format!("--audit-log-path={}", log.display()),
            ],
            log,
        })
    }
}

impl Cluster {
    /// Starts a control plane and `count` nodes, and waits until all are Ready. `progress` receives
    /// a message for each step.
    ///
    /// # Errors
    /// The caller is not root, or a program does not start; the error contains the end of its log.
    pub fn start(count: u8, progress: impl Fn(&str)) -> Result<Self> {
        ensure!(
            testbed::effective_uid() == 0,
            "nodes are made of namespaces: run this as root"
        );
        sweep::sweep()?;
        let id = LabId::next();
        let dir = id.claim()?;
        let cleaner = Cleaner::of(id);
        let group = cgroup::mount_point()?.join(id.cgroup());
        let netns = Arc::new(Netns::create(&id.netns("wire"))?);
        let wire = Host::new("wire", netns, group.join("wire"), dir.join("wire"))?;
        topology::lay_wire(&wire)?;
        wire.sysctl("ipv4/ip_forward", "1")?;
        // Pods reach the API server from their own addresses.
        topology::lead_to_pods(&wire, count)?;
        let audit = Audit::new(&dir)?;
        progress("starting the control plane: etcd, API server, controller manager, scheduler");
        let kube = Kube::builder()
            .controllers()
            .scheduler()
            // The flag also makes the controller manager evict the pods of dead nodes sooner.
            .controller_flag("--node-monitor-grace-period=20s")
            .api_flag(&audit.flags[0])
            .api_flag(&audit.flags[1])
            .start_at(id, wire.beside("kube")?, (IpAddr::V4(Lab::gateway()), None))?;
        progress("starting the nodes: containerd, kubelet, kube-proxy");
        let given = Given {
            kube: &kube,
            proxy: &kube.user("system:kube-proxy", None)?,
            base: &image::base(&dir)?,
        };
        let start = |number| Machine::start(id, (number, count), &wire, &given);
        let nodes = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=count)
                .map(|number| scope.spawn(move || start(number)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Machine>>| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        let cluster = Self {
            nodes,
            kube,
            wire,
            audit: audit.log,
            dir,
            cleaner,
        };
        for node in &cluster.nodes {
            cluster.wait_ready(node)?;
        }
        Ok(cluster)
    }

    fn wait_ready(&self, node: &Machine) -> Result<()> {
        // The not-ready taint is removed a moment later; until then nothing is scheduled, and a
        // DaemonSet without pods counts as rolled out.
        let untainted = |object: &serde_json::Value| object["spec"]["taints"].is_null();
        let ready = |object: &serde_json::Value| {
            let conditions = object["status"]["conditions"].as_array();
            conditions.is_some_and(|all| {
                let is =
                    |one: &serde_json::Value| one["type"] == "Ready" && one["status"] == "True";
                all.iter().any(is)
            })
        };
        let found = self.kube.until(SOON, &["node", node.name()], |object| {
            ready(object) && untainted(object)
        });
        found.map(drop).with_context(|| node.log_tails())
    }

    /// Returns the control plane.
    #[must_use]
    pub fn kube(&self) -> &Kube {
        &self.kube
    }

    /// Returns the control plane, to stop and start its servers.
    pub fn kube_mut(&mut self) -> &mut Kube {
        &mut self.kube
    }

    /// Returns the nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Machine] {
        &self.nodes
    }

    /// Returns node `number`, counted from 1.
    ///
    /// # Panics
    /// The cluster has fewer nodes.
    #[must_use]
    pub fn node(&self, number: u8) -> &Machine {
        &self.nodes[usize::from(number) - 1]
    }

    /// Returns the node with this name.
    ///
    /// # Errors
    /// The cluster has no such node.
    pub fn node_named(&self, name: &str) -> Result<&Machine> {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.with_context(|| format!("no node {name}"))
    }

    /// Returns the path of the audit log of requests by service accounts in the mesh's namespace:
    /// one JSON object per line (`audit.k8s.io/v1`, level Metadata).
    #[must_use]
    pub fn audit_log(&self) -> &Path {
        &self.audit
    }

    /// Returns a directory for files of tests; it is removed with the cluster.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the network namespace of the bridge that connects the nodes.
    #[must_use]
    pub fn wire(&self) -> &Host {
        &self.wire
    }

    /// Captures the frames that nodes send to each other, each exactly once.
    ///
    /// # Errors
    /// A packet socket cannot be opened.
    pub fn capture_wire(&self) -> Result<Capture> {
        Capture::start(&self.wire, &Scope::PortsOf(topology::WIRE))
    }

    /// Imports an image (a docker or OCI archive) on all nodes.
    ///
    /// # Errors
    /// The file is not a valid archive.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.import(archive))
    }

    /// Runs `kubectl exec` in a pod or in one of `deploy/NAME` and returns its output and status.
    ///
    /// # Errors
    /// kubectl cannot be run or times out.
    pub fn exec<'a>(
        &self,
        (namespace, pod): (&'a str, &'a str),
        command: impl IntoIterator<Item = &'a str>,
    ) -> Result<Output> {
        let exec = ["exec", "--namespace", namespace, pod, "--"];
        self.kube.try_kubectl(exec.into_iter().chain(command))
    }

    /// Waits until a workload is rolled out, e.g. `deploy/web`.
    ///
    /// # Errors
    /// The rollout is not complete within [`SOON`]; the error describes the namespace's pods.
    pub fn rolled_out(&self, namespace: &str, workload: &str) -> Result<()> {
        let timeout = format!("--timeout={}s", SOON.as_secs());
        let args = ["rollout", "status", "--namespace", namespace, workload];
        let command = self.kube.kubectl_cmd(args)?.args([timeout]);
        let done = self.kube.host().run(command, SOON * 2)?.ok();
        done.map(drop).with_context(|| self.report(namespace))
    }

    /// Describes the state of the pods of a namespace, for error messages.
    #[must_use]
    pub fn report(&self, namespace: &str) -> String {
        let mut report = Report::default();
        report.add(
            self.kube
                .kubectl(["get", "pods", "-n", namespace, "-o", "wide"]),
        );
        report.add(self.kube.kubectl([
            "get",
            "events",
            "-n",
            namespace,
            "--sort-by=.lastTimestamp",
        ]));
        let all = ["logs", "-n", namespace, "--all-containers", "--tail=20"];
        report.add(self.kube.kubectl(all.into_iter().chain([
            "--prefix",
            "--selector=mesh.rs/no-such!=x",
            "--ignore-errors",
        ])));
        report.0
    }
}

#[derive(Default)]
struct Report(String);

impl Report {
    fn add(&mut self, said: Result<impl fmt::Display>) {
        match said {
            Ok(text) => self.0 += &format!("{text}\n"),
            Err(e) => self.0 += &format!("{e:#}\n"),
        }
    }
}
