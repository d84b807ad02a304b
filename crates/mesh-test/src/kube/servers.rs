// SPDX-License-Identifier: Apache-2.0
//! The processes of a control plane: their command lines, and how to wait until they are ready.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::pki::Pki;
use super::programs::Programs;
use super::{Builder, REQUEST};
use crate::process::{Cmd, Host, Proc};
use crate::wait::eventually;

/// Deadline for the API server to become ready: 5 s on an idle machine, several times that under
/// load.
const READY: Duration = Duration::from_secs(120);

const PAUSE: Duration = Duration::from_millis(100);

const LOCAL: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[derive(Debug)]
pub(super) struct Servers {
    etcd: Proc,
    etcd_port: u16,
    api: Proc,
    /// The API server's command line, to start it again.
    api_args: Vec<String>,
    programs: Programs,
    address: IpAddr,
    port: u16,
    ca: String,
    others: Vec<Proc>,
}

impl Servers {
    pub(super) fn start(wanted: &Builder, host: &Host, pki: &Pki, address: IpAddr) -> Result<Self> {
        let programs = Programs::find()?;
        // All ports are allocated together, so that no two are equal.
        let [port, etcd_port, peer_port] = free_ports(host)?;
        let etcd = host.spawn(etcd(&programs, host.dir(), etcd_port, peer_port))?;
        let mut api_args = api_args(pki, address, (port, etcd_port));
        api_args.extend(wanted.api_flags.iter().cloned());
        let api = host.spawn(programs.command("kube-apiserver").args(&api_args))?;
        let mut this = Self {
            etcd,
            etcd_port,
            api,
            api_args,
            programs,
            address,
            port,
            ca: pki.ca().display().to_string(),
            others: Vec::new(),
        };
        this.wait_ready(host)?;
        if wanted.controllers {
            let args = controller_args(pki, &this.url(), wanted)?;
            let command = this.programs.command("kube-controller-manager").args(args);
            this.others.push(host.spawn(command)?);
        }
        if wanted.scheduler {
            let config = pki.client(&this.url(), "system:kube-scheduler", None)?;
            let command = this.programs.command("kube-scheduler").args([
                format!("--kubeconfig={}", config.display()),
                "--leader-elect=false".to_owned(),
                "--secure-port=0".to_owned(),
            ]);
            this.others.push(host.spawn(command)?);
        }
        Ok(this)
    }

    pub(super) fn url(&self) -> String {
        format!("https://{}:{}", self.address, self.port)
    }

    fn wait_ready(&mut self, host: &Host) -> Result<()> {
        let ready = eventually("the API server to be ready", READY, || {
            for server in [&mut self.etcd, &mut self.api] {
                match server.ended() {
                    Ok(None) => {}
                    Ok(Some(status)) => {
                        return Some(Err(anyhow::anyhow!(
                            "the API server exited with {status}:\n{}",
                            server.log_tail()
                        )));
                    }
                    Err(e) => return Some(Err(e)),
                }
            }
            let url = format!("https://{}:{}/readyz", self.address, self.port);
            let ask = Cmd::new("curl").args(["--silent", "--max-time", "2", "--cacert", &self.ca]);
            let said = host.run(ask.args([url]), REQUEST);
            // Anonymous users may read the health endpoints, and nothing else.
            if said.is_ok_and(|output| output.text() == "ok") {
                return Some(Ok(()));
            }
            // Polling every few milliseconds would make curl the machine's main load.
            std::thread::sleep(PAUSE);
            None
        });
        ready
            .and_then(|ended| ended)
            .with_context(|| self.log_tails())
    }

    pub(super) fn kill_api_server(&mut self) -> Result<()> {
        self.api.kill().map(drop)
    }

    pub(super) fn start_api_server(&mut self, host: &Host) -> Result<()> {
        let command = self.programs.command("kube-apiserver").args(&self.api_args);
        self.api = host.spawn(command)?;
        self.wait_ready(host)
    }

    pub(super) fn pause_api_server(&self, pause: bool) -> Result<()> {
        let signal = if pause { libc::SIGSTOP } else { libc::SIGCONT };
        self.api.signal(signal)
    }

