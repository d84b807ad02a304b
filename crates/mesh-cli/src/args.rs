// SPDX-License-Identifier: Apache-2.0
//! The command-line arguments.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use mesh_api::truth::Known;
use mesh_plan::cluster::Transport;

/// Queries the mesh agent of a node, and evaluates policy without a cluster.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Evaluates policy from manifests, with the compiler of the agents.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Shows the status of the agent on this node.
    Status(Status),
    /// Shows the plan of the agent on this node: the desired content of the kernel's maps.
    Dump(Dump),
    /// Shows the pods of this node, as JSON.
    Pods(Agent),
    /// Shows the most recent connections, one JSON object per line.
    Flows(Agent),
}

impl Command {
    /// The exit code of a command that fails: 2 for invalid input, 1 for an agent that does not answer.
    pub(crate) fn failure(&self) -> u8 {
        match self {
            Self::Policy(_) => 2,
            Self::Status(_) | Self::Dump(_) | Self::Pods(_) | Self::Flows(_) => 1,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Runs truth tables: connections that must be allowed or denied. Exit code 1 if a check fails, 2 if
    /// a check is invalid.
    Test(Test),
    /// Explains the policy decision for one connection, rule by rule. Exit code 1 if it is refused.
    Explain(Explain),
    /// Shows which open or recent connections new manifests would decide differently. Exit code 1 if
    /// there are any.
    Diff(Diff),
    /// Shows which pods can connect to which, and on which ports.
    Matrix(Matrix),
}

/// Arguments of `policy test`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Test {
    /// Files with truth tables, in YAML or JSON; a file may contain a list of tables.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// The maximum number of failed checks to show for each file.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub(crate) show: usize,
    /// Also list the checks that pass: `holds: PLACE: check NUMBER: NAME: allow|deny`.
    #[arg(long)]
    pub(crate) all: bool,
    /// Do not print warnings and rejected manifests.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Manifests to read.
#[derive(Debug, ClapArgs)]
pub(crate) struct Manifests {
    /// A file or directory of manifests; can be repeated.
    #[arg(short = 'f', long = "file", required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
}

/// Arguments of `policy explain`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Explain {
    #[command(flatten)]
    pub(crate) manifests: Manifests,
    /// The source: NAMESPACE/POD or an IP address.
    #[arg(long, value_name = "PEER")]
    pub(crate) from: String,
    /// The destination: NAMESPACE/POD:PORT or ADDRESS:PORT; PORT is a number or a port name.
    #[arg(long, value_name = "PEER:PORT")]
    pub(crate) to: String,
    /// The protocol.
    #[arg(long, default_value = "TCP", ignore_case = true)]
    pub(crate) protocol: Protocol,
    /// The evidence of the peer's identity; by default, the evidence on the wire.
    #[arg(long)]
    pub(crate) evidence: Option<Evidence>,
}

/// Arguments of `policy diff`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Diff {
    #[command(flatten)]
    pub(crate) manifests: Manifests,
    /// Delete policies that are not in the manifests; by default the manifests are added to the
    /// policies in force, and replace those of the same name.
    #[arg(long)]
    pub(crate) replace: bool,
    /// Read connections from this flow log instead of an agent; pods are those of the manifests.
    #[arg(long, value_name = "FILE")]
    pub(crate) flows: Option<PathBuf>,
    /// The manifests in force now, with --flows; by default, the verdicts in the log.
    #[arg(long, value_name = "PATH", requires = "flows")]
    pub(crate) old: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) agent: Agent,
}

/// Arguments of `policy matrix`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Matrix {
    #[command(flatten)]
    pub(crate) manifests: Manifests,
    /// Show a table for this port only: a number, or a port name of the destination.
    #[arg(long)]
    pub(crate) port: Option<String>,
    /// The protocol.
    #[arg(long, default_value = "TCP", ignore_case = true)]
    pub(crate) protocol: Protocol,
    /// The evidence of the peer's identity; by default, the evidence on the wire.
    #[arg(long)]
    pub(crate) evidence: Option<Evidence>,
    /// Show only connections from or to pods of this namespace.
    #[arg(long, short, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
#[value(rename_all = "UPPER")]
pub(crate) enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Udp => Self::Udp,
            Transport::Sctp => Self::Sctp,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// The evidence of a peer's identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Evidence {
    /// Known by its address.
    #[default]
    Address,
    /// Proven by its certificate.
    Tls,
}

impl From<Known> for Evidence {
    fn from(known: Known) -> Self {
        match known {
            Known::Address => Self::Address,
            Known::Tls => Self::Tls,
        }
    }
}

/// The agent to query.
#[derive(Debug, ClapArgs)]
pub(crate) struct Agent {
    /// The agent's admin socket.
    #[arg(long, default_value = "/run/mesh/agent.sock", value_name = "PATH")]
    pub(crate) socket: PathBuf,
}

/// Arguments of `status`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) agent: Agent,
    /// Print the agent's answer as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `dump`.
#[derive(Debug, ClapArgs)]
pub(crate) struct Dump {
    #[command(flatten)]
    pub(crate) agent: Agent,
}
