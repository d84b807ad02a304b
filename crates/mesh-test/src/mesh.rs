// SPDX-License-Identifier: Apache-2.0
//! A lab with an agent on every node: the whole mesh.
//!
//! It only starts agents, queries them and waits; tests and the demo judge the results.

use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agent::{Agent, AgentConfig, PATIENCE, http_get_on};
use crate::lab::Lab;
use crate::pod::Pod;
use crate::wait::eventually;

/// Label that enrolls a namespace or pod.
pub const ENROLLED: (&str, &str) = ("mesh.rs/dataplane", "enabled");
/// Port on which agents accept tunnels.
pub const TUNNEL_PORT: u16 = 15008;
/// Deadline for a change of manifests to be enforced on all nodes.
pub const IN_FORCE: Duration = Duration::from_secs(10);

/// A lab and its agents in the order of their nodes; agents are dropped before the lab.
#[derive(Debug)]
pub struct Mesh {
    /// Agents in the order of their nodes. Tests may remove one.
    pub agents: Vec<Agent>,
    lab: Lab,
    /// Number of calls of [`Mesh::enforce`].
    enforced: AtomicU8,
}

impl Deref for Mesh {
    type Target = Lab;
    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl DerefMut for Mesh {
    fn deref_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }
}

impl Mesh {
    /// Starts an agent on every node, all with the lab's CA, and waits until each manages its pods.
    ///
    /// # Errors
    /// An agent does not become ready; the error contains the end of its log.
    pub fn start(lab: Lab) -> Result<Self> {
        let config = AgentConfig::new(&Self::own_ca(&lab));
        Self::start_with(lab, &config)
    }

    /// Returns the issuer that [`Mesh::start`] uses: one CA directory for all nodes of the lab.
    #[must_use]
    pub fn own_ca(lab: &Lab) -> String {
        format!("self:{}", lab.dir().join("ca").display())
    }

    /// Starts agents with this configuration and waits until each manages its pods.
    ///
    /// # Errors
    /// An agent does not become ready; the error contains the end of its log.
    pub fn start_with(lab: Lab, config: &AgentConfig) -> Result<Self> {
        let agents = std::thread::scope(|scope| {
            let start = |node| scope.spawn(move || lab_agent(node, config));
            let threads: Vec<_> = lab.nodes().iter().map(start).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Agent>>| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        let mesh = Self {
            agents,
            lab,
            enforced: AtomicU8::new(0),
        };
        mesh.settled()?;
        Ok(mesh)
    }

    /// Returns the agent of node `number`, counted from 1.
    ///
    /// # Panics
    /// There is no such agent.
    #[must_use]
    pub fn agent(&self, number: u8) -> &Agent {
        &self.agents[usize::from(number) - 1]
    }

    /// Returns the agent of a pod's node.
    ///
    /// # Panics
    /// The test has removed the agent.
    #[must_use]
    pub fn agent_of(&self, pod: &Pod) -> &Agent {
        self.agent(pod.node().number())
    }

    /// Waits until every agent manages exactly the lab's pods on its node.
    ///
    /// # Errors
    /// An agent does not manage them within [`IN_FORCE`]; the error contains the pods it manages.
    pub fn settled(&self) -> Result<()> {
        for agent in &self.agents {
            let own = self
                .lab
                .pods()
                .filter(|pod| pod.node().number() == agent.node().number());
            let expected = u64::try_from(own.count())?;
            let adopted = || agent.ask("/status").ok()?["pods"]["adopted"].as_u64();
            eventually("agents to manage their pods", IN_FORCE, || {
                (adopted() == Some(expected)).then_some(())
            })
            .with_context(|| {
                let pods = agent.ask("/pods").map(|pods| pods.to_string());
                format!("{pods:?}\n{}", agent.log_tail())
            })?;
        }
        Ok(())
    }

    /// Enrolls a namespace without waiting for the agents.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn enrol(&self, namespace: &str) -> Result<()> {
        let labels = [ENROLLED].map(|(key, value)| (key.to_owned(), value.to_owned()));
        self.namespace(namespace, &labels.into())
    }

    /// Applies objects, which replace those of the last call, and waits until all nodes enforce
    /// them. Each call also adds a different Service, so that the revision changes on every node,
    /// even if the objects do not concern it.
    ///
    /// # Errors
    /// A node does not enforce them in time; the error contains the end of each agent's log.
    pub fn enforce(&self, objects: &str) -> Result<()> {
        let revision = |agent: &Agent| agent.ask("/status").ok()?["policy_revision"].as_u64();
        let before: Vec<_> = self.agents.iter().map(revision).collect();
        let number = 1 + self.enforced.fetch_add(1, Ordering::Relaxed);
        let text = format!(
            "{objects}\n---\napiVersion: v1\nkind: Service\n\
             metadata: {{name: in-force, namespace: default}}\n\
             spec: {{clusterIP: 10.96.254.{number}, ports: [{{port: 80}}]}}\n"
        );
        self.apply_text("in-force", &text)?;
        eventually("all nodes to enforce it", IN_FORCE, || {
            let mut now = self.agents.iter().map(revision).zip(&before);
            now.all(|(now, before)| now > *before).then_some(())
        })
        .with_context(|| {
            let logs = self.agents.iter().map(Agent::log_tail);
            logs.collect::<Vec<_>>().join("\n")
        })
    }

    /// Returns the sum of a metric's samples whose labels contain all of `labels`, over all agents.
    ///
    /// # Errors
    /// An agent does not answer.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        self.agents
            .iter()
            .map(|agent| Ok(sum(&agent.metrics()?, name, labels)))
            .sum()
    }
}

