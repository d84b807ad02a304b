// SPDX-License-Identifier: Apache-2.0
//! A real Kubernetes control plane for tests: etcd, the API server and, where asked for, the
//! controller manager and the scheduler.
//!
//! RBAC, Node authorisation and NodeRestriction are on. By itself it listens on 127.0.0.1 of this
//! machine, on free ports; in a lab it stands on the wire, where every node reaches it. Everything
//! is removed on drop, and after a kill -9 by the next one. [`Kube::start`] uses a cluster that is
//! there already, if `MESH_TEST_KUBECONFIG` names one.

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

/// Names a cluster that is used instead of one made for the test. Only for tests that neither
/// stop its API server nor need controllers off.
const EXISTING: &str = "MESH_TEST_KUBECONFIG";

/// How long one request by kubectl may take.
pub(crate) const REQUEST: Duration = Duration::from_secs(60);

/// Describes a control plane to be started.
#[derive(Debug, Default)]
pub struct Builder {
    pub(crate) controllers: bool,
    pub(crate) scheduler: bool,
    pub(crate) api_flags: Vec<String>,
    pub(crate) controller_flags: Vec<String>,
}

impl Builder {
    /// With the controller manager: default service accounts, EndpointSlices, the end of
    /// namespaces, ReplicaSets. Nodes without a kubelet are left alone.
    #[must_use]
    pub fn controllers(mut self) -> Self {
        self.controllers = true;
        self
    }

    /// With the scheduler.
    #[must_use]
    pub fn scheduler(mut self) -> Self {
        self.scheduler = true;
        self
    }

    /// Adds a flag of the API server, e.g. `--emulated-version=kube=1.33`.
    #[must_use]
    pub fn api_flag(mut self, flag: &str) -> Self {
        self.api_flags.push(flag.to_owned());
        self
    }

    /// Adds a flag of the controller manager.
    #[must_use]
    pub fn controller_flag(mut self, flag: &str) -> Self {
        self.controller_flags.push(flag.to_owned());
        self
    }

    /// Starts it on 127.0.0.1 of this machine and waits until it is ready.
    ///
    /// # Errors
    /// The programs cannot be built, or do not become ready; the error carries their last words.
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

    /// Starts it on the wire of a lab, at the address that is the nodes' gateway.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub fn start_in(self, lab: &Lab) -> Result<Kube> {
        let host = lab.wire().beside("kube")?;
        self.start_at(lab.id(), host, (IpAddr::V4(Lab::gateway()), None))
    }

    /// Starts it in a namespace that has `address`.
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

/// A control plane that runs; ended and removed when dropped.
#[derive(Debug)]
pub struct Kube {
    id: LabId,
    admin: PathBuf,
    /// None where the cluster was there before.
    servers: Option<(Servers, Pki)>,
    host: Host,
    /// Last, so that everything else has let go before. None in a lab, which removes it all.
    #[expect(dead_code, reason = "held for its drop")]
    cleaner: Option<Cleaner>,
}

impl Kube {
    /// Describes a control plane of etcd and the API server alone.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Starts etcd and the API server on 127.0.0.1, or uses the cluster that
    /// `MESH_TEST_KUBECONFIG` names.
    ///
    /// # Errors
    /// As [`Builder::start`].
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

    /// The id that its directory and cgroup carry; in a lab, the lab's.
    #[must_use]
    pub fn id(&self) -> LabId {
        self.id
    }

    /// A kubeconfig of an administrator (`system:masters`).
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.admin
    }

    /// Where the servers run. Only processes and threads in this namespace reach the API server,
    /// and in a lab its nodes.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    fn own(&self) -> Result<&(Servers, Pki)> {
        let own = self.servers.as_ref();
        own.context("this cluster is not the test's own: its servers cannot be stopped")
    }

    fn own_mut(&mut self) -> Result<(&mut Servers, &Host)> {
        let own = self.servers.as_mut();
        let (servers, _) =
            own.context("this cluster is not the test's own: its servers cannot be stopped")?;
        Ok((servers, &self.host))
    }

    /// `https://ADDRESS:PORT` of the API server.
    ///
    /// # Errors
    /// The cluster is not the test's own.
    pub fn url(&self) -> Result<String> {
        Ok(self.own()?.0.url())
    }

    /// The certificate (PEM) of the CA that signed the API server's.
    ///
    /// # Errors
    /// The cluster is not the test's own.
    pub fn ca(&self) -> Result<PathBuf> {
        Ok(self.own()?.1.ca())
    }

    /// Kills the API server without notice. etcd stays.
    ///
    /// # Errors
    /// It does not end, or is not the test's own.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.own_mut()?.0.kill_api_server()
    }

    /// Starts the API server again, on the same port, and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        let (servers, host) = self.own_mut()?;
        servers.start_api_server(host)
    }

    /// Pauses the API server (SIGSTOP), as one that answers nobody and closes nothing, or lets it
    /// go on.
    ///
    /// # Errors
    /// It has ended.
    pub fn pause_api_server(&mut self, pause: bool) -> Result<()> {
        self.own_mut()?.0.pause_api_server(pause)
    }

    /// Has etcd forget every version but the last, so that a watch from an older one is answered
    /// with 410 Gone once the API server was restarted; gives the revision.
    ///
    /// # Errors
    /// etcd does not answer.
    pub fn compact_etcd(&self) -> Result<u64> {
        self.own()?.0.compact(&self.host)
    }

    /// A kubeconfig of a user with a client certificate, in this group. Each call for a name replaces the
    /// files of the one before: not for two threads at once.
    ///
    /// # Errors
    /// The cluster is not the test's own.
    pub fn user(&self, name: &str, group: Option<&str>) -> Result<PathBuf> {
        let (servers, pki) = self.own()?;
        pki.client(&servers.url(), name, group)
    }

    /// Certificate and key (PEM files) of a node: for the API server as `system:node:NAME`, and for
    /// serving at `address`.
    ///
    /// # Errors
    /// The cluster is not the test's own.
    pub fn node_certificate(&self, name: &str, address: IpAddr) -> Result<(PathBuf, PathBuf)> {
        self.own()?.1.node(name, address)
    }

    /// A kubeconfig with a bearer token; replacing `token` beside it replaces the token.
    ///
    /// # Errors
    /// The cluster is not the test's own, or the file cannot be written.
    pub fn token_kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let (servers, pki) = self.own()?;
        let file = self.host.dir().join(format!("{name}.token"));
        fs::write(&file, token)?;
        pki.token_client(&servers.url(), name, &file)
    }

    /// The last lines of the logs of all servers, for error messages.
    #[must_use]
    pub fn log_tails(&self) -> String {
        let own = self.servers.as_ref();
        own.map(|(servers, _)| servers.log_tails())
            .unwrap_or_default()
    }

    /// Memory that the API server has resident now, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn api_server_resident(&self) -> Result<u64> {
        self.own()?.0.api_server_resident()
    }
}
