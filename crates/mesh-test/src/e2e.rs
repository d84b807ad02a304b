// SPDX-License-Identifier: Apache-2.0
//! End-to-end checks of an installed mesh: a real cluster of two nodes, the image, the chart or the
//! kustomize base, the shop as Deployments, and an operator's actions on them.
//!
//! Each check makes traffic from containers and looks for evidence outside the mesh: an exit code,
//! a packet capture between the nodes, the state left on a node.

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

/// Namespace in which the mesh is installed.
pub(crate) const SYSTEM: &str = "mesh-system";

/// The installation method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installer {
    /// The Helm chart.
    Helm,
    /// The kustomize base, with `kubectl apply -k`.
    Kustomize,
}

/// An installed mesh with the shop.
#[derive(Debug)]
pub struct Installed {
    pub(crate) installer: Installer,
    /// Capture that starts before the first request.
    pub(crate) capture: Capture,
    cluster: Cluster,
}

/// A promise of the mesh and its check.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Title: the promise.
    pub title: &'static str,
    /// Makes the traffic and returns the evidence as sentences, or an error if the promise does not
    /// hold.
    pub check: fn(&Installed) -> Result<Vec<String>>,
}

fn deploy(what: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    Ok(root.context("workspace")?.join("deploy").join(what))
}

impl Installed {
    /// Starts the cluster, imports the image, installs the mesh and the shop, and waits until all
    /// are rolled out. `progress` receives a message for each step.
    ///
    /// # Errors
    /// A program or workload does not start; the error describes the pods.
    pub fn start(installer: Installer, image: &Path, progress: impl Fn(&str)) -> Result<Self> {
        let cluster = Cluster::start(2, &progress)?;
        progress("importing the image on both nodes");
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

    /// Returns the cluster.
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
                // The base has a Namespace and a CRD before the objects that need them, and the API
                // server applies them in kustomize's order.
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

    /// Uninstalls the mesh as documented.
    ///
    /// # Errors
    /// An object cannot be removed.
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

    /// Sends a request with curl from a container of a client and returns its output and status.
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

    /// Runs a Python script in a container and returns its output and status.
    pub(crate) fn python(&self, at: (&str, &str), script: &str) -> Result<Output> {
        let (namespace, deployment) = at;
        let target = format!("deploy/{deployment}");
        let exec = ["exec", "--namespace", namespace, &target, "--"];
        let python = ["python3", "-c", script];
        let kube = self.cluster.kube();
        kube.try_kubectl(exec.into_iter().chain(python))
    }

    /// Starts sending requests, each on a new connection, until stopped.
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

/// A running load of requests.
#[derive(Debug)]
pub(crate) struct Load {
    process: Proc,
    from: (String, String),
}

impl Load {
    /// Stops the load; returns the number of successful requests and the errors of the others.
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
