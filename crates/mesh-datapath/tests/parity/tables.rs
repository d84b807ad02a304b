// SPDX-License-Identifier: Apache-2.0
//! The committed truth tables, tested against the kernel's maps: the plan of each node is written to
//! real maps, and each row is tested in each address family that both endpoints have. `meshctl policy
//! test` tests the same rows against the compiler, `cargo xtask truth` with real connections.
//!
//! A row is tested with its first packet at the gate of each endpoint, if the gate knows the peer as
//! the row assumes. Otherwise it is decided over the maps' content, read back from the kernel, and
//! counted by the cause.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use mesh_api::manifests::{Format, flatten};
use mesh_api::truth::{Check, Expected, Known, Manifest, Table, tables};
use mesh_api::{LastGood, Object, Options, convert};
use mesh_common::identity::Evidence;
use mesh_common::path;
use mesh_common::policy::{Direction, Question, decide};
use mesh_common::{Endpoint, Port, Protocol, Reason};
use mesh_plan::cluster::{ClusterSnapshot, Pod, Transport};
use mesh_plan::evaluate::Evaluator;
use mesh_plan::{compile, modes};
use serde_json::json;

use super::held::{MAPS, Node};

/// The causes why an endpoint of a row is tested with the maps' content instead of a packet.
mod why {
    pub(super) const TUNNEL: &str =
        "arrives through a tunnel: the agent decides it, by certificate";
    pub(super) const EVIDENCE: &str = "assumes other evidence than there is here";
    pub(super) const ITSELF: &str = "to itself: no gate is passed";
}

/// The test of an endpoint with a packet.
const AT_THE_GATE: &str = "by a packet at the gate";
/// The test of TCP to a pod. For pods that do not deny silently, sk_lookup calls the same function.
const AS_SILENT: &str = "by a SYN at the gate of a pod that refuses in silence";

/// The most pairs of pods of a node that swap their policies, one after the other.
const SWAPS: usize = 4;

const LABEL: &str = "mesh.rs/dataplane";

/// The numbers of rows by test, and the rows that failed.
#[derive(Default)]
struct Tally {
    /// The number of rows, each counted once for each address family.
    rows: u32,
    /// The number of rows tested with packets only.
    by_gates: u32,
    /// The number of endpoints by test.
    ways: BTreeMap<&'static str, u32>,
    /// The number of rows with another policy in the other address family, by IP blocks.
    other_by_family: u32,
    /// The rows that failed, with the UIDs of their pods.
    wrong: Vec<(String, Vec<String>)>,
}

/// The cluster of a table, and a kernel for each of its nodes.
struct World {
    cluster: ClusterSnapshot,
    evaluator: Evaluator,
    nodes: BTreeMap<String, Node>,
}

/// A row in one address family. An endpoint without a pod is an address that no known pod has.
struct Row<'a> {
    from: Option<&'a Pod>,
    to: Option<&'a Pod>,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    port: Port,
    known: Known,
}

/// The outcome of a row at one endpoint.
struct End {
    /// Whether the traffic is allowed, as plaintext or by a tunnel.
    passes: bool,
    /// Whether policy alone allows the traffic.
    policy: bool,
    way: &'static str,
}

/// Returns the objects of a table; with `enroll`, every namespace is enrolled.
fn objects(table: &Table, enroll: bool) -> Vec<Object> {
    let mut objects = Vec::new();
    for manifest in &table.manifests {
        let Manifest::Object(value) = manifest else {
            unreachable!("the committed tables hold their objects")
        };
        let mut flat = Vec::new();
        flatten(value.clone(), 1, &mut flat).expect("objects");
        objects.extend(flat.into_iter().map(|mut value| {
            if enroll && value["kind"] == "Namespace" {
                let labels = &mut value["metadata"]["labels"];
                if labels.is_null() {
                    *labels = json!({});
                }
                labels[LABEL] = json!("enabled");
            }
            Object {
                origin: "table".to_owned(),
                value,
            }
        }));
    }
    objects
}

/// Returns whether a table itself sets the enrollment of its namespaces or pods.
fn sets_enrollment(table: &Table) -> bool {
    let labelled = |object: &Object| object.value["metadata"]["labels"][LABEL].is_string();
    objects(table, false).iter().any(labelled)
}

impl World {
    fn new(table: &Table, enroll: bool) -> Self {
        let options = Options { standalone: true };
        let cluster = convert(&objects(table, enroll), &LastGood::default(), options).cluster;
        let names: BTreeSet<_> = cluster.pods.values().map(|pod| pod.node.clone()).collect();
        let node = |name: String| {
            let node = Node::new(compile(&cluster, &name).0);
            (name, node)
        };
        Self {
            nodes: names.into_iter().map(node).collect(),
            evaluator: Evaluator::new(cluster.clone()),
            cluster,
        }
    }

