// SPDX-License-Identifier: Apache-2.0
//! Configuration of `mesh-agent` and `mesh-controller`: command line, environment and file, in this order,
//! become typed values once. Nothing else in the workspace reads the environment or parses a setting.
//!
//! Every setting is one row of [`FLAGS`]: a flag, a variable `MESH_...` and a key of `--config`. A value that
//! cannot be used is an [`Error`] that says where it came from.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::Port;
use mesh_common::settings::TUNNEL_PORT;

mod controller;
mod flags;
mod values;

pub use controller::ControllerConfig;
pub use flags::{Applies, FLAGS, Flag, reference};
pub use mesh_log::{LogConfig, LogFormat};
pub use values::cgroup2_mount;

use flags::{Program, Values};

/// What `mesh-agent` was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentCommand {
    /// `run`: run the agent of a node.
    Run(Box<Config>),
    /// `check`: probe the kernel and report what is missing.
    Check(HostConfig),
    /// `cleanup`: remove every pin, link, rule and route of the mesh.
    Cleanup(HostConfig),
}

/// What `mesh-controller` was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControllerCommand {
    /// `run`: be the cluster's CA, and write the status of policies.
    Run(Box<ControllerConfig>),
    /// `rotate-root`: ask the controllers to replace the root of the CA.
    RotateRoot(Box<ControllerConfig>),
    /// `uninstall`: remove the mesh from every node of the cluster.
    Uninstall(Box<ControllerConfig>),
}

/// Everything that `mesh-agent run` needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The name of this machine's Node.
    pub node: String,
    /// Where the state of the cluster comes from.
    pub source: Source,
    /// How the Kubernetes API is reached; `None` = as a pod of the cluster.
    pub kubeconfig: Option<PathBuf>,
    /// The proc file system that shows the processes of the machine.
    pub proc: PathBuf,
    /// The container runtime's socket; `None` = it is not asked.
    pub cri_socket: Option<PathBuf>,
    /// Who signs certificates.
    pub ca: Ca,
    /// The trust domain of SPIFFE identities, a DNS name in lower case.
    pub trust_domain: String,
    /// Trust domains that count as the same.
    pub trust_domain_aliases: Vec<String>,
    /// Files of certificate revocation lists.
    pub crls: Vec<PathBuf>,
    /// What the agent takes of the machine.
    pub host: HostConfig,
    /// Where the agent's own state and questions about it are found.
    pub admin: Vec<AdminAddr>,
    /// Where metrics and probes are served.
    pub metrics: SocketAddr,
    /// Where records of connections go.
    pub flow_log: FlowLog,
    /// How long open connections may go on after SIGTERM.
    pub drain: Duration,
    /// Pod CIDRs beside those of Node objects.
    pub pod_cidrs: Vec<IpNet>,
    /// Threads that carry connections.
    pub workers: NonZeroUsize,
    /// The port on which the agents of other nodes are reached.
    pub tunnel_port: TunnelPort,
    /// What a client elsewhere sees of a connection that a pod of this node refuses.
    pub deny: Deny,
    /// Whether the decisions of the kernel programs are logged.
    pub trace_datapath: bool,
    /// Logs.
    pub log: LogConfig,
}

/// What the agent takes of the machine it runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// The cgroup (of the cgroup2 hierarchy) below which sockets are the mesh's.
    pub cgroup: PathBuf,
    /// The BPF file system.
    pub bpffs: PathBuf,
    /// What must survive a restart of the machine: last good objects.
    pub state_dir: PathBuf,
    /// Where the network plug-in is configured.
    pub cni_conf: PathBuf,
    /// Logs.
    pub log: LogConfig,
}

/// Where the state of the cluster comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Manifests in a directory.
    Dir(PathBuf),
    /// The Kubernetes API.
    Kubernetes,
}

/// Who signs certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ca {
    /// A server of the Istio certificate service.
    Grpc(GrpcCa),
    /// Certificates that somebody else puts there.
    Files(PathBuf),
    /// A CA key on this machine: for demos and tests.
    SelfSigned(PathBuf),
}

