// SPDX-License-Identifier: Apache-2.0
//! A real Kubernetes control plane for tests: etcd, the API server and, on request, the controller
//! manager and the scheduler.
//!
//! RBAC, Node authorization and NodeRestriction are on. Standalone, it listens on free ports of
//! 127.0.0.1; in a lab it has an address that every node reaches. It is removed on drop; after a
//! SIGKILL the next one removes it. [`Kube::start`] uses an existing cluster if
//! `MESH_TEST_KUBECONFIG` names one.

pub mod controller;
mod kubectl;
mod pki;
mod programs;
mod servers;

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cgroup;
use crate::lab::{Cleaner, Lab};
use crate::names::LabId;
use crate::netns::Netns;
use crate::process::Host;
use crate::sweep;

pub use kubectl::Bound;
pub use programs::{Programs, helm};

use pki::Pki;
use servers::Servers;

/// Kubeconfig of an existing cluster to use instead of a new one, for tests that neither stop its
/// API server nor require that no controllers run.
const EXISTING: &str = "MESH_TEST_KUBECONFIG";

/// Timeout of one kubectl request.
pub(crate) const REQUEST: Duration = Duration::from_secs(60);

/// Configuration of a control plane.
#[derive(Debug, Default)]
pub struct Builder {
    pub(crate) controllers: bool,
    pub(crate) scheduler: bool,
    pub(crate) api_flags: Vec<String>,
    pub(crate) controller_flags: Vec<String>,
}

impl Builder {
    /// Adds the controller manager, for default service accounts, EndpointSlices, namespace
    /// deletion and ReplicaSets. It does not evict pods from nodes without a kubelet.
    #[must_use]
    pub fn controllers(mut self) -> Self {
        self.controllers = true;
        self
    }

    /// Adds the scheduler.
    #[must_use]
    pub fn scheduler(mut self) -> Self {
        self.scheduler = true;
        self
    }

    /// Adds a flag to the API server, e.g. `--emulated-version=kube=1.33`.
    #[must_use]
    pub fn api_flag(mut self, flag: &str) -> Self {
        self.api_flags.push(flag.to_owned());
        self
    }

    /// Adds a flag to the controller manager.
    #[must_use]
    pub fn controller_flag(mut self, flag: &str) -> Self {
        self.controller_flags.push(flag.to_owned());
        self
    }

    /// Starts the control plane on 127.0.0.1 of this machine and waits until it is ready.
    ///
    /// # Errors
    /// A program cannot be built or does not become ready; the error contains the end of its log.
    pub fn start(self) -> Result<Kube> {
        sweep::sweep()?;
        let id = LabId::next();
        let dir = id.claim()?;
        let cleaner = Cleaner::of(id);
        let netns = Arc::new(Netns::of_this_process()?);
        let group = cgroup::mount_point()?.join(id.cgroup()).join("kube");
        let host = Host::new("kube", netns, group, dir.join("kube"))?;
        self.start_at(id, host, (IpAddr::V4(Ipv4Addr::LOCALHOST), Some(cleaner)))
    }

    /// Starts the control plane in a lab, at the address of the nodes' default gateway.
    ///
    /// # Errors
    /// A program cannot be built or does not become ready; the error contains the end of its log.
    pub fn start_in(self, lab: &Lab) -> Result<Kube> {
        let host = lab.wire().beside("kube")?;
        self.start_at(lab.id(), host, (IpAddr::V4(Lab::gateway()), None))
    }

    /// Starts the control plane in a namespace that has `address`.
    pub(crate) fn start_at(
        self,
        id: LabId,
        host: Host,
        (address, cleaner): (IpAddr, Option<Cleaner>),
    ) -> Result<Kube> {
        let pki = Pki::create(&host.dir().join("pki"), address)?;
        let servers = Servers::start(&self, &host, &pki, address)?;
        let admin = pki.client(&servers.url(), "admin", Some("system:masters"))?;
        Ok(Kube {
            id,
            admin,
            servers: Some((servers, pki)),
            host,
            cleaner,
        })
    }
}

/// A running control plane; drop stops and removes it.
#[derive(Debug)]
pub struct Kube {
    id: LabId,
    admin: PathBuf,
    /// The servers and their PKI; `None` for an existing cluster.
    servers: Option<(Servers, Pki)>,
    host: Host,
    /// Dropped last, after the servers. `None` in a lab, whose own cleaner removes everything.
    #[expect(dead_code, reason = "held for its drop")]
    cleaner: Option<Cleaner>,
}

