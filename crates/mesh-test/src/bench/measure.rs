// SPDX-License-Identifier: Apache-2.0
//! One run of the benchmark: a fresh server, a client, and the CPU time used during the run.

use std::ops::{Add, Sub};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Scenario;
use super::load::{Done, Shape};
use super::testbed::{CLIENT, GRACE, Side};
use crate::lab::Lab;
use crate::process::Cmd;

/// USER_HZ, the unit of /proc/stat: 100 on all architectures that the bench supports.
const TICKS: f64 = 100.0;

/// Path of the load programs, which are subcommands of the bench. It is not the bench's own path,
/// because a build may replace that file during a run.
const OURSELVES: &str = "/proc/self/exe";

/// Parameters of one run: the client's work, and scheduling of client and server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Orders {
    pub(super) shape: Shape,
    pub(super) workers: u16,
    pub(super) seconds: f64,
    /// CPUs of client and server, if they are pinned.
    pub(super) cpus: Option<(usize, usize)>,
    /// Gives the programs priority over all others if true.
    pub(super) ahead: bool,
}

impl Orders {
    /// Starts a server, runs a client against it, and returns the client's report.
    pub(super) fn run(&self, lab: &Lab, scenario: Scenario) -> Result<Done> {
        let scheduled = |cmd: Cmd, cpu: Option<usize>| {
            let cmd = cmd.args(self.ahead.then_some("--ahead"));
            cmd.args(
                cpu.into_iter()
                    .flat_map(|cpu| ["--cpu".to_owned(), cpu.to_string()]),
            )
        };
        let (client_cpu, server_cpu) = self.cpus.unzip();
        let server_pod = lab.pod(scenario.server());
        let server = Cmd::new(OURSELVES).args(["load-server"]);
        let server = server_pod.spawn_lines(scheduled(server, server_cpu))?;
        let ready = server.line(GRACE)?;
        ready.with_context(|| format!("the server exited: {}", server.log_tail()))?;
        let shape = match self.shape {
            Shape::Bulk => "bulk",
            Shape::Rr => "rr",
            Shape::Crr => "crr",
            Shape::Touch => "touch",
        };
        let client = Cmd::new(OURSELVES)
            .args(["load-client", "--shape", shape])
            .args(["--to", &server_pod.v4().to_string()])
            .args(["--workers", &self.workers.to_string()])
            .args(["--seconds", &self.seconds.to_string()]);
        let deadline = Duration::from_secs_f64(self.seconds) + GRACE;
        let output = lab
            .pod(CLIENT)
            .run(scheduled(client, client_cpu), deadline)?
            .ok()?;
        output.json()
    }

    /// Runs and measures; fails if the traffic does not take the path that the scenario requires.
    pub(super) fn sample(&self, side: &Side, scenario: Scenario) -> Result<Sample> {
        let lab = side.lab();
        let agents = || -> Result<Cpu> {
            let nodes = side.agents().iter().map(|agent| agent.node());
            nodes.map(|node| Cpu::of(node.agent_host().cgroup())).sum()
        };
        let tunnelled = side.tunnelled()?;
        let before = (Cpu::of(lab.cgroup())?, agents()?, busy()?, Instant::now());
        let done = self.run(lab, scenario)?;
        let elapsed = before.3.elapsed().as_secs_f64();
        let (used, by_agents) = (Cpu::of(lab.cgroup())? - before.0, agents()? - before.1);
        let foreign = (busy()? - before.2 - used.total()).max(0.0);
        ensure!(
            done.errors.is_empty(),
            "{:?}: {:?}",
            self.shape,
            done.errors
        );
        ensure!(done.units > 0, "{:?}: no request succeeded", self.shape);
        let tunnelled = side.tunnelled()? - tunnelled;
        let expected = !side.agents().is_empty() && scenario == Scenario::CrossNode;
        ensure!(
            (tunnelled > 0.0) == expected,
            "{}: {tunnelled} connections went through tunnels",
            scenario.name()
        );
        side.empty_flow_logs()?;
        let cpus = std::thread::available_parallelism()?.get();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let (units, cpus) = (done.units as f64, cpus as f64);
        Ok(Sample {
            units,
            seconds: done.seconds,
            p50_us: done.p50_us,
            p99_us: done.p99_us,
            lab: used,
            agents: by_agents,
            foreign: foreign / elapsed / cpus,
        })
    }
}

/// CPU time in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// User time.
    pub user: f64,
    /// System time, including sending packets on the program's behalf.
    pub system: f64,
}

impl Cpu {
    /// Returns the CPU time of all present and past processes in and below a cgroup.
    ///
    /// # Errors
    /// The cgroup does not exist.
    pub fn of(cgroup: &Path) -> Result<Self> {
        let stat = std::fs::read_to_string(cgroup.join("cpu.stat"))?;
        let seconds = |name: &str| -> Result<f64> {
            let line = stat.lines().find_map(|line| line.strip_prefix(name));
            let micros: u64 = line.with_context(|| name.to_owned())?.trim().parse()?;
            Ok(Duration::from_micros(micros).as_secs_f64())
        };
        Ok(Self {
            user: seconds("user_usec")?,
            system: seconds("system_usec")?,
        })
    }

    /// Returns user plus system time.
    #[must_use]
    pub fn total(self) -> f64 {
        self.user + self.system
    }
}

impl Add for Cpu {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let (user, system) = (self.user + other.user, self.system + other.system);
        Self { user, system }
    }
}

impl Sub for Cpu {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        let (user, system) = (self.user - other.user, self.system - other.system);
        Self { user, system }
    }
}

impl std::iter::Sum for Cpu {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// Returns the machine's busy CPU time since boot in seconds, over all CPUs.
fn busy() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    busy_of(&stat).context("no cpu line in /proc/stat")
}

fn busy_of(stat: &str) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<f64> = line
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal; guest times are included in these.
    let ticks = ticks.get(..8)?;
    Some((ticks.iter().sum::<f64>() - ticks[3] - ticks[4]) / TICKS)
}

/// Measurements of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Number of bytes, requests or connections.
    pub units: f64,
    /// Duration in seconds.
    pub seconds: f64,
    /// Median latency in microseconds; 0 for bulk.
    pub p50_us: f64,
    /// 99th percentile of the latency in microseconds; 0 for bulk.
    pub p99_us: f64,
    /// CPU time of all processes in the lab: agents and applications.
    pub lab: Cpu,
    /// CPU time of the agents.
    pub agents: Cpu,
    /// Share of the machine's CPU time that processes outside the lab used, 0 to 1.
    pub foreign: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_busy_time_excludes_idle_and_iowait() {
        let stat = "cpu  100 20 30 4000 500 6 7 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        let busy = busy_of(stat).expect("a cpu line");
        assert!((busy - 1.71).abs() < 1e-9, "{busy}");
        assert!(busy_of("intr 1 2 3\n").is_none());
    }
}
