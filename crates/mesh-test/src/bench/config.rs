// SPDX-License-Identifier: Apache-2.0
//! Under which conditions a bench ran: enough to run it again, and to doubt it.

use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Options;
use super::testbed::Testbed;

/// Conditions of a run, and what was asked of agents before and after it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Config {
    rounds: u32,
    /// None: 10, and 31 for short connections.
    seconds: Option<f64>,
    topology: String,
    policies: u16,
    /// True: both labs were plain.
    control: bool,
    ahead: bool,
    #[serde(flatten)]
    machine: Machine,
    congestion_control: String,
    /// Command lines of the agents.
    agents: Vec<String>,
    agent_rss_idle_bytes: Vec<u64>,
    agent_rss_end_bytes: Vec<u64>,
    /// Records that the agents lost, of all connections of the run.
    flow_records_lost: f64,
}

impl Config {
    pub(super) fn of(options: &Options, testbed: &Testbed) -> Result<Self> {
        let agents = testbed.mesh.agents().iter().map(|agent| {
            let line = fs::read(format!("/proc/{}/cmdline", agent.process().id()))?;
            Ok(String::from_utf8_lossy(&line)
                .trim_end_matches('\0')
                .replace('\0', " "))
        });
        Ok(Self {
            rounds: options.rounds,
            seconds: options.seconds,
            topology: format!("{:?}", options.topology()).to_lowercase(),
            policies: options.policies,
            control: options.control,
            ahead: options.ahead,
            machine: Machine::this()?,
            congestion_control: congestion_control(testbed)?,
            agents: agents.collect::<Result<_>>()?,
            agent_rss_idle_bytes: resident_idle(testbed, options.idle(SETTLED))?,
            agent_rss_end_bytes: Vec::new(),
            flow_records_lost: 0.0,
        })
    }

    /// Asks the agents what only the end can tell.
    pub(super) fn finish(&mut self, testbed: &Testbed) -> Result<()> {
        self.agent_rss_end_bytes = resident(testbed)?;
        for agent in testbed.mesh.agents() {
            let page = agent.metrics()?;
            self.flow_records_lost += crate::mesh::sum(&page, "mesh_flow_events_lost_total", &[]);
        }
        Ok(())
    }

    pub(super) fn rss(&self) -> String {
        let mib = |all: &[u64]| {
            let all = all.iter().map(|bytes| (bytes >> 20).to_string());
            all.collect::<Vec<_>>().join(" and ")
        };
        format!(
            "agents resident: {} MiB idle, {} MiB at the end; flow records lost: {}",
            mib(&self.agent_rss_idle_bytes),
            mib(&self.agent_rss_end_bytes),
            self.flow_records_lost
        )
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self
            .seconds
            .map_or_else(|| "default".to_owned(), |seconds| seconds.to_string());
        writeln!(
            f,
            "{} rounds of {seconds} seconds, {} lab, {} NetworkPolicies",
            self.rounds, self.topology, self.policies
        )?;
        write!(f, "{}, {}", self.machine, self.congestion_control)?;
        if self.control {
            write!(f, "\ncontrol: both labs are plain")?;
        }
        self.agents
            .iter()
            .try_for_each(|agent| write!(f, "\n{agent}"))
    }
}

/// What it ran on, and as what build.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    optimised: bool,
}

impl Machine {
    pub(super) fn this() -> Result<Self> {
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?,
            cpu: cpu_model()?,
            cpus: std::thread::available_parallelism()?.get(),
            optimised: !cfg!(debug_assertions),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}, Linux {}", self.cpus, self.cpu, self.kernel)?;
        if !self.optimised {
            write!(f, ", NOT OPTIMISED: figures of this build mean nothing")?;
        }
        Ok(())
    }
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    Ok(text.trim().to_owned())
}

fn cpu_model() -> Result<String> {
    let info = read("/proc/cpuinfo")?;
    let line = info.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(": "));
    Ok(name.map_or("CPU", |(_, name)| name).to_owned())
}

fn congestion_control(testbed: &Testbed) -> Result<String> {
    let pod = testbed.mesh.lab().pod(super::testbed::CLIENT);
    pod.in_ns(|| read("/proc/sys/net/ipv4/tcp_congestion_control"))
}

/// After its start an agent lets go of what has run once, within 20 s: idle is what it is then.
const SETTLED: Duration = Duration::from_secs(25);

/// What agents hold once they have let go of what only their start took.
fn resident_idle(testbed: &Testbed, settled: Duration) -> Result<Vec<u64>> {
    // Without agents there is nothing to wait for.
    if !testbed.mesh.agents().is_empty() {
        std::thread::sleep(settled);
    }
    resident(testbed)
}

fn resident(testbed: &Testbed) -> Result<Vec<u64>> {
    let agents = testbed.mesh.agents().iter();
    agents
        .map(|agent| agent.process().resident_bytes())
        .collect()
}