/// A server of the Istio certificate service, and how it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcCa {
    /// Its URL.
    pub url: String,
    /// The file with the token that it is shown.
    pub token: PathBuf,
    /// The PEM file with the roots of its certificate.
    pub bundle: PathBuf,
    /// What it calls this cluster.
    pub cluster: String,
}

/// Where the admin interface listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddr {
    /// A Unix socket of mode 0600.
    Unix(PathBuf),
    /// A loopback address: every local user may ask.
    Tcp(SocketAddr),
}

/// Where records of connections go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowLog {
    /// Standard output.
    Stdout,
    /// A file, opened again on SIGHUP and when it was renamed.
    File(PathBuf),
    /// Nowhere; metrics count all the same.
    Off,
}

/// On which port tunnels to other nodes arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelPort {
    /// On this one.
    Fixed(Port),
    /// On the application's own, with [`TUNNEL_PORT`] where the network takes the mark away.
    Real,
}

/// What a client elsewhere sees of a connection that a pod of this node refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deny {
    /// A refusal at once.
    Reject,
    /// Nothing.
    Drop,
}

/// Where a value came from, named as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag: `--drain`.
    Flag(&'static str),
    /// A variable of the environment: `MESH_DRAIN`.
    Env(String),
    /// A key of the configuration file.
    File(PathBuf, &'static str),
    /// The default of a flag, which did not fit this machine.
    Default(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "--{name}"),
            Self::Env(name) => f.write_str(name),
            Self::File(path, key) => write!(f, "{}: {key}", path.display()),
            Self::Default(name) => write!(f, "the default of --{name}"),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line itself is wrong, or asks for help.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// A value is wrong.
    #[error("{origin}: {value:?}: {why}")]
    Value {
        /// Where the value came from.
        origin: Origin,
        /// The value.
        value: String,
        /// What is wrong with it, and what is expected.
        why: String,
    },
    /// A setting that has no default is missing.
    #[error(
        "--{name} is missing (or {env}, or the key {name} of --config): {help}",
        env = flags::env_name(name)
    )]
    Missing {
        /// The flag.
        name: &'static str,
        /// What it is.
        help: &'static str,
    },
    /// The file cannot be read.
    #[error("{path}: cannot read the configuration file", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path}: not valid TOML: {source}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// A key of the file is no setting.
    #[error("{path}: unknown key {key:?}; the keys are {known}", path = path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Those that there are.
        known: String,
    },
}

impl Error {
    /// What the process exits with: 0 (help was asked for), 2 usage, 78 configuration
    /// (`EX_CONFIG`, sysexits.h).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(error) => u8::from(error.use_stderr()) * 2,
            Self::Value { .. }
            | Self::Missing { .. }
            | Self::Read { .. }
            | Self::Syntax { .. }
            | Self::UnknownKey { .. } => 78,
        }
    }
}

/// What of the process's surroundings configuration may depend on.
pub trait Surroundings {
    /// A variable of the environment.
    fn env(&self, name: &str) -> Option<String>;
    /// `/proc/self/mountinfo`, where the default of `--cgroup` is found.
    fn mountinfo(&self) -> std::io::Result<String>;
    /// How many threads can run at once: the default of `--workers`.
    fn parallelism(&self) -> NonZeroUsize;
}

/// The real surroundings.
#[derive(Clone, Copy, Debug)]
pub struct Process;

impl Surroundings for Process {
    fn env(&self, name: &str) -> Option<String> {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the door it must go through"
        )]
        std::env::var(name).ok()
    }

    fn mountinfo(&self) -> std::io::Result<String> {
        std::fs::read_to_string("/proc/self/mountinfo")
    }

    fn parallelism(&self) -> NonZeroUsize {
        std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
    }
}

/// Parses the command line of `mesh-controller`, with the program's name first.
///
/// # Errors
/// What is wrong, and where it came from; [`Error::exit_code`] is what the process exits with.
pub fn parse_controller(
    args: impl IntoIterator<Item = OsString>,
    around: &impl Surroundings,
) -> Result<ControllerCommand, Error> {
    let (subcommand, mut values) = Values::gather(Program::Controller, args, around)?;
    let log = log(&mut values)?;
    let config = controller::parse(values, around, log)?;
    Ok(match &*subcommand {
        "rotate-root" => ControllerCommand::RotateRoot(config),
        "uninstall" => ControllerCommand::Uninstall(config),
        _ => ControllerCommand::Run(config),
    })
}

