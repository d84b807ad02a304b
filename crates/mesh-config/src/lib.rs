// SPDX-License-Identifier: Apache-2.0
//! The configuration of `mesh-agent` and `mesh-controller`: parses command line, environment and file into typed
//! values. Nothing else in the workspace reads the environment or parses a setting.
//!
//! Each setting is one row of [`FLAGS`]: a flag, a variable `MESH_...` and a key of the file `--config`. An invalid
//! value is an [`Error`] that states the origin of the value.

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

/// A subcommand of `mesh-agent` with its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentCommand {
    /// `run`: runs the agent of a node.
    Run(Box<Config>),
    /// `check`: tests the features of this node and reports missing ones.
    Check(HostConfig),
    /// `cleanup`: removes all pins, links, rules and routes of the mesh from this node.
    Cleanup(HostConfig),
}

/// A subcommand of `mesh-controller` with its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControllerCommand {
    /// `run`: runs the cluster's CA, and writes the status of policies.
    Run(Box<ControllerConfig>),
    /// `rotate-root`: asks the controllers to replace the CA's root certificate.
    RotateRoot(Box<ControllerConfig>),
    /// `uninstall`: removes the mesh from all nodes of the cluster.
    Uninstall(Box<ControllerConfig>),
}

/// The configuration of `mesh-agent run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The name of this machine's Node object.
    pub node: String,
    /// The source of cluster objects.
    pub source: Source,
    /// The kubeconfig file; `None` = the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The proc file system with the host's processes.
    pub proc: PathBuf,
    /// The CRI socket of the container runtime; `None` = not used.
    pub cri_socket: Option<PathBuf>,
    /// The CA that issues certificates.
    pub ca: Ca,
    /// The trust domain of SPIFFE identities, a DNS name in lower case.
    pub trust_domain: String,
    /// Trust domains whose identities are treated as identities of `trust_domain`.
    pub trust_domain_aliases: Vec<String>,
    /// The files of certificate revocation lists.
    pub crls: Vec<PathBuf>,
    /// The paths of this machine.
    pub host: HostConfig,
    /// The listening addresses of the admin interface.
    pub admin: Vec<AdminAddr>,
    /// The listening address of metrics and probes.
    pub metrics: SocketAddr,
    /// The listening address of probes, which pods cannot reach.
    pub probes: SocketAddr,
    /// The destination of flow records.
    pub flow_log: FlowLog,
    /// The time for which open connections can continue after SIGTERM.
    pub drain: Duration,
    /// Pod CIDRs in addition to those in Node objects.
    pub pod_cidrs: Vec<IpNet>,
    /// The number of proxy threads.
    pub workers: NonZeroUsize,
    /// The destination port of tunnels to other nodes.
    pub tunnel_port: TunnelPort,
    /// The handling of connections that policy denies.
    pub deny: Deny,
    /// Whether each decision of the eBPF programs is logged.
    pub trace_datapath: bool,
    /// The log configuration.
    pub log: LogConfig,
}

/// The paths of the machine that all subcommands of `mesh-agent` use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// The cgroup2 directory that contains the cgroups of all pods.
    pub cgroup: PathBuf,
    /// The mount point of the BPF file system.
    pub bpffs: PathBuf,
    /// The directory for state that must survive a reboot: the last valid objects.
    pub state_dir: PathBuf,
    /// The configuration directory of CNI plugins.
    pub cni_conf: PathBuf,
    /// The log configuration.
    pub log: LogConfig,
}

/// The source of cluster objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Manifests in a directory.
    Dir(PathBuf),
    /// The Kubernetes API.
    Kubernetes,
}

/// The CA that issues certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ca {
    /// A server of the Istio certificate service.
    Grpc(GrpcCa),
    /// A directory of certificates that another program renews.
    Files(PathBuf),
    /// A directory with a CA key on this machine, for demos and tests.
    SelfSigned(PathBuf),
}

/// A server of the Istio certificate service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcCa {
    /// The URL.
    pub url: String,
    /// The file with the agent's token.
    pub token: PathBuf,
    /// The PEM file with the roots of the serving certificate.
    pub bundle: PathBuf,
    /// The name of this cluster at the CA.
    pub cluster: String,
}

/// A listening address of the admin interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddr {
    /// A Unix socket of mode 0600.
    Unix(PathBuf),
    /// A loopback address, which all local users can access.
    Tcp(SocketAddr),
}

/// The destination of flow records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowLog {
    /// Standard output.
    Stdout,
    /// A file, reopened on SIGHUP and after it was renamed.
    File(PathBuf),
    /// No flow records; metrics still count connections.
    Off,
}

/// The destination port of tunnels to other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelPort {
    /// A fixed port.
    Fixed(Port),
    /// The application's own port, or [`TUNNEL_PORT`] if the network removes the TCP option that marks a tunnel.
    Real,
}

/// The handling of connections that policy denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deny {
    /// Rejects the connection at once.
    Reject,
    /// Drops packets silently.
    Drop,
}

/// The origin of a value, displayed as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag: `--drain`.
    Flag(&'static str),
    /// An environment variable: `MESH_DRAIN`.
    Env(String),
    /// A key in the configuration file.
    File(PathBuf, &'static str),
    /// The default of a flag, which is not valid on this machine.
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

/// Why the configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is invalid or requests help.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// A value is invalid.
    #[error("{origin}: {value:?}: {why}")]
    Value {
        /// The origin of the value.
        origin: Origin,
        /// The value.
        value: String,
        /// The reason, with the expected format.
        why: String,
    },
    /// A required setting is missing.
    #[error(
        "--{name} is required (or {env}, or the key {name} in the file --config): {help}",
        env = flags::env_name(name)
    )]
    Missing {
        /// The flag.
        name: &'static str,
        /// The description of the setting.
        help: &'static str,
    },
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not valid TOML.
    #[error("{path}: not valid TOML: {source}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<toml::de::Error>,
    },
    /// A key in the file is not a setting.
    #[error("{path}: unknown key {key:?}; valid keys are {known}", path = path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The valid keys.
        known: String,
    },
}

impl Error {
    /// Returns the exit code: 0 for help, 2 for a usage error, 78 for an invalid configuration (`EX_CONFIG`,
    /// sysexits.h).
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

/// The environment of the process from which defaults and values are read.
pub trait Surroundings {
    /// Returns an environment variable.
    fn env(&self, name: &str) -> Option<String>;
    /// Returns the content of `/proc/self/mountinfo`, which determines the default of `--cgroup`.
    fn mountinfo(&self) -> std::io::Result<String>;
    /// Returns the number of available CPUs, the default of `--workers`.
    fn parallelism(&self) -> NonZeroUsize;
}

/// The environment of the current process.
#[derive(Clone, Copy, Debug)]
pub struct Process;

impl Surroundings for Process {
    fn env(&self, name: &str) -> Option<String> {
        #[expect(
            clippy::disallowed_methods,
            reason = "all access to environment variables is here"
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
/// The configuration is invalid; [`Error::exit_code`] returns the exit code of the process.
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
/// The configuration is invalid; [`Error::exit_code`] returns the exit code of the process.
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
        probes: values.required("probes", values::socket_addr)?,
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
    debug_assert!(values.is_empty(), "unused settings: {values:?}");
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
        fail(
            "no cgroup2 file system is mounted; mount one, or set its path with --cgroup"
                .to_owned(),
        )
    })
}

#[cfg(test)]
mod tests;
