// SPDX-License-Identifier: Apache-2.0
//! What the mesh costs: the same programs with and without it, in turns on one machine.
//!
//! Two equal labs: `plain` has no agents, `mesh` has one on each node, started as the demo starts
//! them. Every figure is a ratio of two runs that followed each other; rounds give its spread.
//! Nothing here sets anything of the mesh that a user would not set.

mod config;
mod datapath;
mod kube;
mod load;
mod measure;
mod report;
mod testbed;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub use config::Config;
pub use kube::{Report as KubeReport, Row as KubeRow};
pub use load::{Client, Done, Histogram, Program, Scheduling, Shape};
pub use measure::{Cpu, Sample};
pub use report::{Pair, Report, Row};

use crate::topology::Topology;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Group {
    /// Everything but `kube`
    All,
    /// Bulk, rr and crr
    Datapath,
    /// Bulk transfers
    Bulk,
    /// Small requests on long connections
    Rr,
    /// Short connections
    Crr,
    /// One agent in a large cluster
    Kube,
}

/// Where client and server are.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Scenario {
    /// Two pods of one node.
    SameNode,
    /// Pods of two nodes.
    CrossNode,
}

impl Scenario {
    /// All, in the order in which they are run.
    pub const ALL: [Self; 2] = [Self::SameNode, Self::CrossNode];

    /// As in rows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same_node",
            Self::CrossNode => "cross_node",
        }
    }
}

/// What is asked of the bench.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    pub group: Group,
    /// Rounds; each runs everything once plain and once meshed
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Seconds of each run (else: 10, in the group kube 30; of short connections 31, so that ports whose connection was
    /// closed at the beginning are still taken at the end, as in production)
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Seconds for which agents are left alone before their idle memory is read, and in the group
    /// kube their idle CPU time, too (else: 25, in the group kube 10)
    #[arg(long)]
    pub idle: Option<f64>,
    /// Write the results to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Print every run
    #[arg(long)]
    pub verbose: bool,
    /// Only this scenario
    #[arg(long, value_enum)]
    pub scenario: Option<Scenario>,
    /// Only this metric, e.g. `rr_16`; may be repeated
    #[arg(long)]
    pub metric: Vec<String>,
    /// Pods joined by bridges, as flannel does; else routed, as Calico does
    #[arg(long)]
    pub bridged: bool,
    /// NetworkPolicies that select the pods; 0: pods are not isolated
    #[arg(long, default_value_t = 50)]
    pub policies: u16,
    /// Let the programs of both labs go before all others of the machine: for one that is not idle
    #[arg(long)]
    pub ahead: bool,
    /// Run the second lab without agents, too: its ratios show what this machine can tell apart
    #[arg(long)]
    pub control: bool,
    /// Pods of the group kube; nodes, services and policies in proportion
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pods: u32,
}

impl Options {
    /// The time for which agents are left alone.
    fn idle(&self, default: Duration) -> Duration {
        self.idle.map_or(default, Duration::from_secs_f64)
    }

    /// Shape of both labs.
    #[must_use]
    pub fn topology(&self) -> Topology {
        if self.bridged {
            Topology::Bridged
        } else {
            Topology::Routed
        }
    }
}

/// What was found, by the shape of its rows.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(untagged)]
pub enum Found {
    /// Ratios of the mesh to no mesh.
    Datapath(Report),
    /// Figures of one agent.
    Kube(KubeReport),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Datapath(report) => report.fmt(f),
            Self::Kube(report) => report.fmt(f),
        }
    }
}

/// Runs what is asked and gives back what was found; `say` is told of the progress.
///
/// # Errors
/// A lab or an agent cannot be started, something of the load failed, or traffic went another way
/// than the scenario says.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Found> {
    ensure!(options.rounds > 0, "no rounds");
    for (option, seconds) in [("seconds", options.seconds), ("idle", options.idle)] {
        let seconds = seconds.unwrap_or(1.0);
        ensure!(
            seconds > 0.0 && seconds.is_finite(),
            "--{option} must be above 0, not {seconds}"
        );
    }
    let report = match options.group {
        Group::All | Group::Datapath | Group::Bulk | Group::Rr | Group::Crr => {
            Found::Datapath(datapath::run(options, say)?)
        }
        Group::Kube => Found::Kube(kube::run(options, say)?),
    };
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(report)
}