fn lab_agent(node: &std::sync::Arc<crate::node::Node>, config: &AgentConfig) -> Result<Agent> {
    node.start_agent(config.clone())
}

/// Returns whether a metrics page has a sample called `name` with this label.
fn has(page: &str, name: &str, (key, value): (&str, &str)) -> bool {
    let label = format!("{key}={value:?}");
    let mut lines = page.lines().filter(|line| line.starts_with(name));
    lines.any(|line| line.contains(&label))
}

/// Returns the sum of the samples called `name` whose labels contain all of `labels`.
#[must_use]
pub fn sum(page: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect();
    let sample = |line: &str| -> Option<f64> {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let has = |pair: &String| labels.split(',').any(|label| label == pair);
        if !wanted.iter().all(has) {
            return None;
        }
        value.split(' ').next()?.parse().ok()
    };
    // `sum()` is not used, because its result for no floats is -0.
    page.lines()
        .filter_map(sample)
        .fold(0.0, |all, one| all + one)
}

impl Agent {
    /// Returns the CPU seconds that the agent's workers used for connections and tunnels of a
    /// workload in namespace `default`.
    ///
    /// # Errors
    /// The metric has no such sample.
    pub fn worker_seconds(&self, workload: &str) -> Result<f64> {
        let (page, name) = (self.metrics()?, "mesh_worker_seconds_total");
        let label = ("workload", workload);
        ensure!(has(&page, name, label), "no {name} of {workload}");
        Ok(sum(&page, name, &[("namespace", "default"), label]))
    }

    /// Fetches a JSON page of the agent's admin API, e.g. `/status`.
    ///
    /// # Errors
    /// The agent does not answer with status 200, or the body is not JSON.
    pub fn ask(&self, path: &str) -> Result<Value> {
        let text = self.ask_text(path)?;
        serde_json::from_str(&text).with_context(|| format!("{path}: {text}"))
    }

    /// Fetches a page of the agent's admin API, e.g. `/plan`.
    ///
    /// # Errors
    /// The agent does not answer with status 200.
    pub fn ask_text(&self, path: &str) -> Result<String> {
        let stream = UnixStream::connect(self.admin())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (code, body) = http_get_on(stream, path)?;
        ensure!(code == 200, "{path}: {code}: {body}");
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metric_samples_are_summed_by_labels() {
        let page = "# HELP x y\nx_total{a=\"1\",b=\"2\"} 3\nx_total{a=\"1\",b=\"3\"} 4.0 17\nx_total{a=\"2\"} 5\nx 9\n";
        assert_eq!(sum(page, "x_total", &[("a", "1")]).to_string(), "7");
        assert_eq!(sum(page, "x_total", &[]).to_string(), "12");
        assert_eq!(sum(page, "x", &[]).to_string(), "9");
        assert_eq!(sum(page, "x_total", &[("c", "1")]).to_string(), "0");
        assert!(has(page, "x_total", ("a", "2")) && !has(page, "x_total", ("a", "3")));
    }
}
