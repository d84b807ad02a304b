// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy diff`: the effect of new manifests on open and recent connections. The agent only
//! provides its snapshot and connections; the decisions are made here, with the agent's compiler.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use mesh_api::{LastGood, Object, Options, convert};
use mesh_common::identity::Evidence;
use mesh_common::verdict::Verdict;
use mesh_common::{Protocol, Reason};
use mesh_plan::ClusterSnapshot;
use mesh_plan::evaluate::{Connection, Verdicts};
use serde_json::Value;

use super::world::{self, Party, World};
use crate::args::Diff;
use crate::{Outcome, agent, input};

/// Connections with the same decision.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    protocol: Protocol,
    tunnelled: bool,
}

/// The number of connections of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    open: usize,
    seen: usize,
    /// The verdict of the latest record: whether it was allowed.
    recorded: Option<bool>,
}

type Connections = BTreeMap<Seen, Count>;

/// Compares the decisions. The outcome is bad if any would change.
///
/// # Errors
/// The input is invalid, or no decision would change and a part of the new manifests is rejected.
pub(crate) fn run(args: &Diff, out: &mut impl Write) -> Result<Outcome> {
    let objects = read(&args.manifests.paths)?;
    let mut connections = Connections::new();
    let (old, new) = match &args.flows {
        Some(file) => {
            let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            records(&text, &mut connections).with_context(|| file.display().to_string())?;
            let old = read(&args.old)?;
            let old = (!old.is_empty()).then(|| World::new(&old));
            let new = match &old {
                Some(old) => merged(old.cluster(), &objects, args.replace),
                None => World::new(&objects),
            };
            (old, new)
        }
        None => {
            let text = agent::get(&args.agent, "/facts")?;
            let snapshot: ClusterSnapshot = serde_json::from_str(&text).context(
                "cannot parse the agent's snapshot: the agent may be of another version",
            )?;
            records(&agent::get(&args.agent, "/flows")?, &mut connections)?;
            open(&agent::get(&args.agent, "/connections")?, &mut connections)?;
            let new = merged(&snapshot, &objects, args.replace);
            (Some(World::of(snapshot, Vec::new())), new)
        }
    };
    for note in &new.notes {
        writeln!(io::stderr(), "{note}")?;
    }
    let outcome = compare(old.as_ref(), &new, &connections, out)?;
    if matches!(outcome, Outcome::Good) {
        new.ensure_complete()?;
    }
    Ok(outcome)
}

fn read(paths: &[std::path::PathBuf]) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for path in paths {
        input::manifests(path, &mut objects)?;
    }
    Ok(objects)
}

/// The cluster with new manifests applied. A rejected update changes nothing, as in an agent.
fn merged(snapshot: &ClusterSnapshot, objects: &[Object], replace: bool) -> World {
    let mut outcome = convert(objects, &LastGood::default(), Options { standalone: true });
    for rejection in &mut outcome.rejections {
        let object = rejection.object.to_string();
        let mut known = (snapshot.policies.keys().map(ToString::to_string)).chain(
            (snapshot.authentications.keys()).map(|name| format!("MeshAuthentication {name}")),
        );
        if known.any(|known| known == object) {
            "the version in force stays".clone_into(&mut rejection.consequence);
        }
    }
    let notes = world::notes(&outcome);
    let given = outcome.cluster;
    let rejected: BTreeSet<String> = outcome
        .rejections
        .iter()
        .map(|r| r.object.to_string())
        .collect();
    let mut cluster = snapshot.clone();
    if replace {
        cluster
            .policies
            .retain(|object, _| given.policies.contains_key(object));
        cluster
            .authentications
            .retain(|name, _| given.authentications.contains_key(name));
    }
    for (object, policy) in given.policies {
        if !rejected.contains(&object.to_string()) || !cluster.policies.contains_key(&object) {
            cluster.policies.insert(object, policy);
        }
    }
    for (name, authentication) in given.authentications {
        let is_rejected = rejected.contains(&format!("MeshAuthentication {name}"));
        if !is_rejected || !cluster.authentications.contains_key(&name) {
            cluster.authentications.insert(name, authentication);
        }
    }
    for (uid, pod) in given.pods {
        cluster.pods.retain(|_, old| old.name != pod.name);
        cluster.pods.insert(uid, pod);
    }
    cluster.namespaces.extend(given.namespaces);
    cluster.nodes.extend(given.nodes);
    World::of(cluster, notes)
}

/// Whether the reason of a record is the policy decision.
fn is_policy(label: &str) -> bool {
    let mut reasons = Reason::ALL.iter();
    reasons.any(|reason| reason.label() == label && reason.is_policy_or_missing())
}

fn protocol(value: &Value) -> Option<Protocol> {
    match value.as_str()? {
        "tcp" => Some(Protocol::TCP),
        "udp" => Some(Protocol::UDP),
        "sctp" => Some(Protocol::SCTP),
        number => number.parse().ok().map(Protocol),
    }
}

