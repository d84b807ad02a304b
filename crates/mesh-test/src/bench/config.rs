// SPDX-License-Identifier: Apache-2.0
//! The conditions of a benchmark run, recorded so that it can be reproduced and judged.

use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Options;
use super::testbed::Testbed;

/// Conditions of a run, and the agents' state before and after it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Config {
    rounds: u32,
    /// Duration of each run; `None` means 10, and 31 for short connections.
    seconds: Option<f64>,
    topology: String,
    policies: u16,
    /// True if both labs ran without agents.
    control: bool,
    ahead: bool,
    #[serde(flatten)]
    machine: Machine,
    congestion_control: String,
    /// Command lines of the agents.
    agents: Vec<String>,
    agent_rss_idle_bytes: Vec<u64>,
    agent_rss_end_bytes: Vec<u64>,
    /// Flow records that the agents lost during the benchmark.
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

    /// Reads the values that the agents can give only at the end.
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

/// Hardware, kernel and build profile of the benchmark.
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
            write!(f, ", DEBUG BUILD: figures are not meaningful")?;
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

/// Time until an agent's memory is settled: within 20 s an agent frees what only its start needed.
const SETTLED: Duration = Duration::from_secs(25);

/// Returns the resident memory of each agent after `settled`, in bytes.
fn resident_idle(testbed: &Testbed, settled: Duration) -> Result<Vec<u64>> {
    // Without agents there is no need to wait.
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
