// SPDX-License-Identifier: Apache-2.0
//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use mesh_api::truth::Known;
use mesh_plan::cluster::Transport;

/// Asks the mesh's agents, and tries policy out without a cluster.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Policy, from manifests, with the compiler that the agents use.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// How the agent of this node is.
    Status(Status),
    /// What the agent of this node wants the kernel to hold.
    Dump(Dump),
    /// The pods of this node, as JSON.
    Pods(Agent),
    /// The latest connections, one JSON object a line.
    Flows(Agent),
}

impl Command {
    /// The exit code when the command cannot be run: bad input is 2, an agent that cannot be asked
    /// 1.
    pub(crate) fn failure(&self) -> u8 {
        match self {
            Self::Policy(_) => 2,
            Self::Status(_) | Self::Dump(_) | Self::Pods(_) | Self::Flows(_) => 1,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Runs truth tables: who must reach whom, and who must not. Exit code 1 if a row is wrong, 2 if one
    /// cannot be asked.
    Test(Test),
    /// Says in words what policy does with one connection, and by which rule. Exit code 1 if it is
    /// refused.
    Explain(Explain),
    /// Says which connections, open or seen lately, new manifests would decide otherwise. Exit code 1
    /// if there are some.
    Diff(Diff),
    /// Says who reaches whom, and on which ports.
    Matrix(Matrix),
}

/// Runs truth tables.
#[derive(Debug, ClapArgs)]
pub(crate) struct Test {
    /// Tables, in YAML or JSON; a file may hold a list of them.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Show at most this many wrong rows of each file.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub(crate) show: usize,
    /// Name the rows that hold, too: `holds: PLACE: check NUMBER: NAME: allow|deny`.
    #[arg(long)]
    pub(crate) all: bool,
    /// Say nothing about manifests that are odd or rejected.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Where manifests are.
#[derive(Debug, ClapArgs)]
pub(crate) struct Manifests {
    /// A file or directory of manifests; may be given more than once.
    #[arg(short = 'f', long = "file", required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
}

/// Says what policy does with one connection.
#[derive(Debug, ClapArgs)]
pub(crate) struct Explain {
    #[command(flatten)]
    pub(crate) manifests: Manifests,
    /// Who connects: NAMESPACE/POD or an address.
    #[arg(long, value_name = "WHO")]
    pub(crate) from: String,
    /// To what: NAMESPACE/POD:PORT or ADDRESS:PORT; PORT is a number or a port's name.
    #[arg(long, value_name = "WHO:PORT")]
    pub(crate) to: String,
    /// The protocol.
    #[arg(long, default_value = "TCP", ignore_case = true)]
    pub(crate) protocol: Protocol,
    /// How the other end is known; without it, as it would be on the wire.
    #[arg(long)]
    pub(crate) evidence: Option<Evidence>,
}

/// Says what new manifests would change.
#[derive(Debug, ClapArgs)]
pub(crate) struct Diff {
    #[command(flatten)]
    pub(crate) manifests: Manifests,
    /// These manifests hold all policies there are to be; without it they are added to the others, in
    /// place of those of the same name.
    #[arg(long)]
    pub(crate) replace: bool,
    /// Ask no agent: the connections of this flow log, between pods of the manifests.
    #[arg(long, value_name = "FILE")]
    pub(crate) flows: Option<PathBuf>,
    /// What is in force now, with --flows; without it, what the log says of each connection.
    #[arg(long, value_name = "PATH", requires = "flows")]
    pub(crate) old: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) agent: Agent,
}

/// Says who reaches whom.
#[derive(Debug, ClapArgs)]
pub(crate) struct Matrix {
    #[command(flatten)]
    pub(crate) manifests: Manifests,
    /// Only about this port, as a table: a number, or the name that a destination gives it.
    #[arg(long)]
    pub(crate) port: Option<String>,
    /// The protocol.
    #[arg(long, default_value = "TCP", ignore_case = true)]
    pub(crate) protocol: Protocol,
    /// How the other end is known; without it, as it would be on the wire.
    #[arg(long)]
    pub(crate) evidence: Option<Evidence>,
    /// Only about pods of this namespace, at either end.
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

/// How the other end is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Evidence {
    /// By its address.
    #[default]
    Address,
    /// By its certificate.
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

/// Which agent.
#[derive(Debug, ClapArgs)]
pub(crate) struct Agent {
    /// The agent's admin socket.
    #[arg(long, default_value = "/run/mesh/agent.sock", value_name = "PATH")]
    pub(crate) socket: PathBuf,
}

/// How the agent is.
#[derive(Debug, ClapArgs)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) agent: Agent,
    /// As the agent says it.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What the agent wants the kernel to hold.
#[derive(Debug, ClapArgs)]
pub(crate) struct Dump {
    #[command(flatten)]
    pub(crate) agent: Agent,
}