fn log(values: &mut Values) -> Result<LogConfig, Error> {
    Ok(LogConfig {
        format: values.required("log", values::log_format)?,
        level: values.required("log-level", values::log_level)?,
    })
}

/// Parses the command line of `mesh-agent`, with the program's name first.
///
/// # Errors
/// What is wrong, and where it came from; [`Error::exit_code`] is what the process exits with.
pub fn parse_agent(
    args: impl IntoIterator<Item = OsString>,
    around: &impl Surroundings,
) -> Result<AgentCommand, Error> {
    let (subcommand, mut values) = Values::gather(Program::Agent, args, around)?;
    let log = log(&mut values)?;
    let host = HostConfig {
        cgroup: match values.optional("cgroup", values::directory)? {
            Some(path) => path,
            None => default_cgroup(around)?,
        },
        bpffs: values.required("bpffs", values::path)?,
        state_dir: values.required("state-dir", values::path)?,
        cni_conf: values.required("cni-conf", values::path)?,
        log: log.clone(),
    };
    match &*subcommand {
        "check" => return Ok(AgentCommand::Check(host)),
        "cleanup" => return Ok(AgentCommand::Cleanup(host)),
        _ => {}
    }
    let config = Config {
        node: values.required("node", values::dns_name)?,
        source: values.required("source", values::source)?,
        kubeconfig: kubeconfig(&mut values, around)?,
        proc: values.required("proc", values::path)?,
        cri_socket: values.optional("cri-socket", values::path)?,
        ca: ca(&mut values)?,
        trust_domain: values.required("trust-domain", values::dns_name)?,
        trust_domain_aliases: values.list("trust-domain-alias", values::dns_name)?,
        crls: values.list("crl", values::path)?,
        host,
        admin: values.list("admin", values::admin)?,
        metrics: values.required("metrics", values::socket_addr)?,
        flow_log: values.required("flow-log", values::flow_log)?,
        drain: values.required("drain", values::duration)?,
        pod_cidrs: values.list("pod-cidr", values::cidr)?,
        workers: values
            .optional("workers", values::count)?
            .unwrap_or_else(|| around.parallelism()),
        tunnel_port: values.required("tunnel-port", values::tunnel_port)?,
        deny: values.required("deny", values::deny)?,
        trace_datapath: values.required("trace-datapath", values::trace_datapath)?,
        log,
    };
    debug_assert!(
        values.is_empty(),
        "a setting that nothing reads: {values:?}"
    );
    Ok(AgentCommand::Run(Box::new(config)))
}

fn kubeconfig(values: &mut Values, around: &impl Surroundings) -> Result<Option<PathBuf>, Error> {
    Ok(match values.optional("kubeconfig", values::path)? {
        Some(path) => Some(path),
        None => around
            .env("KUBECONFIG")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
    })
}

fn ca(values: &mut Values) -> Result<Ca, Error> {
    let token = values.required("ca-token", values::path)?;
    let bundle = values.required("ca-bundle", values::path)?;
    let cluster = values.required("ca-cluster", values::name)?;
    Ok(match values.required("ca", values::ca)? {
        values::WhichCa::Files(path) => Ca::Files(path),
        values::WhichCa::SelfSigned(path) => Ca::SelfSigned(path),
        values::WhichCa::Grpc(url) => Ca::Grpc(GrpcCa {
            url,
            token,
            bundle,
            cluster,
        }),
    })
}

fn default_cgroup(around: &impl Surroundings) -> Result<PathBuf, Error> {
    let fail = |why: String| Error::Value {
        origin: Origin::Default("cgroup"),
        value: "/proc/self/mountinfo".to_owned(),
        why,
    };
    let mountinfo = around
        .mountinfo()
        .map_err(|error| fail(format!("cannot be read: {error}")))?;
    cgroup2_mount(&mountinfo).ok_or_else(|| {
        fail("no cgroup2 file system is mounted; mount one, or name one with --cgroup".to_owned())
    })
}

#[cfg(test)]
mod tests;