/// Adds the records of a flow log: connections, and refusals by policy.
fn records(text: &str, into: &mut Connections) -> Result<()> {
    let lines = text.lines().enumerate();
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let record: Value = serde_json::from_str(line)
            .with_context(|| format!("line {} of the flow log", number + 1))?;
        let by_policy = record["reason"].as_str().is_some_and(is_policy);
        let counts = match record["kind"].as_str() {
            Some("connection") => true,
            Some("denied" | "dropped") => by_policy,
            _ => false,
        };
        let address =
            |end: &str| -> Option<IpAddr> { record[end]["address"].as_str()?.parse().ok() };
        let port = record["destination"]["port"]
            .as_u64()
            .and_then(|p| u16::try_from(p).ok());
        let ends = address("source").zip(address("destination")).zip(port);
        let (true, Some(((source, destination), port)), Some(protocol)) =
            (counts, ends, protocol(&record["protocol"]))
        else {
            continue;
        };
        let seen = Seen {
            source,
            destination,
            port,
            protocol,
            tunnelled: record["security"] == "mutual_tls",
        };
        let count = into.entry(seen).or_default();
        count.seen += 1;
        count.recorded = Some(record["verdict"] == "allowed");
    }
    Ok(())
}

/// Adds the open connections of an agent.
fn open(text: &str, into: &mut Connections) -> Result<()> {
    for line in text.lines() {
        let line: Value =
            serde_json::from_str(line).context("cannot parse the agent's connections")?;
        let end = |name: &str| -> Option<SocketAddr> { line[name].as_str()?.parse().ok() };
        let (Some(source), Some(destination), Some(protocol)) = (
            end("source"),
            end("destination"),
            protocol(&line["protocol"]),
        ) else {
            continue;
        };
        let seen = Seen {
            source: source.ip(),
            destination: destination.ip(),
            port: destination.port(),
            protocol,
            tunnelled: line["tunnelled"] == true,
        };
        into.entry(seen).or_default().open += 1;
    }
    Ok(())
}

fn compare(
    old: Option<&World>,
    new: &World,
    connections: &Connections,
    out: &mut impl Write,
) -> Result<Outcome> {
    let mut changes = 0;
    for (seen, count) in connections {
        let before = match old {
            Some(old) => decide(old, seen)?.0,
            None => count.recorded.unwrap_or(true),
        };
        let (after, why) = decide(new, seen)?;
        if before == after {
            continue;
        }
        changes += 1;
        let word = |allowed| if allowed { "allow" } else { "deny" };
        let name = |address: IpAddr| match new.party(&address.to_string()) {
            Ok(Party::Pod(pod, _)) => pod.name.to_string(),
            Ok(Party::Address(_)) | Err(_) => address.to_string(),
        };
        let protocol = match seen.protocol {
            Protocol::TCP => "TCP".to_owned(),
            Protocol::UDP => "UDP".to_owned(),
            Protocol::SCTP => "SCTP".to_owned(),
            other => format!("protocol {}", other.0),
        };
        writeln!(
            out,
            "{} -> {}:{} {protocol}: {} -> {} {why}; open {}, seen {}",
            name(seen.source),
            name(seen.destination),
            seen.port,
            word(before),
            word(after),
            count.open,
            count.seen,
        )?;
    }
    let total = connections.len();
    writeln!(
        out,
        "{changes} of {total} kinds of connections would change"
    )?;
    Ok(if changes == 0 {
        Outcome::Good
    } else {
        Outcome::Bad
    })
}

/// Whether both ends allow a connection, and the reason.
fn decide(world: &World, seen: &Seen) -> Result<(bool, String)> {
    let (from, to) = (seen.source.to_string(), seen.destination.to_string());
    let connection = Connection {
        from: world.party(&from)?.pod(),
        to: world.party(&to)?.pod(),
        source: seen.source,
        destination: seen.destination,
        protocol: seen.protocol,
        port: seen.port,
    };
    let evidence = match (seen.tunnelled, connection.on_one_node()) {
        (_, true) => Evidence::Node,
        (true, false) => Evidence::Tls,
        (false, false) => Evidence::Address,
    };
    let verdicts = world.evaluator.verdicts(&connection, evidence);
    let why = why(world, &connection, &verdicts);
    Ok((verdicts.allowed(), why))
}

/// The deciding verdict, in words.
fn why(world: &World, connection: &Connection<'_>, verdicts: &Verdicts) -> String {
    let refuses = |verdict: &Verdict| !verdict.allowed;
    let by_rule = |verdict: &Verdict| verdict.reason == Reason::Policy;
    let both = [
        (connection.from, verdicts.egress),
        (connection.to, verdicts.ingress),
    ];
    let find = |which: &dyn Fn(&Verdict) -> bool| {
        both.into_iter()
            .find_map(|(pod, verdict)| verdict.filter(which).map(|v| (pod, v)))
    };
    if let Some((pod, verdict)) = find(&refuses) {
        return world
            .words(pod, &verdict)
            .trim_start_matches("deny ")
            .to_owned();
    }
    if let Some(reason) = verdicts.refused {
        return format!("({})", reason.label());
    }
    match find(&by_rule) {
        Some((pod, verdict)) => world
            .words(pod, &verdict)
            .trim_start_matches("allow ")
            .to_owned(),
        None => "(no_policy)".to_owned(),
    }
}