    /// Returns the pod that a text names, and its addresses.
    fn party<'a>(cluster: &'a ClusterSnapshot, text: &str) -> (Option<&'a Pod>, Vec<IpAddr>) {
        let pods = || cluster.pods.values().map(|pod| &**pod);
        if let Ok(address) = text.parse() {
            let pod = pods().find(|pod| pod.addresses.contains(&address));
            return (pod, vec![address]);
        }
        let pod = pods().find(|pod| pod.name.to_string() == text);
        let pod = pod.expect("a pod or an address");
        let addresses = match pod.host_network {
            true => cluster.nodes[&pod.node].addresses.iter().copied().collect(),
            false => pod.addresses.to_vec(),
        };
        (Some(pod), addresses)
    }

    /// Returns a row for each address family that both endpoints have, IPv4 first.
    fn rows<'a>(cluster: &'a ClusterSnapshot, check: &Check) -> Vec<Row<'a>> {
        let (from, sources) = Self::party(cluster, &check.from);
        let (to, destinations) = Self::party(cluster, &check.to);
        let port = check.port.parse().unwrap_or_else(|_name| {
            let pod = to.expect("an address has no named ports");
            pod.named_ports[&(check.port.clone(), check.protocol)]
        });
        let families: [fn(&IpAddr) -> bool; 2] = [IpAddr::is_ipv4, IpAddr::is_ipv6];
        let row = |is: fn(&IpAddr) -> bool| {
            Some(Row {
                from,
                to,
                source: sources.iter().copied().find(is)?,
                destination: destinations.iter().copied().find(is)?,
                protocol: match check.protocol {
                    Transport::Tcp => Protocol::TCP,
                    Transport::Udp => Protocol::UDP,
                    Transport::Sctp => Protocol::SCTP,
                },
                port: Port::new(port),
                known: check.evidence,
            })
        };
        let rows: Vec<_> = families.into_iter().filter_map(row).collect();
        assert!(!rows.is_empty(), "{check:?}: no family that both ends have");
        rows
    }

    /// Tests every row of a table.
    fn ask(&mut self, checks: &[Check], tally: &mut Tally) {
        let Self {
            cluster,
            evaluator,
            nodes,
        } = self;
        for check in checks {
            let rows = Self::rows(cluster, check);
            let first = rows[0].compiled(evaluator);
            for row in &rows {
                // The row itself is about the first family: blocks may have only that.
                let differs = row.compiled(evaluator) != first;
                tally.other_by_family += u32::from(differs);
                row.ask(check, differs, nodes, tally);
            }
        }
    }
}

impl<'a> Row<'a> {
    /// Returns whether policy allows the row, by the compiler.
    fn compiled(&self, evaluator: &Evaluator) -> bool {
        let ends = [self.source, self.destination];
        let connection = evaluator.connection(ends, self.protocol, self.port.get());
        let evidence = match self.known {
            Known::Address => Evidence::Address,
            Known::Tls => Evidence::Tls,
        };
        evaluator.verdicts(&connection, evidence).policy_allows()
    }

    /// Returns the pod of an endpoint with policy in a direction, and the peer's address.
    fn side(&self, direction: Direction) -> Option<(&'a Pod, IpAddr)> {
        let (pod, other) = match direction {
            Direction::Ingress => (self.to?, self.source),
            Direction::Egress => (self.from?, self.destination),
        };
        (!pod.host_network).then_some((pod, other))
    }

    /// Returns whether policy alone allows the row at one endpoint, over the maps' content.
    fn policy(&self, node: &Node, uid: &str, direction: Direction, known: Known) -> bool {
        let (_, addr) = self.side(direction).expect("the pod is of this row");
        if self.source == self.destination {
            return true;
        }
        let peer = path::who(&node.back, &addr.into()).id;
        let evidence = match known {
            _ if !peer.is_workload() => Evidence::None,
            Known::Address => Evidence::Address,
            Known::Tls => Evidence::Tls,
        };
        let question = Question {
            set: node.view(uid).set,
            direction,
            peer,
            addr: addr.into(),
            evidence,
            protocol: self.protocol,
            port: self.port,
        };
        decide(&node.back, &question).allowed
    }

