// SPDX-License-Identifier: Apache-2.0
//! The agent of a node: the `mesh-agent` binary in the node's namespace and cgroup, with its own
//! BPF file system, state directory, sockets and log.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::node::Node;
use crate::process::{Cmd, Output, Proc};
use crate::programs;
use crate::wait::eventually;

/// Port on which the agent serves metrics and health probes.
pub(crate) const METRICS_PORT: u16 = 15020;
const PROBES_PORT: u16 = 15021;

/// Options for starting an agent; options that are not set have the lab node's defaults.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    binary: Option<PathBuf>,
    ca: String,
    source: Option<String>,
    trust_domain: String,
    cgroup: Option<PathBuf>,
    admin: Option<PathBuf>,
    metrics: SocketAddr,
    extra: Vec<OsString>,
    log_level: String,
    ready_within: Duration,
}

impl AgentConfig {
    /// Sets the issuer, e.g. `self:/tmp/x/ca` (one directory for all nodes) or `files:DIR`.
    #[must_use]
    pub fn new(ca: &str) -> Self {
        Self {
            binary: None,
            ca: ca.to_owned(),
            source: None,
            trust_domain: "cluster.local".to_owned(),
            cgroup: None,
            admin: None,
            metrics: SocketAddr::from((Ipv6Addr::UNSPECIFIED, METRICS_PORT)),
            extra: Vec::new(),
            log_level: "info".to_owned(),
            ready_within: Duration::from_secs(20),
        }
    }

    /// Sets the agent binary (default: the one that [`programs::agent`] finds).
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }

    /// Sets the configuration source, e.g. `kubernetes` (default: the lab's manifests).
    #[must_use]
    pub fn source(mut self, source: &str) -> Self {
        self.source = Some(source.to_owned());
        self
    }

    /// Sets the trust domain (default: `cluster.local`).
    #[must_use]
    pub fn trust_domain(mut self, domain: &str) -> Self {
        domain.clone_into(&mut self.trust_domain);
        self
    }

    /// Sets the cgroup to attach to (default: the node's root cgroup).
    #[must_use]
    pub fn cgroup(mut self, path: impl Into<PathBuf>) -> Self {
        self.cgroup = Some(path.into());
        self
    }

    /// Adds a flag with its value.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: impl Into<OsString>) -> Self {
        self.extra.extend([OsString::from(flag), value.into()]);
        self
    }

    /// Adds a flag without a value.
    #[must_use]
    pub fn switch(mut self, flag: &str) -> Self {
        self.extra.push(OsString::from(flag));
        self
    }

    /// Sets `--log-level` (default: `info`).
    #[must_use]
    pub fn log_level(mut self, level: &str) -> Self {
        level.clone_into(&mut self.log_level);
        self
    }

    /// Sets the deadline for the agent to become ready (default: 20 s).
    #[must_use]
    pub fn ready_within(mut self, deadline: Duration) -> Self {
        self.ready_within = deadline;
        self
    }

    /// Returns the command with the options that all subcommands of the binary share.
    fn host_command(&self, node: &Node, subcommand: &str) -> Result<Cmd> {
        let binary = self.binary.clone().map_or_else(programs::agent, Ok)?;
        let cgroup = self.cgroup.as_deref().unwrap_or(node.root_cgroup());
        let state = state_dir(node);
        std::fs::create_dir_all(&state)?;
        Ok(Cmd::new(binary)
            .args([subcommand, "--log-level", &self.log_level])
            .args([OsStr::new("--cgroup"), cgroup.as_os_str()])
            .args([OsStr::new("--bpffs"), node.bpffs().as_os_str()])
            .args([OsStr::new("--state-dir"), state.as_os_str()])
            .env("RUST_BACKTRACE", "1"))
    }

    fn admin_socket(&self, node: &Node) -> PathBuf {
        let default = || node.agent_host().dir().join("agent.sock");
        self.admin.clone().unwrap_or_else(default)
    }

    fn command(&self, node: &Node) -> Result<Cmd> {
        let manifests = format!("dir:{}", node.manifests().display());
        let pairs = [
            ("--node", node.name().to_owned()),
            ("--source", self.source.clone().unwrap_or(manifests)),
            ("--ca", self.ca.clone()),
            ("--trust-domain", self.trust_domain.clone()),
            ("--admin", self.admin_socket(node).display().to_string()),
            ("--metrics", self.metrics.to_string()),
            ("--flow-log", format!("file:{}", flow_log(node).display())),
        ];
        let pairs = pairs
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_owned(), value]);
        Ok(self
            .host_command(node, "run")?
            .args(pairs)
            .args(&self.extra))
    }
}

fn state_dir(node: &Node) -> PathBuf {
    node.agent_host().dir().join("state")
}

fn flow_log(node: &Node) -> PathBuf {
    node.agent_host().dir().join("flows.jsonl")
}

/// A running agent. Drop kills it with SIGKILL; its kernel state stays until the lab is removed.
pub struct Agent {
    node: Arc<Node>,
    config: AgentConfig,
    process: Proc,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "agent of {} (pid {})",
            self.node.name(),
            self.process.id()
        )
    }
}

impl Agent {
    /// Runs another subcommand of the agent binary to its end, e.g. `check` or `cleanup`, with the
    /// same cgroup, BPF file system and state directory as the agent.
    ///
    /// # Errors
    /// The subcommand cannot be started or has not exited within `deadline`.
    pub fn run_subcommand(
        node: &Node,
        config: &AgentConfig,
        subcommand: &str,
        deadline: Duration,
    ) -> Result<Output> {
        node.agent_host()
            .run(config.host_command(node, subcommand)?, deadline)
    }

