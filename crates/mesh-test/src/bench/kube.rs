// SPDX-License-Identifier: Apache-2.0
//! Benchmarks of one agent in a large cluster: a real API server full of objects, one real node
//! with an agent started as a user starts it, and pods of that node that observe enforcement.
//!
//! A policy counts as enforced when a connection shows it: a client in a pod connects every few
//! milliseconds and reports when the result changes. API server and etcd share the machine, so
//! their CPU time is reported beside the agent's.

mod api;
mod cluster;
mod objects;
mod report;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use serde_json::{Value, json};

use super::Options;
use super::load::Histogram;
use super::measure::Cpu;
use crate::agent::Agent;
use crate::kube::Kube;
use api::{Proxy, Request, Verb};
use cluster::BenchCluster;
use objects::ObjectCounts;

pub use report::{Report, Row};

/// Pod changes per second; each change is one write of a pod.
const RATE: u32 = 50;
/// Default wait before the idle CPU time is read, and duration over which it is read.
const QUIET: Duration = Duration::from_secs(10);
/// Default duration in seconds of the pod changes without test connections.
const CHURN: f64 = 30.0;
/// Number of changes of a policy, and of a pod's labels, whose latency is measured.
const CHANGES: u16 = 100;
/// Time after which the agent has received the last write.
const SETTLE: Duration = Duration::from_secs(2);
/// Deadline for a change to be enforced.
const IN_FORCE: Duration = Duration::from_secs(60);

/// Runs the group `kube` and returns its report.
pub(super) fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let counts = ObjectCounts::of(usize::try_from(options.pods)?);
    let report = Report::of(options, counts)?;
    say("API server, node, real pods");
    let (kube, mut cluster) = BenchCluster::open()?;
    let proxy = Proxy::start(&kube)?;
    say(&format!("objects: {counts:?}"));
    let namespaces = fill(&proxy, counts)?;
    cluster.add_pods(&proxy)?;
    say("filled");
    let mut run = Run {
        report,
        counts,
        cluster: &cluster,
        kube: &kube,
        proxy: &proxy,
    };
    let agent = run.start()?;
    say("in force; idle");
    run.idle(&agent, options.idle(QUIET))?;
    say("pod changes, without connections");
    let time = Duration::from_secs_f64(options.seconds.unwrap_or(CHURN));
    let rounds = run.changes(&agent, time)?;
    say("every other node reports a policy");
    run.reports(&agent, &namespaces)?;
    say("from a write's answer to a connection that shows it, idle and during pod changes");
    run.in_force(&agent, rounds)?;
    Ok(run.report)
}

/// State that all parts of a run share.
struct Run<'r> {
    report: Report,
    counts: ObjectCounts,
    cluster: &'r BenchCluster,
    kube: &'r Kube,
    proxy: &'r Proxy<'r>,
}

