// SPDX-License-Identifier: Apache-2.0
//! The mesh's controller beside a test control plane, with its service account and with the roles
//! and admission policies of `deploy/base`.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Kube;
use crate::mesh::sum;
use crate::process::{Cmd, Proc};
use crate::programs;
use crate::wait::eventually;

/// Namespace in which the mesh is installed.
pub const NAMESPACE: &str = "mesh-system";
/// DNS name in the controller's certificate.
pub const SERVICE: &str = "mesh-controller.mesh-system.svc";

const READY: Duration = Duration::from_secs(60);
const REQUEST: Duration = Duration::from_secs(10);

/// A running controller replica; drop stops it.
#[derive(Debug)]
pub struct Controller {
    process: Proc,
    listen: SocketAddr,
    metrics: SocketAddr,
}

impl Kube {
    /// Installs what the controller needs: CRDs, its namespace, roles and admission policies, and
    /// the service accounts of controller and agents.
    ///
    /// # Errors
    /// The API server rejects an object.
    pub fn prepare_controller(&self) -> Result<()> {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
        self.namespace(NAMESPACE, &[])?;
        self.service_account(NAMESPACE, "mesh-agent")?;
        for part in [
            "crds",
            "base/admission.yaml",
            "base/agent-rbac.yaml",
            "base/controller-rbac.yaml",
        ] {
            let path = deploy.join(part);
            let path = path.to_str().context("the path is not UTF-8")?;
            self.kubectl(["apply", "--server-side", "-f", path])?;
        }
        self.crds_established()
    }

    /// Starts a replica of the controller at `address` and waits until it serves certificates.
    ///
    /// # Errors
    /// The controller does not become ready; the error contains the end of its log.
    pub fn controller(&self, replica: &str, address: IpAddr, flags: &[&str]) -> Result<Controller> {
        let token = self.token((NAMESPACE, "mesh-controller"), None, None)?;
        let config = self.token_kubeconfig(&format!("controller-{replica}"), &token)?;
        let [listen, metrics] = self.host().in_ns(|| {
            let held = [
                TcpListener::bind((address, 0))?,
                TcpListener::bind((address, 0))?,
            ];
            Ok([held[0].local_addr()?, held[1].local_addr()?])
        })?;
        let command = Cmd::new(programs::controller()?)
            .args(["run", "--replica", replica, "--log-level", "debug"])
            .args(["--kubeconfig".as_ref(), config.as_os_str()])
            .args(["--listen", &listen.to_string()])
            .args(["--metrics", &metrics.to_string()])
            .args(["--serving-name", &address.to_string()])
            .args(flags);
        let mut controller = Controller {
            process: self.host().spawn(command)?,
            listen,
            metrics,
        };
        let mut ended = None;
        let ready = eventually("the controller to serve certificates", READY, || {
            ended = controller.process.ended().ok().flatten();
            let ready = controller.page(self, "/readyz").is_ok();
            (ready || ended.is_some()).then_some(ready)
        });
        match ready {
            Ok(true) => Ok(controller),
            _ => anyhow::bail!("not ready ({ended:?}):\n{}", controller.process.log_tail()),
        }
    }

    /// Returns a file with the root certificates that the controller has published.
    ///
    /// # Errors
    /// The controller has not published any yet.
    pub fn ca_bundle(&self) -> Result<PathBuf> {
        let map = self.get(["configmap", "mesh-ca-root", "-n", NAMESPACE])?;
        let bundle = map["data"]["ca.crt"].as_str().context("no roots")?;
        let path = self.host().dir().join("mesh-ca.crt");
        fs::write(&path, bundle)?;
        Ok(path)
    }
}

impl Controller {
    /// Returns the URL of the certificate service, with an IP address as host.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.listen)
    }

    /// Returns the address of the certificate service.
    #[must_use]
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Returns the replica's process.
    pub fn process(&mut self) -> &mut Proc {
        &mut self.process
    }

    /// Fetches a page from the port of probes and metrics.
    ///
    /// # Errors
    /// The page cannot be fetched.
    pub fn page(&self, kube: &Kube, path: &str) -> Result<String> {
        let url = format!("http://{}{path}", self.metrics);
        let get = Cmd::new("curl").args(["-sSf", "--max-time", "5", &url]);
        Ok(kube.host().run(get, REQUEST)?.ok()?.text())
    }

    /// Returns the sum of a metric's samples with these labels.
    ///
    /// # Errors
    /// The metrics page cannot be fetched.
    pub fn metric(&self, kube: &Kube, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(sum(&self.page(kube, "/metrics")?, name, labels))
    }

    /// Returns whether this replica is the leader.
    ///
    /// # Errors
    /// The metrics page cannot be fetched.
    pub fn leads(&self, kube: &Kube) -> Result<bool> {
        Ok(self.metric(kube, "mesh_controller_leader", &[])? > 0.5)
    }
}
