// SPDX-License-Identifier: Apache-2.0
//! A table's cluster as a lab: a namespace for each pod, a server for every destination port,
//! clients that try all rows in parallel, and agents.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_plan::cluster::Transport;
use serde_json::{Value, json};

use super::attempt::{Attempt, Outcome};
use super::cluster::{Endpoint, TableCluster};
use super::rows::Run;
use crate::agent::AgentConfig;
use crate::lab::Lab;
use crate::manifests::Manifests;
use crate::mesh::Mesh;
use crate::pod::{PodSpec, probe_cmd};
use crate::process::{Host, Proc};
use crate::topology::Topology;

/// Deadline for all rows of one client together.
const BATCH: Duration = Duration::from_secs(120);

/// Deadline for an agent to attach all pods after its start; each takes some kernel waits, which
/// are long on a busy machine.
const ALL_PODS: Duration = Duration::from_secs(90);

/// A lab for a table's cluster, with servers.
pub(crate) struct Testbed<L> {
    lab: L,
    /// Names of the lab's pods by UID.
    pods: BTreeMap<String, String>,
    /// Names of the servers, which are in their answers.
    names: BTreeMap<Endpoint, String>,
    servers: Vec<Proc>,
}

impl Testbed<Lab> {
    /// Creates the lab and the manifests, and starts the servers.
    pub(crate) fn build(cluster: &TableCluster, runs: &[&Run]) -> Result<Self> {
        let mut lab = Lab::builder(Topology::Routed)
            .nodes(cluster.nodes)
            .outside()
            .build()?;
        for node in lab.nodes() {
            lab.withdraw(&format!("node-{}", node.name()))?;
        }
        for (node, addresses) in cluster.node_addresses()? {
            lab.add_addresses(Some(node), &addresses)?;
        }
        let outsiders: BTreeSet<IpAddr> = runs.iter().flat_map(|run| outsiders(run)).collect();
        lab.add_addresses(None, &Vec::from_iter(outsiders))?;
        let mut pods = BTreeMap::new();
        for (uid, pod) in cluster.pods() {
            let addresses: Vec<IpAddr> = pod.addresses.to_vec();
            let node = pod.node.strip_prefix("node").context("a node of the lab")?;
            let name = format!("{}.{}", pod.name.namespace, pod.name.name);
            let spec = PodSpec::new(&name, node.parse()?)
                .namespace(&pod.name.namespace)
                .addresses(&addresses);
            let made = lab.add_pod(spec)?;
            // The table has its own manifest of the pod.
            lab.withdraw(&Manifests::pod_file(&made))?;
            lab.withdraw(&format!("namespace-{}", made.namespace()))?;
            pods.insert(uid.to_owned(), name);
        }
        let mut testbed = Self {
            lab,
            pods,
            names: BTreeMap::new(),
            servers: Vec::new(),
        };
        testbed.write_manifests(cluster)?;
        testbed.serve(runs)?;
        Ok(testbed)
    }

    fn write_manifests(&self, cluster: &TableCluster) -> Result<()> {
        for (number, object) in cluster.objects.iter().enumerate() {
            let mut object = object.clone();
            if object["kind"] == "Pod" {
                self.name_netns(&mut object)?;
            }
            self.lab.apply(&format!("truth-{number:05}"), &object)?;
        }
        Ok(())
    }

    fn name_netns(&self, object: &mut Value) -> Result<()> {
        let of = |field: &str, or: &str| {
            let text = object["metadata"][field].as_str();
            text.unwrap_or(or).to_owned()
        };
        let name = format!("{}.{}", of("namespace", "default"), of("name", ""));
        let Some(pod) = self.lab.pods().find(|pod| pod.name() == name) else {
            return Ok(());
        };
        let metadata = &mut object["metadata"];
        if metadata["annotations"].is_null() {
            metadata["annotations"] = json!({});
        }
        metadata["annotations"]["mesh.rs/netns"] = pod.path().display().to_string().into();
        Ok(())
    }

