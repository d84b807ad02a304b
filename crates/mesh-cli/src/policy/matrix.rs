// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy matrix`: the connections that are allowed between pods.

use std::collections::BTreeSet;
use std::io::{self, Write};

use anyhow::{Result, bail, ensure};
use mesh_common::Protocol;
use mesh_common::identity::Evidence;
use mesh_common::policy::PortKey;
use mesh_plan::cluster::Pod;

use super::explain::Transport;
use super::world::{Party, World, evidence, number};
use crate::args::{self, Matrix};
use crate::{Outcome, input};

/// Prints a table for one port, or a line with the allowed ports for each pair of pods.
pub(crate) fn run(args: &Matrix, out: &mut impl Write) -> Result<Outcome> {
    let mut objects = Vec::new();
    for path in &args.manifests.paths {
        input::manifests(path, &mut objects)?;
    }
    let world = World::imagined(objects);
    for note in &world.notes {
        writeln!(io::stderr(), "{note}")?;
    }
    let mut pods: Vec<&Pod> = world.cluster().pods.values().map(|pod| &**pod).collect();
    pods.sort_by(|a, b| a.name.cmp(&b.name));
    let question = Question {
        world: &world,
        protocol: number(args.protocol),
        evidence: args.evidence.map(evidence),
    };
    let concerns = |a: &Pod, b: &Pod| {
        args.namespace
            .as_ref()
            .is_none_or(|name| [&a.name.namespace, &b.name.namespace].contains(&name))
    };
    if let Some(name) = &args.namespace {
        let has_any = pods.iter().any(|pod| pod.name.namespace == *name);
        ensure!(has_any, "namespace {name} has no pods");
    }
    match &args.port {
        Some(port) => {
            pods.retain(|pod| concerns(pod, pod));
            let ports = ports(&pods, args.protocol, port)?;
            grid(&question, &pods, &ports, out)?;
        }
        None => {
            for from in &pods {
                for to in pods
                    .iter()
                    .filter(|to| from.uid != to.uid && concerns(from, to))
                {
                    let ports = question.ranges(from, to);
                    writeln!(out, "{} -> {}: {}", from.name, to.name, describe(&ports))?;
                }
            }
        }
    }
    Ok(Outcome::Good)
}

struct Question<'a> {
    world: &'a World,
    protocol: Protocol,
    /// The assumed evidence; `None` = as on the wire.
    evidence: Option<Evidence>,
}

impl Question<'_> {
    fn allows(&self, from: &Pod, to: &Pod, port: u16) -> bool {
        let what = (self.protocol, port);
        // Without a common family there is no connection.
        let ends = (Party::of(from), Party::of(to));
        let Ok(connection) = self.world.connection(ends.0, ends.1, what) else {
            return false;
        };
        let evidence = self.evidence.or_else(|| {
            let transport = Transport::of(self.world, &connection);
            (!transport.refused).then_some(transport.evidence)
        });
        evidence.is_some_and(|evidence| {
            self.world
                .evaluator
                .verdicts(&connection, evidence)
                .allowed()
        })
    }

    /// The allowed ports, by one decision for each range that no rule divides.
    fn ranges(&self, from: &Pod, to: &Pod) -> Vec<(u16, u16)> {
        let mut starts = BTreeSet::from([1_u32]);
        for pod in [from, to] {
            for prefix in self.world.index(pod).ports.keys() {
                let bits = prefix.bits - PortKey::FIXED_BITS;
                let first = u32::from(prefix.data.port.get());
                starts.extend([first.max(1), first + (1 << (16 - bits.min(16)))]);
            }
        }
        starts.insert(1 << 16);
        let starts: Vec<u32> = starts
            .into_iter()
            .filter(|start| *start <= 1 << 16)
            .collect();
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for pair in starts.windows(2) {
            let (Ok(first), Ok(last)) = (u16::try_from(pair[0]), u16::try_from(pair[1] - 1)) else {
                continue;
            };
            if !self.allows(from, to, first) {
                continue;
            }
            match ranges.last_mut() {
                Some(range) if range.1.checked_add(1) == Some(first) => range.1 = last,
                _ => ranges.push((first, last)),
            }
        }
        ranges
    }
}

fn describe(ranges: &[(u16, u16)]) -> String {
    match ranges {
        [] => "nothing".to_owned(),
        [(1, u16::MAX)] => "everything".to_owned(),
        ranges => {
            let words: Vec<String> = ranges
                .iter()
                .map(|(first, last)| {
                    if first == last {
                        first.to_string()
                    } else {
                        format!("{first}-{last}")
                    }
                })
                .collect();
            words.join(", ")
        }
    }
}

/// The port at each destination; `None` = it has no port of that name.
fn ports(pods: &[&Pod], protocol: args::Protocol, text: &str) -> Result<Vec<Option<u16>>> {
    let asked: Vec<_> = pods
        .iter()
        .map(|pod| World::port(Party::of(pod), protocol, text))
        .collect();
    if !pods.is_empty() && asked.iter().all(Result::is_err) {
        ensure!(
            World::is_name(text),
            "invalid port {text:?}: must be between 1 and 65535"
        );
        bail!("no pod has a {protocol} port named {text:?}");
    }
    Ok(asked.into_iter().map(Result::ok).collect())
}

/// Prints a table in which rows connect to columns: `+` = allowed, `.` = refused, `?` = no such port.
fn grid(
    question: &Question<'_>,
    pods: &[&Pod],
    ports: &[Option<u16>],
    out: &mut impl Write,
) -> Result<()> {
    let names: Vec<String> = pods.iter().map(|pod| pod.name.to_string()).collect();
    let width = names.iter().map(String::len).max().unwrap_or(0);
    for (i, name) in names.iter().enumerate() {
        writeln!(out, "{:>width$}  {i}", name)?;
    }
    let digits = pods.len().to_string().len();
    write!(out, "{:>width$} ", "from \\ to")?;
    for i in 0..pods.len() {
        write!(out, " {i:>digits$}")?;
    }
    writeln!(out)?;
    for (from, name) in pods.iter().zip(&names) {
        write!(out, "{name:>width$} ")?;
        for (to, port) in pods.iter().zip(ports) {
            let mark = match port {
                _ if from.uid == to.uid => "-",
                Some(port) if question.allows(from, to, *port) => "+",
                Some(_) => ".",
                None => "?",
            };
            write!(out, " {mark:>digits$}")?;
        }
        writeln!(out)?;
    }
    write!(out, "+ allowed, . refused")?;
    if ports.contains(&None) {
        write!(out, ", ? no port of that name")?;
    }
    writeln!(out)?;
    Ok(())
}