impl Run<'_> {
    fn servers(&self) -> Result<Cpu> {
        Cpu::of(self.kube.host().cgroup())
    }

    /// Starts the agent and measures the time until policies are enforced: before, all is allowed.
    fn start(&mut self) -> Result<Agent> {
        let watcher = self.cluster.watch()?;
        watcher.until(true, IN_FORCE)?;
        let (servers, began) = (self.servers()?, Instant::now());
        let (cluster, kube) = (self.cluster, self.kube);
        let (agent, ready, closed) = std::thread::scope(|scope| {
            let start =
                scope.spawn(|| Ok::<_, Error>((cluster.start_agent(kube)?, began.elapsed())));
            let closed = watcher.until(false, IN_FORCE);
            let (agent, ready) = match start.join() {
                Ok(started) => started?,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            Ok::<_, Error>((agent, ready, closed?))
        })?;
        let in_force = millis(closed.duration_since(began));
        let servers = (self.servers()? - servers).total();
        self.report.add("start_to_in_force", "ms", in_force);
        self.report.add("start_to_ready", "ms", millis(ready));
        self.report.add("start_cpu", "s", used(&agent)?.total());
        self.report.add("start_cpu_of_servers", "s", servers);
        Ok(agent)
    }

    fn idle(&mut self, agent: &Agent, quiet: Duration) -> Result<()> {
        std::thread::sleep(quiet);
        let before = used(agent)?;
        std::thread::sleep(quiet);
        let idle = (used(agent)? - before).total() / quiet.as_secs_f64();
        self.report.add("idle_cpu", "cores", idle);
        self.resident("rss_idle", agent.process().resident_bytes()?);
        Ok(())
    }

    /// Measures the agent while only pods of other nodes change; returns the number of replaced
    /// pods.
    fn changes(&mut self, agent: &Agent, time: Duration) -> Result<usize> {
        let before = (used(agent)?, self.servers()?);
        let churned = churn(self.proxy, self.counts, 0, |began| began.elapsed() < time)?;
        let seconds = churned.took.as_secs_f64();
        let of_agent = (used(agent)? - before.0).total() / seconds;
        let of_servers = (self.servers()? - before.1).total() / seconds;
        let rate = f64::from(churned.changes) / seconds;
        self.report.add("pod_changes", "1/s", rate);
        self.report.add("pod_changes_cpu", "cores", of_agent);
        self.report
            .add("pod_changes_cpu_of_servers", "cores", of_servers);
        self.resident("rss_changes", agent.process().resident_bytes()?);
        Ok(churned.rounds)
    }

    /// Measures the agent while the agents of all nodes report a policy change.
    fn reports(&mut self, agent: &Agent, namespaces: &[String]) -> Result<()> {
        let before = used(agent)?;
        let reports = self.counts.report_statuses(namespaces, 2);
        self.proxy.send_all(&reports)?;
        std::thread::sleep(SETTLE);
        let used = (used(agent)? - before).total();
        self.report.add("policy_reported_cpu", "s", used);
        Ok(())
    }

    fn in_force(&mut self, agent: &Agent, rounds: usize) -> Result<()> {
        let watcher = self.cluster.watch()?;
        watcher.until(false, IN_FORCE)?;
        let (proxy, counts, pods) = (self.proxy, self.counts, &self.cluster.pods);
        let (policies, labels) = latencies(proxy, &watcher, pods)?;
        self.report.latency("idle_policy", &policies);
        self.report.latency("idle_label", &labels);
        let done = AtomicBool::new(false);
        let (policies, labels) = std::thread::scope(|scope| {
            let goes_on = |_: Instant| !done.load(Ordering::Relaxed);
            let changes = scope.spawn(move || churn(proxy, counts, rounds, goes_on));
            let found = latencies(proxy, &watcher, pods);
            done.store(true, Ordering::Relaxed);
            match changes.join() {
                Ok(churned) => churned.and(found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })?;
        self.report.latency("policy", &policies);
        self.report.latency("label", &labels);
        self.resident("rss_end", agent.process().resident_bytes()?);
        self.resident("rss_peak", agent.process().peak_bytes()?);
        Ok(())
    }

    fn resident(&mut self, metric: &str, bytes: u64) {
        let kib = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
        self.report.add(metric, "MiB", f64::from(kib) / 1024.0);
    }
}

/// Returns the CPU time that the agent has used so far.
fn used(agent: &Agent) -> Result<Cpu> {
    Cpu::of(agent.node().agent_host().cgroup())
}

/// Creates all objects but the real pods and returns the UIDs of the namespaces.
fn fill(proxy: &Proxy<'_>, counts: ObjectCounts) -> Result<Vec<String>> {
    proxy.send_all(&counts.namespaces())?;
    proxy.send_all(&counts.accounts())?;
    proxy.send_all(&counts.nodes())?;
    proxy.send_all(&counts.policies())?;
    proxy.send_all(&counts.services())?;
    let [objects, statuses] = counts.pods();
    proxy.send_all(&objects)?;
    proxy.send_all(&statuses)?;
    let mut api = proxy.connect()?;
    let uid = |index| -> Result<String> {
        let path = format!("/api/v1/namespaces/{}", ObjectCounts::namespace(index));
        let found = api.send(&Request::merge(path, json!({})))?;
        let uid = found["metadata"]["uid"]
            .as_str()
            .context("the namespace has no UID")?;
        Ok(uid.to_owned())
    };
    let namespaces: Vec<String> = (0..counts.namespaces).map(uid).collect::<Result<_>>()?;
    proxy.send_all(&counts.reports())?;
    proxy.send_all(&counts.report_statuses(&namespaces, 1))?;
    Ok(namespaces)
}

struct Churned {
    changes: u32,
    rounds: usize,
    took: Duration,
}

/// Deletes and recreates pods of other nodes and sets their addresses, one write after the other
/// at a steady rate, as a rollout on other nodes does.
fn churn(
    proxy: &Proxy<'_>,
    counts: ObjectCounts,
    first: usize,
    goes_on: impl Fn(Instant) -> bool,
) -> Result<Churned> {
    let began = Instant::now();
    let mut api = proxy.connect()?;
    let mut changes = 0;
    let mut round = first;
    while goes_on(began) {
        let pod = round % counts.pods;
        let [object, status] = counts.pod(pod, 1 + round / counts.pods);
        let name = object.body["metadata"]["name"]
            .as_str()
            .context("the pod has no name")?;
        let gone = Request {
            verb: Verb::Delete,
            path: format!("{}/{name}", object.path),
            body: json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}),
        };
        for request in [&gone, &object, &status] {
            let due = began + Duration::from_secs(1) * changes / RATE;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            api.send(request)?;
            changes += 1;
        }
        round += 1;
    }
    let took = began.elapsed();
    Ok(Churned {
        changes,
        rounds: round,
        took,
    })
}

/// Measures the time from the response to a write to the first connection that shows it, for
/// changes of a policy and of the pod label that the policy selects.
fn latencies(
    proxy: &Proxy<'_>,
    watcher: &cluster::Watcher,
    pods: &cluster::Names,
) -> Result<(Histogram, Histogram)> {
    let mut api = proxy.connect()?;
    let mut change = |request: &Request, open: bool| -> Result<u64> {
        api.send(request)?;
        let answered = Instant::now();
        let seen = watcher.until(open, IN_FORCE)?;
        let took = seen.saturating_duration_since(answered);
        Ok(took.as_nanos().try_into()?)
    };
    let (mut policies, mut labels) = (Histogram::default(), Histogram::default());
    for number in 0..CHANGES {
        let open = number.is_multiple_of(2);
        policies.add(change(&pods.everybody(open), open)?);
        // Avoid running in step with the concurrent pod changes.
        std::thread::sleep(Duration::from_millis(23 + u64::from(number) * 7 % 40));
    }
    for number in 0..CHANGES {
        let open = number.is_multiple_of(2);
        labels.add(change(&pods.friend(open), open)?);
        std::thread::sleep(Duration::from_millis(23 + u64::from(number) * 7 % 40));
    }
    Ok((policies, labels))
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Returns the merge patch `{"metadata": {"labels": ..}}`.
fn label(key: &str, value: Option<&str>) -> Value {
    json!({"metadata": {"labels": {key: value}}})
}