impl Kube {
    /// Returns the configuration of a control plane with only etcd and the API server.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Starts etcd and the API server on 127.0.0.1, or uses the cluster that
    /// `MESH_TEST_KUBECONFIG` names.
    ///
    /// # Errors
    /// A program cannot be built or does not become ready; the error contains the end of its log.
    pub fn start() -> Result<Self> {
        let Some(admin) = std::env::var_os(EXISTING) else {
            return Self::builder().start();
        };
        let id = LabId::next();
        let dir = id.claim()?;
        let cleaner = Some(Cleaner::of(id));
        let netns = Arc::new(Netns::of_this_process()?);
        let group = cgroup::mount_point()?.join(id.cgroup()).join("kube");
        let host = Host::new("kube", netns, group, dir.join("kube"))?;
        Ok(Self {
            id,
            admin: PathBuf::from(admin),
            servers: None,
            host,
            cleaner,
        })
    }

    /// Returns the id in the names of its directory and cgroup; in a lab, the lab's id.
    #[must_use]
    pub fn id(&self) -> LabId {
        self.id
    }

    /// Returns the path of an administrator's kubeconfig (`system:masters`).
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.admin
    }

    /// Returns the host on which the servers run. Only processes and threads in its namespace, and
    /// the nodes of its lab, reach the API server.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    fn own(&self) -> Result<&(Servers, Pki)> {
        let own = self.servers.as_ref();
        own.context("the test uses an existing cluster, whose servers cannot be stopped")
    }

    fn own_mut(&mut self) -> Result<(&mut Servers, &Host)> {
        let own = self.servers.as_mut();
        let (servers, _) =
            own.context("the test uses an existing cluster, whose servers cannot be stopped")?;
        Ok((servers, &self.host))
    }

    /// Returns the API server's URL, `https://ADDRESS:PORT`.
    ///
    /// # Errors
    /// The test uses an existing cluster.
    pub fn url(&self) -> Result<String> {
        Ok(self.own()?.0.url())
    }

    /// Returns the path of the CA certificate (PEM) that verifies the API server.
    ///
    /// # Errors
    /// The test uses an existing cluster.
    pub fn ca(&self) -> Result<PathBuf> {
        Ok(self.own()?.1.ca())
    }

    /// Kills the API server with SIGKILL; etcd continues to run.
    ///
    /// # Errors
    /// The process does not exit, or the test uses an existing cluster.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.own_mut()?.0.kill_api_server()
    }

    /// Starts the API server again, on the same port, and waits until it is ready.
    ///
    /// # Errors
    /// The API server does not become ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        let (servers, host) = self.own_mut()?;
        servers.start_api_server(host)
    }

    /// Pauses (SIGSTOP) or resumes the API server. A paused one answers nothing and closes nothing.
    ///
    /// # Errors
    /// The process has exited.
    pub fn pause_api_server(&mut self, pause: bool) -> Result<()> {
        self.own_mut()?.0.pause_api_server(pause)
    }

    /// Compacts etcd to the latest revision and returns it. After a restart of the API server, a
    /// watch from an older revision gets 410 Gone.
    ///
    /// # Errors
    /// etcd does not answer.
    pub fn compact_etcd(&self) -> Result<u64> {
        self.own()?.0.compact(&self.host)
    }

    /// Returns a kubeconfig with a client certificate for user `name` in `group`. Each call
    /// replaces the files of previous calls for this name, so calls for one name must not run
    /// concurrently.
    ///
    /// # Errors
    /// The test uses an existing cluster.
    pub fn user(&self, name: &str, group: Option<&str>) -> Result<PathBuf> {
        let (servers, pki) = self.own()?;
        pki.client(&servers.url(), name, group)
    }

    /// Returns a node's certificate and key (PEM files), valid as the client `system:node:NAME` and
    /// as a server at `address`.
    ///
    /// # Errors
    /// The test uses an existing cluster.
    pub fn node_certificate(&self, name: &str, address: IpAddr) -> Result<(PathBuf, PathBuf)> {
        self.own()?.1.node(name, address)
    }

    /// Returns a kubeconfig with a bearer token from the file `token` in the same directory, which
    /// may be replaced.
    ///
    /// # Errors
    /// The test uses an existing cluster, or the file cannot be written.
    pub fn token_kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let (servers, pki) = self.own()?;
        let file = self.host.dir().join(format!("{name}.token"));
        fs::write(&file, token)?;
        pki.token_client(&servers.url(), name, &file)
    }

    /// Returns the last lines of all servers' logs, for error messages.
    #[must_use]
    pub fn log_tails(&self) -> String {
        let own = self.servers.as_ref();
        own.map(|(servers, _)| servers.log_tails())
            .unwrap_or_default()
    }

    /// Returns the resident memory of the API server in bytes.
    ///
    /// # Errors
    /// The process has exited.
    pub fn api_server_resident(&self) -> Result<u64> {
        self.own()?.0.api_server_resident()
    }
}