    /// Compacts etcd through its JSON gateway, which needs no etcd client.
    pub(super) fn compact(&self, host: &Host) -> Result<u64> {
        let ask = |path: &str, body: String| -> Result<serde_json::Value> {
            let url = format!("http://{LOCAL}:{}/v3/kv/{path}", self.etcd_port);
            let post = Cmd::new("curl").args(["--silent", "--fail", "--data", &body, &url]);
            host.run(post, REQUEST)?.ok()?.json()
        };
        // "AA==" is the key of one zero byte, which does not exist.
        let state = ask("range", r#"{"key": "AA=="}"#.to_owned())?;
        let revision = state.pointer("/header/revision").and_then(|r| r.as_str());
        let revision = revision.context("etcd returned no revision")?.to_owned();
        ask(
            "compaction",
            format!(r#"{{"revision": "{revision}", "physical": true}}"#),
        )?;
        Ok(revision.parse()?)
    }

    pub(super) fn log_tails(&self) -> String {
        let all = [&self.etcd, &self.api].into_iter().chain(&self.others);
        let tails = all.map(|server| format!("{}:\n{}", server.log().display(), server.log_tail()));
        tails.collect::<Vec<_>>().join("\n")
    }

    pub(super) fn api_server_resident(&self) -> Result<u64> {
        self.api.resident_bytes()
    }
}

/// Returns ports on which nothing in the namespace listens.
fn free_ports<const N: usize>(host: &Host) -> Result<[u16; N]> {
    let ports = host.in_ns(|| {
        let held: Vec<TcpListener> = (0..N)
            .map(|_| TcpListener::bind((LOCAL, 0)))
            .collect::<Result<_, _>>()?;
        let ports = held.iter().map(|one| Ok(one.local_addr()?.port()));
        ports.collect::<Result<Vec<u16>>>()
    })?;
    match ports.try_into() {
        Ok(ports) => Ok(ports),
        Err(ports) => bail!("expected {N} free ports, got {ports:?}"),
    }
}

fn etcd(programs: &Programs, dir: &Path, port: u16, peers: u16) -> Cmd {
    let (clients, peers) = (
        format!("http://{LOCAL}:{port}"),
        format!("http://{LOCAL}:{peers}"),
    );
    programs.command("etcd").args([
        "--name=test".to_owned(),
        format!("--data-dir={}", dir.join("etcd").display()),
        // The test's data need not survive a crash of the machine.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
        format!("--listen-client-urls={clients}"),
        format!("--advertise-client-urls={clients}"),
        format!("--listen-peer-urls={peers}"),
        format!("--initial-advertise-peer-urls={peers}"),
        format!("--initial-cluster=test={peers}"),
    ])
}

fn api_args(pki: &Pki, address: IpAddr, (port, etcd_port): (u16, u16)) -> Vec<String> {
    let file = |name: &str| pki.path(name).display().to_string();
    vec![
        format!("--etcd-servers=http://{LOCAL}:{etcd_port}"),
        format!("--bind-address={address}"),
        format!("--advertise-address={address}"),
        format!("--secure-port={port}"),
        format!("--tls-cert-file={}", file("apiserver.crt")),
        format!("--tls-private-key-file={}", file("apiserver.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        format!("--service-account-key-file={}", file("sa.pub")),
        "--service-cluster-ip-range=10.96.0.0/12,fd00:96::/112".to_owned(),
        "--allow-privileged=true".to_owned(),
        format!(
            "--kubelet-client-certificate={}",
            file("kubelet-client.crt")
        ),
        format!("--kubelet-client-key={}", file("kubelet-client.key")),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        // Tests use no aggregated APIs, and storage metrics cost memory.
        "--profiling=false".to_owned(),
    ]
}

fn controller_args(pki: &Pki, url: &str, wanted: &Builder) -> Result<Vec<String>> {
    let config = pki.client(url, "system:kube-controller-manager", None)?;
    let file = |name: &str| pki.path(name).display().to_string();
    let mut args = vec![
        format!("--kubeconfig={}", config.display()),
        "--leader-elect=false".to_owned(),
        "--secure-port=0".to_owned(),
        format!("--service-account-private-key-file={}", file("sa.key")),
        format!("--root-ca-file={}", file("ca.crt")),
        "--use-service-account-credentials=true".to_owned(),
        format!("--cluster-signing-cert-file={}", file("ca.crt")),
        format!("--cluster-signing-key-file={}", file("ca.key")),
    ];
    if wanted.controller_flags.is_empty() {
        args.push("--controllers=*,-node-lifecycle-controller".to_owned());
    }
    args.extend(wanted.controller_flags.iter().cloned());
    Ok(args)
}
