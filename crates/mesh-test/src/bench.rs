// SPDX-License-Identifier: Apache-2.0
//! Benchmarks of the mesh's cost: the same programs run alternately with and without the mesh on
//! one machine.
//!
//! Two equal labs are used: `plain` has no agents, `mesh` has one on each node, started as in the
//! demo. Each result is the ratio of two consecutive runs; the rounds give its spread. The mesh is
//! not tuned: it has only settings that a user would have.

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

/// The part of the benchmark to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Group {
    /// Everything but `kube`
    All,
    /// The groups bulk, rr and crr
    Datapath,
    /// Bulk transfers
    Bulk,
    /// Small requests on long-lived connections
    Rr,
    /// Short-lived connections
    Crr,
    /// One agent in a large cluster
    Kube,
}

/// Placement of client and server.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Scenario {
    /// Two pods on one node.
    SameNode,
    /// Two pods on different nodes.
    CrossNode,
}

impl Scenario {
    /// All scenarios in the order in which they run.
    pub const ALL: [Self; 2] = [Self::SameNode, Self::CrossNode];

    /// Returns the name used in result rows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same_node",
            Self::CrossNode => "cross_node",
        }
    }
}

/// Command-line options of the benchmark.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    pub group: Group,
    /// Number of rounds; each round runs everything once plain and once meshed
    #[arg(long, default_value_t = 5)]
    pub rounds: u32,
    /// Duration of each run in seconds (default: 10; kube: 30; crr: 31, so that ports in TIME_WAIT
    /// accumulate as in production)
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Seconds to wait before reading the agents' idle memory and, in the group kube, their idle
    /// CPU time (default: 25; kube: 10)
    #[arg(long)]
    pub idle: Option<f64>,
    /// Write the results to this file as JSON
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Print every run
    #[arg(long)]
    pub verbose: bool,
    /// Run only this scenario
    #[arg(long, value_enum)]
    pub scenario: Option<Scenario>,
    /// Run only this metric, e.g. `rr_16`; may be repeated
    #[arg(long)]
    pub metric: Vec<String>,
    /// Connect the pods by bridges, as flannel does (default: routed, as Calico does)
    #[arg(long)]
    pub bridged: bool,
    /// Number of NetworkPolicies that select the pods; 0: pods are not isolated
    #[arg(long, default_value_t = 50)]
    pub policies: u16,
    /// Run the programs of both labs with priority over all others, for a machine that is not idle
    #[arg(long)]
    pub ahead: bool,
    /// Run the second lab without agents, too: its ratios show the machine's noise
    #[arg(long)]
    pub control: bool,
    /// Pods in the group kube; nodes, services and policies are scaled in proportion
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pods: u32,
}

impl Options {
    /// Returns the time to wait before idle figures are read.
    fn idle(&self, default: Duration) -> Duration {
        self.idle.map_or(default, Duration::from_secs_f64)
    }

    /// Returns the topology of both labs.
    #[must_use]
    pub fn topology(&self) -> Topology {
        if self.bridged {
            Topology::Bridged
        } else {
            Topology::Routed
        }
    }
}

/// Results of a benchmark, by the type of their rows.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(untagged)]
pub enum Found {
    /// Ratios of runs with the mesh to runs without.
    Datapath(Report),
    /// Figures for one agent in a large cluster.
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

/// Runs the selected benchmarks and returns the results; progress messages go to `say`.
///
/// # Errors
/// A lab or an agent cannot be started, a load program failed, or traffic did not take the path
/// that the scenario requires.
pub fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Found> {
    ensure!(options.rounds > 0, "--rounds must be at least 1");
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