    /// Returns whether the source's node would tunnel the row.
    fn is_tunnelled(&self, nodes: &BTreeMap<String, Node>) -> bool {
        let Some((pod, _)) = self.side(Direction::Egress) else {
            return false;
        };
        let node = &nodes[&pod.node];
        let peer = path::who(&node.back, &self.destination.into());
        self.protocol == Protocol::TCP && path::tunnels(&node.view(&pod.uid), &peer)
    }

    /// Returns the evidence for the peer that the kernel has at an endpoint.
    fn known_to_the_gate(&self, nodes: &BTreeMap<String, Node>, direction: Direction) -> Known {
        let ends = self.from.zip(self.to);
        let on_one_node = ends.is_some_and(|(from, to)| from.node == to.node);
        let proven = on_one_node || (direction == Direction::Egress && self.is_tunnelled(nodes));
        if proven { Known::Tls } else { Known::Address }
    }

    /// Returns why an endpoint cannot be tested with a packet; `None` = it can.
    fn not_at_the_gate(
        &self,
        nodes: &BTreeMap<String, Node>,
        direction: Direction,
    ) -> Option<&'static str> {
        let (pod, _) = self.side(direction)?;
        if self.source == self.destination {
            return Some(why::ITSELF);
        }
        let arrives = direction == Direction::Ingress && self.protocol == Protocol::TCP;
        if arrives && self.is_tunnelled(nodes) {
            return Some(why::TUNNEL);
        }
        let known = self.known_to_the_gate(nodes, direction);
        let by = |known| self.policy(&nodes[&pod.node], &pod.uid, direction, known);
        // A mode can deny plaintext without proof of identity, whatever policy says.
        let matters = by(Known::Address) != by(Known::Tls) || (arrives && self.known == Known::Tls);
        (self.known != known && matters).then_some(why::EVIDENCE)
    }

    /// Returns the outcome of the row at one endpoint; `None` = nothing is tested there.
    fn end(&self, nodes: &mut BTreeMap<String, Node>, direction: Direction) -> Option<End> {
        let (pod, _) = self.side(direction)?;
        let ends = match direction {
            Direction::Egress => [self.source, self.destination],
            Direction::Ingress => [self.destination, self.source],
        };
        let ends = ends.map(|ip| Endpoint::new(ip.into(), self.port));
        let why = self.not_at_the_gate(nodes, direction);
        let node = nodes.get_mut(&pod.node).expect("a node");
        let policy = self.policy(node, &pod.uid, direction, self.known);
        let Some(way) = why else {
            let outcome = node.gate(&pod.uid, direction, ends, self.protocol);
            // A bypass means that the row would go through a tunnel, which is allowed.
            let refusal = outcome.drop.map(|(reason, _)| reason);
            let silent = direction == Direction::Ingress && self.protocol == Protocol::TCP;
            return Some(End {
                passes: matches!(refusal, None | Some(Reason::Bypass)),
                policy: match refusal {
                    None | Some(Reason::Bypass) => true,
                    Some(reason) if reason.is_policy_or_missing() => false,
                    // A mode denies, before or after policy.
                    Some(_) => policy,
                },
                way: if silent { AS_SILENT } else { AT_THE_GATE },
            });
        };
        let (back, view) = (&node.back, &node.view(&pod.uid));
        let by_mode = match direction {
            Direction::Egress => modes::outbound(back, view, ends[1], self.protocol).is_ok(),
            // Modes allow tunnels.
            Direction::Ingress if way == why::TUNNEL || self.known == Known::Tls => true,
            Direction::Ingress => {
                let from = &ends[1].addr;
                modes::inbound(back, view, from, self.protocol, self.port).is_ok()
            }
        };
        Some(End {
            passes: policy && by_mode,
            policy,
            way,
        })
    }

    fn ask(
        &self,
        check: &Check,
        differs: bool,
        nodes: &mut BTreeMap<String, Node>,
        tally: &mut Tally,
    ) {
        let egress = self.end(nodes, Direction::Egress);
        let ingress = self.end(nodes, Direction::Ingress);
        let ends = || [&egress, &ingress].into_iter().flatten();
        tally.rows += 1;
        assert!(ends().next().is_some(), "nothing is asked by {check:?}");
        for end in ends() {
            *tally.ways.entry(end.way).or_default() += 1;
        }
        let by_gates = ends().all(|end| [AT_THE_GATE, AS_SILENT].contains(&end.way));
        tally.by_gates += u32::from(by_gates);
        let policy = |end: &Option<End>| end.as_ref().is_none_or(|end| end.policy);
        for (what, expected, got) in [
            ("", check.expect, ends().all(|end| end.passes)),
            ("ingress ", check.expect_ingress, policy(&ingress)),
            ("egress ", check.expect_egress, policy(&egress)),
        ] {
            let as_expected = |expected| (expected == Expected::of(got)) != differs;
            if expected.is_none_or(as_expected) {
                continue;
            }
            let pods = [self.from, self.to].into_iter().flatten();
            let ways: Vec<_> = ends().map(|end| end.way).collect();
            let (from, to) = (self.source, self.destination);
            let wrong = format!("{what}{check:?}: {from} -> {to}: {got}, {ways:?}");
            let pods = pods.map(|pod| pod.uid.to_string()).collect();
            tally.wrong.push((wrong, pods));
        }
    }
}

