// SPDX-License-Identifier: Apache-2.0
//! The mesh as it is installed: a real cluster of two nodes, the image, the chart or the kustomize
//! base, the shop as Deployments, and what an operator does to them.
//!
//! Each line makes traffic from containers and looks for evidence outside the mesh: an exit code, a
//! capture between the nodes, what is left on a node.

mod containers;
mod kinds;
mod lines;
mod open;
mod rights;
mod shop;
mod traces;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::capture::Capture;
use crate::cluster::{Cluster, SOON};
use crate::kube::helm;
use crate::process::{Cmd, Output, Proc, tail};

pub use kinds::KINDS;
pub use lines::{CHANGES, DEMO};

/// Where the mesh lives.
pub(crate) const SYSTEM: &str = "mesh-system";

/// How the mesh is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installer {
    /// The chart, by helm.
    Helm,
    /// The base, by `kubectl apply -k`.
    Kustomize,
}

/// The installed mesh with the shop in it.
#[derive(Debug)]
pub struct Installed {
    pub(crate) installer: Installer,
    /// From before the first request on.
    pub(crate) capture: Capture,
    cluster: Cluster,
}

/// A promise, and how it is checked.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// The promise.
    pub title: &'static str,
    /// Makes the traffic and gives the evidence, a sentence each, or tells what is wrong.
    pub check: fn(&Installed) -> Result<Vec<String>>,
}

fn deploy(what: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    Ok(root.context("workspace")?.join("deploy").join(what))
}

impl Installed {
    /// Starts the cluster, imports the image, installs the mesh and the shop, and waits until all
    /// are rolled out. `progress` is told what is being done.
    ///
    /// # Errors
    /// Something does not come up; the error carries what its pods say.
    pub fn start(installer: Installer, image: &Path, progress: impl Fn(&str)) -> Result<Self> {
        let cluster = Cluster::start(2, &progress)?;
        progress("the image, on both nodes");
        cluster.import(image)?;
        let capture = cluster.capture_wire()?;
        let this = Self {
            installer,
            capture,
            cluster,
        };
        progress(match installer {
            Installer::Helm => "helm install",
            Installer::Kustomize => "kubectl apply -k",
        });
        this.install()?;
        progress("the shop, as Deployments");
        this.shop()?;
        Ok(this)
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    fn install(&self) -> Result<()> {
        match self.installer {
            Installer::Helm => {
                let chart = deploy("helm")?.display().to_string();
                let args = ["install", "mesh", &chart, "--create-namespace"];
                self.helm(&args)?;
            }
            Installer::Kustomize => {
                let base = deploy("kustomize")?.display().to_string();
                let kube = self.cluster.kube();
                let shared = format!("{base}/policy-api");
                kube.kubectl(["create", "-k", &shared])?;
                // A namespace and what is in it, a kind and its objects: the server takes them in
                // the order in which kustomize gives them.
                kube.kubectl(["apply", "--server-side", "-k", &base])?;
            }
        }
        self.cluster
            .rolled_out(SYSTEM, "deployment/mesh-controller")?;
        self.cluster.rolled_out(SYSTEM, "daemonset/mesh-agent")
    }

    /// Runs helm against the cluster.
    pub(crate) fn helm(&self, args: &[&str]) -> Result<Output> {
        let kube = self.cluster.kube();
        let cmd = Cmd::new(helm()?)
            .args(args)
            .args(["--namespace", SYSTEM])
            .env("KUBECONFIG", kube.kubeconfig())
            .env("HOME", kube.host().dir());
        kube.host().run(cmd, SOON * 3)?.ok()
    }

    /// Takes the mesh away again, as the documentation says.
    ///
    /// # Errors
    /// Something resists.
    pub fn uninstall(&self) -> Result<()> {
        match self.installer {
            Installer::Helm => self.helm(&["uninstall", "mesh", "--wait"]).map(drop),
            Installer::Kustomize => {
                let kube = self.cluster.kube();
                let base = deploy("kustomize")?.display().to_string();
                let hook = format!("{base}/uninstall");
                kube.kubectl(["apply", "--server-side", "-k", &hook])?;
                let job = ["wait", "--for=condition=complete", "job/mesh-uninstall"];
                let wait = kube.kubectl_cmd(job)?;
                let wait = wait.args(["--namespace", SYSTEM, "--timeout=240s"]);
                kube.host().run(wait, SOON * 3)?.ok()?;
                let delete = kube.kubectl_cmd(["delete", "--ignore-not-found", "-k", &base])?;
                kube.host().run(delete, SOON * 2)?.ok().map(drop)
            }
        }
        .with_context(|| self.cluster.report(SYSTEM))
    }

    /// A request from a container of one of the clients: whether it succeeded, and what was said.
    pub(crate) fn curl(&self, from: (&str, &str), url: &str) -> Result<Output> {
        let (namespace, deployment) = from;
        let target = format!("deploy/{deployment}");
        let curl = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "5",
            url,
        ];
        let exec = ["exec", "--namespace", namespace, &target, "--"];
        self.cluster
            .kube()
            .try_kubectl(exec.into_iter().chain(curl))
    }

    /// A script in a container: whether it succeeded, and what was said.
    pub(crate) fn python(&self, at: (&str, &str), script: &str) -> Result<Output> {
        let (namespace, deployment) = at;
        let target = format!("deploy/{deployment}");
        let exec = ["exec", "--namespace", namespace, &target, "--"];
        let python = ["python3", "-c", script];
        let kube = self.cluster.kube();
        kube.try_kubectl(exec.into_iter().chain(python))
    }

    /// Requests, each on a connection of its own, until it is ended.
    pub(crate) fn load(&self, from: (&str, &str), url: &str) -> Result<Load> {
        let (namespace, deployment) = from;
        let target = format!("deploy/{deployment}");
        let script = format!(
            "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
             curl -sS --fail --max-time 5 -o /dev/null {url} 2>&1 && echo ok || echo \"FAILED $n $(date +%T.%N)\"; \
             sleep 0.02; done; rm /tmp/stop; echo end"
        );
        let kube = self.cluster.kube();
        let exec = [
            "exec",
            "--namespace",
            namespace,
            &target,
            "--",
            "/bin/sh",
            "-c",
            &script,
        ];
        let process = kube.host().spawn(kube.kubectl_cmd(exec)?)?;
        Ok(Load {
            process,
            from: (namespace.to_owned(), target),
        })
    }
}

/// Requests that go on.
#[derive(Debug)]
pub(crate) struct Load {
    process: Proc,
    from: (String, String),
}

impl Load {
    /// Ends it: how many succeeded, and what the others said.
    pub(crate) fn end(mut self, on: &Installed) -> Result<(usize, Vec<String>)> {
        let (namespace, target) = (self.from.0.as_str(), self.from.1.as_str());
        let stop = [
            "exec",
            "--namespace",
            namespace,
            target,
            "--",
            "touch",
            "/tmp/stop",
        ];
        on.cluster.kube().kubectl(stop)?;
        self.process.wait(Duration::from_secs(30))?;
        let said = tail(self.process.log(), usize::MAX);
        if !said.ends_with("end") {
            bail!("the load ended early: {}", tail(self.process.log(), 5));
        }
        let good = said.lines().filter(|line| *line == "ok").count();
        let bad = said.lines().filter(|line| !["ok", "end"].contains(line));
        Ok((good, bad.map(str::to_owned).collect()))
    }
}