    /// Starts the servers before the agents, while every port is free.
    fn serve(&mut self, runs: &[&Run]) -> Result<()> {
        let mut lines: BTreeMap<Endpoint, BTreeSet<String>> = BTreeMap::new();
        for run in runs {
            let to = run.attempt.to;
            let flag = match run.attempt.transport {
                Transport::Tcp => "--tcp",
                Transport::Udp => "--udp",
                Transport::Sctp => "--sctp",
            };
            let lines = lines.entry(run.to.clone()).or_default();
            match run.to {
                Endpoint::Pod(_) => lines.insert(format!("{flag} [::]:{}", to.port())),
                // Answers must come from the destination address.
                Endpoint::Node(_) | Endpoint::Outside => lines.insert(format!("{flag} {to}")),
            };
        }
        for (endpoint, flags) in lines {
            let name = format!("server-{}", self.names.len());
            let mut line = format!("--name {name}");
            for flag in flags {
                write!(line, " {flag}")?;
            }
            let server = at(&self.lab, &self.pods, &endpoint, |it| it.serve(&line))?;
            self.servers.push(server);
            self.names.insert(endpoint, name);
        }
        Ok(())
    }

    /// Starts the agents.
    pub(crate) fn start(self) -> Result<Testbed<Mesh>> {
        let config = AgentConfig::new(&Mesh::own_ca(&self.lab)).ready_within(ALL_PODS);
        Ok(Testbed {
            lab: Mesh::start_with(self.lab, &config)?,
            pods: self.pods,
            names: self.names,
            servers: self.servers,
        })
    }
}

/// Returns the addresses of a run that belong to no pod or node.
fn outsiders(run: &Run) -> impl Iterator<Item = IpAddr> {
    let from = (run.from == Endpoint::Outside).then_some(run.attempt.from);
    let to = (run.to == Endpoint::Outside).then_some(run.attempt.to.ip());
    from.flatten().into_iter().chain(to)
}

/// Runs `f` with the host of an endpoint.
fn at<T>(
    lab: &Lab,
    pods: &BTreeMap<String, String>,
    endpoint: &Endpoint,
    f: impl FnOnce(&Host) -> Result<T>,
) -> Result<T> {
    match endpoint {
        Endpoint::Pod(uid) => {
            let name = pods.get(uid);
            f(&lab.pod(name.context("a pod that was made")?))
        }
        Endpoint::Node(number) => f(lab.node(*number)),
        Endpoint::Outside => f(lab.outside()?),
    }
}

impl<L: AsRef<Lab>> Testbed<L> {
    /// Makes all attempts, each from its endpoint; returns the outcomes by attempt number.
    pub(crate) fn try_all(&self, runs: &[&Run]) -> Result<BTreeMap<usize, Outcome>> {
        let mut batches: BTreeMap<&Endpoint, Vec<&Attempt>> = BTreeMap::new();
        for run in runs {
            batches.entry(&run.from).or_default().push(&run.attempt);
        }
        let (lab, pods) = (self.lab.as_ref(), &self.pods);
        let batch = |(endpoint, attempts): (&Endpoint, Vec<&Attempt>)| -> Result<Vec<Outcome>> {
            let input = serde_json::to_vec(&attempts)?;
            let output = at(lab, pods, endpoint, |it| {
                it.run(probe_cmd("checks")?.input(input), BATCH)
            })?;
            let tried: Vec<Outcome> = output
                .ok()?
                .text()
                .lines()
                .map(|line| Ok(serde_json::from_str(line)?))
                .collect::<Result<_>>()?;
            ensure!(
                tried.len() == attempts.len(),
                "the client did not report every row"
            );
            Ok(tried)
        };
        let batch = &batch;
        let tried = std::thread::scope(|scope| {
            let threads: Vec<_> = batches
                .into_iter()
                .map(|of_place| scope.spawn(move || batch(of_place)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<Outcome>>>| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        let by_id = tried.into_iter().flatten().map(|tried| (tried.id, tried));
        Ok(by_id.collect())
    }

    /// Returns false if another server answered, or the server saw another source address.
    pub(crate) fn is_right(&self, run: &Run, tried: &Outcome) -> bool {
        tried.answer.as_ref().is_none_or(|seen| {
            let own_source = run.attempt.from.is_none_or(|from| seen.client.ip() == from);
            self.names.get(&run.to) == Some(&seen.name) && own_source
        })
    }
}