fn committed() -> Vec<(String, Table)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mesh-test/truth");
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("the tables") {
        let path = entry.expect("a table").path();
        let text = fs::read_to_string(&path).expect("a table");
        let name = path.file_stem().expect("a name").to_string_lossy();
        let tables = tables(&text, Format::Yaml).expect("tables");
        found.extend(tables.into_iter().map(|table| (name.to_string(), table)));
    }
    found
}

#[expect(clippy::print_stdout, reason = "numbers are for people to read")]
fn holds(what: &str, tally: &Tally) {
    println!(
        "{what}: {} rows, {} of them by gates alone; {} whose policy is another in IPv6",
        tally.rows, tally.by_gates, tally.other_by_family
    );
    for (way, ends) in &tally.ways {
        println!("    {ends:5} ends: {way}");
    }
    let wrong: Vec<_> = tally.wrong.iter().map(|(text, _)| text.as_str()).collect();
    assert!(wrong.is_empty(), "{what}: {}", wrong.join("\n"));
    assert!(tally.by_gates * 2 > tally.rows, "{what}: too few by gates");
}

#[test]
fn truth_tables_hold_in_the_kernel() {
    let (mut plain, mut enrolled) = (Tally::default(), Tally::default());
    for (_, table) in committed() {
        World::new(&table, false).ask(&table.checks, &mut plain);
        if !sets_enrollment(&table) {
            World::new(&table, true).ask(&table.checks, &mut enrolled);
        }
    }
    holds("as the tables say", &plain);
    holds("with every namespace in the mesh", &enrolled);
}

/// The tables depend on each of the maps: rows fail without it.
#[test]
fn truth_tables_fail_without_any_one_map() {
    let mut noticed: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, table) in committed() {
        let mut world = World::new(&table, false);
        for name in MAPS {
            world.nodes.values_mut().for_each(|node| node.empty(name));
            let mut tally = Tally::default();
            world.ask(&table.checks, &mut tally);
            *noticed.entry(name).or_default() += tally.wrong.len();
            world.nodes.values_mut().for_each(Node::write);
        }
        let mut again = Tally::default();
        world.ask(&table.checks, &mut again);
        assert_eq!(again.wrong, [], "written again");
    }
    println!("rows that differ without a map: {noticed:?}");
    assert!(noticed.values().all(|rows| *rows > 0), "{noticed:?}");
}

/// The tables depend on each pod's own policy set: rows fail with another pod's.
#[test]
fn truth_tables_fail_only_for_pods_with_swapped_policies() {
    // By file: how many swaps, and how many of them made rows differ.
    let mut swaps: BTreeMap<String, [u32; 2]> = BTreeMap::new();
    for (name, table) in committed() {
        let mut world = World::new(&table, false);
        let nodes: Vec<_> = world.nodes.keys().cloned().collect();
        let [done, noticed] = swaps.entry(name.clone()).or_default();
        for node in &nodes {
            let held = &world.nodes[node];
            let set = |uid: &String| held.view(uid).set;
            let uids = held.uids();
            let different = |pair: &&[String]| set(&pair[0]) != set(&pair[1]);
            let pairs = uids.windows(2).filter(different).take(SWAPS);
            let pairs: Vec<_> = pairs.map(<[String]>::to_vec).collect();
            for pair in &pairs {
                let spoil = |world: &mut World| {
                    let node = world.nodes.get_mut(node).expect("a node");
                    node.swap_policy([&pair[0], &pair[1]]);
                };
                spoil(&mut world);
                let mut tally = Tally::default();
                world.ask(&table.checks, &mut tally);
                spoil(&mut world);
                for (text, ends) in &tally.wrong {
                    let about = ends.iter().any(|uid| pair.contains(uid));
                    assert!(about, "{name}: {pair:?} swapped: {text}");
                }
                *done += 1;
                *noticed += u32::from(!tally.wrong.is_empty());
            }
        }
    }
    println!("swaps, and those that made rows differ: {swaps:?}");
    assert!(swaps.values().all(|[_, noticed]| *noticed > 0), "{swaps:?}");
}