    pub(crate) fn start(node: Arc<Node>, config: AgentConfig) -> Result<Self> {
        let process = node.agent_host().spawn(config.command(&node)?)?;
        let mut agent = Self {
            node,
            config,
            process,
        };
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts a successor while this agent runs, waits until the successor is ready, and returns
    /// the old process, which the caller has to stop.
    ///
    /// # Errors
    /// The successor does not become ready; `self` is then still the old agent.
    pub fn succeed(&mut self) -> Result<Proc> {
        let command = self.config.command(&self.node)?;
        let old = std::mem::replace(&mut self.process, self.node.agent_host().spawn(command)?);
        match self.wait_ready() {
            Ok(()) => Ok(old),
            Err(e) => {
                self.process = old;
                Err(e)
            }
        }
    }

    /// As [`Agent::succeed`], with a successor that has another admin socket.
    ///
    /// # Errors
    /// The successor does not become ready; `self` is then still the old agent.
    pub fn succeed_at(&mut self, admin: PathBuf) -> Result<Proc> {
        let before = self.config.admin.replace(admin);
        let old = self.succeed();
        if old.is_err() {
            self.config.admin = before;
        }
        old
    }

    fn wait_ready(&mut self) -> Result<()> {
        let what = format!("agent of {} to be ready", self.node.name());
        let ready = eventually(&what, self.config.ready_within, || {
            match self.process.ended() {
                Ok(None) => self
                    .get("/readyz")
                    .ok()
                    .filter(|(code, _)| *code == 200)
                    .map(|_| Ok(())),
                Ok(Some(status)) => Some(Err(anyhow::anyhow!("the agent exited: {status}"))),
                Err(e) => Some(Err(e)),
            }
        });
        ready.and_then(|ended| ended).with_context(|| {
            format!(
                "{what}; {}:\n{}",
                self.process.log().display(),
                self.process.log_tail()
            )
        })
    }

    /// Returns the node that the agent serves.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Returns the agent's process.
    #[must_use]
    pub fn process(&self) -> &Proc {
        &self.process
    }

    /// Returns the agent's `--state-dir`.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        state_dir(&self.node)
    }

    /// Returns the path of the agent's admin socket.
    #[must_use]
    pub fn admin(&self) -> PathBuf {
        self.config.admin_socket(&self.node)
    }

    /// Returns the path of the agent's flow log, which has one JSON object per line.
    #[must_use]
    pub fn flow_log(&self) -> PathBuf {
        flow_log(&self.node)
    }

    /// Returns the flow records written so far.
    ///
    /// # Errors
    /// The flow log does not exist, or a complete line of it is not JSON.
    pub fn flows(&self) -> Result<Vec<serde_json::Value>> {
        let path = self.flow_log();
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let whole = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        whole.map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Kills the agent with SIGKILL and waits for it to exit.
    ///
    /// # Errors
    /// The process does not exit.
    pub fn kill_9(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Sends SIGTERM and waits for the agent to exit.
    ///
    /// # Errors
    /// The agent has not exited within `deadline`, or its exit status is not 0.
    pub fn terminate(&mut self, deadline: Duration) -> Result<()> {
        self.process.signal(libc::SIGTERM)?;
        let status = self.process.wait(deadline)?;
        if !status.success() {
            bail!(
                "the agent exited with {status}:\n{}",
                self.process.log_tail()
            );
        }
        Ok(())
    }

    /// Starts the agent again after it has exited and waits until it is ready.
    ///
    /// # Errors
    /// The agent does not become ready.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = self
            .node
            .agent_host()
            .spawn(self.config.command(&self.node)?)?;
        self.wait_ready()
    }

    /// Sends a GET request to the agent's metrics port from the node and returns the status code
    /// and the body.
    ///
    /// # Errors
    /// The agent does not answer, or the answer is not HTTP.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, self.config.metrics.port()));
        self.node.in_ns(|| http_get(to, path))
    }

    /// Asks for a page of the listener of probes, as the kubelet does. Returns the status code.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn probe(&self, path: &str) -> Result<u16> {
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, PROBES_PORT));
        let (code, _) = self.node.in_ns(|| http_get(to, path))?;
        Ok(code)
    }

    /// Returns the agent's `/metrics` page.
    ///
    /// # Errors
    /// The agent does not answer with status 200.
    pub fn metrics(&self) -> Result<String> {
        match self.get("/metrics")? {
            (200, page) => Ok(page),
            (code, body) => bail!("/metrics answered {code}: {body}"),
        }
    }

    /// Returns the last lines of the agent's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::lab::complain(&format_args!(
                "end of the log of {self:?}:\n{}",
                self.log_tail()
            ));
        }
    }
}

/// Timeout of an HTTP request to an agent.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Sends a GET request on a new connection and returns the status code and the body.
pub(crate) fn http_get(to: SocketAddr, path: &str) -> Result<(u16, String)> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    http_get_on(stream, path)
}

/// Sends an HTTP/1.0 GET request on `stream`; the body ends when the server closes the connection.
pub(crate) fn http_get_on(mut stream: impl Read + Write, path: &str) -> Result<(u16, String)> {
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the HTTP header is incomplete")?;
    let code = head
        .split(' ')
        .nth(1)
        .context("the HTTP answer has no status code")?;
    Ok((code.parse()?, body.to_owned()))
}
