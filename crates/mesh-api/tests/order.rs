// SPDX-License-Identifier: Apache-2.0
//! The order of events does not matter: the same valid objects give the same maps, whatever their
//! history. Objects of the truth tables are created, changed, deleted and created again in random
//! orders, through the incremental converter and the incremental compiler. After the last event, the
//! maps are those of a node that reads the objects for the first time.
//!
//! There is one exception: if the newest version of an object is rejected, its last good version stays in
//! force, so it matters whether there was one. That has tests of its own.

use std::fs;
use std::path::Path;

use mesh_api::manifests::Format;
use mesh_api::truth::{Manifest, tables};
use mesh_api::{IncrementalConverter, Kind, LastGood, Object, Options, convert};
use mesh_plan::diff::{apply, diff};
use mesh_plan::{ClusterSnapshot, Compiler, Plan, Rejection, compile};
use serde_json::{Value, json};

#[path = "order/random.rs"]
mod random;

use random::Random;

const STANDALONE: Options = Options { standalone: true };
const NODE: &str = "n1";
/// The number of histories per table.
const HISTORIES: u64 = 6;
/// The number of objects in a history, in addition to namespaces and nodes.
const SAMPLE: usize = 60;

impl Random {
    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, self.below(last + 1));
        }
    }
}

fn object(value: Value) -> Object {
    let origin = String::new();
    Object { origin, value }
}

fn kind(value: &Value) -> &str {
    value["kind"].as_str().expect("a kind")
}

fn table_kind(value: &Value) -> Kind {
    let found = Kind::ALL.iter().find(|row| row.name() == kind(value));
    *found.expect("a kind that is read")
}

fn is_valid(value: &Value) -> bool {
    let outcome = convert(&[object(value.clone())], &LastGood::default(), STANDALONE);
    outcome.rejections.is_empty()
}

/// The valid objects of every table.
fn worlds() -> Vec<Vec<Value>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mesh-test/truth");
    let files = fs::read_dir(root).expect("the truth tables are there");
    let mut paths: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
    paths.sort();
    let mut worlds = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).expect("it can be read");
        for table in tables(&text, Format::Yaml).expect("tables") {
            let inline = table.manifests.into_iter().map(|manifest| match manifest {
                Manifest::Object(value) => value,
                Manifest::Path(path) => unreachable!("{path} is not inline"),
            });
            worlds.push(inline.filter(is_valid).collect());
        }
    }
    worlds
}

/// Another valid version of an object: the content of another object of its kind, under its own name.
fn variant(random: &mut Random, of: &Value, all: &[Value]) -> Option<Value> {
    let same: Vec<&Value> = all.iter().filter(|o| kind(o) == kind(of)).collect();
    let donor = same[random.below(same.len())];
    let mut made = of.clone();
    for field in ["spec", "status", "endpoints", "ports"] {
        if let Some(says) = donor.get(field) {
            made[field] = says.clone();
        }
    }
    if let Some(labels) = donor["metadata"].get("labels") {
        made["metadata"]["labels"] = labels.clone();
    }
    if random.chance(20) {
        made["metadata"]["uid"] = json!(format!("another-{}", random.below(3)));
    }
    is_valid(&made).then_some(made)
}

#[derive(Clone, Debug)]
enum Event {
    Come(Value),
    Go(Value),
}

/// A random history that ends with these objects.
fn history(random: &mut Random, last: &[Value], all: &[Value]) -> Vec<Event> {
    let mut lives: Vec<Vec<Event>> = Vec::new();
    for object in all {
        let stays = last.contains(object);
        let mut life = Vec::new();
        if !stays && !random.chance(30) {
            continue;
        }
        for _ in 0..random.below(3) {
            life.extend(variant(random, object, all).map(Event::Come));
            if random.chance(30) {
                life.push(Event::Go(object.clone()));
            }
        }
        life.push(Event::Come(object.clone()));
        if !stays {
            life.push(Event::Go(object.clone()));
        } else if random.chance(20) {
            // Told twice.
            life.push(Event::Come(object.clone()));
        }
        life.reverse();
        lives.push(life);
    }
    // One after the other, but never twice the same history: whose turn it is, is drawn.
    let mut turns: Vec<usize> = Vec::new();
    for (index, life) in lives.iter().enumerate() {
        turns.extend(std::iter::repeat_n(index, life.len()));
    }
    random.shuffle(&mut turns);
    let next = |index: usize| lives[index].pop().expect("as many turns as events");
    turns.into_iter().map(next).collect()
}

/// A node that applies events, and its maps.
struct Follower {
    converter: IncrementalConverter,
    compiler: Compiler,
    plan: Plan,
    maps: Plan,
    rejections: Vec<Rejection>,
    operations: usize,
}

impl Follower {
    fn new() -> Self {
        Self {
            converter: IncrementalConverter::new(LastGood::default(), STANDALONE),
            compiler: Compiler::new(NODE),
            plan: Plan::default(),
            maps: Plan::default(),
            rejections: Vec::new(),
            operations: 0,
        }
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::Come(value) => {
                self.converter.apply(table_kind(value), value);
            }
            Event::Go(value) => {
                let mut other = IncrementalConverter::new(LastGood::default(), STANDALONE);
                let name = other.apply(table_kind(value), value);
                self.converter.remove(&name);
            }
        }
    }

    fn learn(&mut self, value: &Value) {
        self.take(&Event::Come(value.clone()));
    }

    /// Compiles the current snapshot and applies the difference to the maps.
    fn pass(&mut self) {
        let outcome = self.converter.outcome();
        let (plan, rejections) = self
            .compiler
            .compile(&outcome.cluster.into(), &Default::default());
        let ops = diff(&self.plan, &plan);
        self.operations += ops.len();
        ops.iter().for_each(|op| apply(&mut self.maps, op));
        self.maps.pods.retain(|uid, _| plan.pods.contains_key(uid));
        self.plan = plan;
        self.rejections = outcome.rejections.into_iter().chain(rejections).collect();
    }
}

/// The part of a plan that is in the maps: everything except names.
fn maps(plan: &Plan) -> Plan {
    let mut maps = plan.clone();
    maps.names = Default::default();
    for pod in maps.pods.values_mut() {
        let view = pod.view;
        *pod = Default::default();
        pod.view = view;
    }
    maps
}

/// The snapshot, plan and rejections of a node that reads objects for the first time.
fn fresh(objects: &[Value]) -> (ClusterSnapshot, Plan, Vec<Rejection>) {
    let objects: Vec<Object> = objects.iter().cloned().map(object).collect();
    let outcome = convert(&objects, &LastGood::default(), STANDALONE);
    let (plan, rejections) = compile(&outcome.cluster, NODE);
    let rejections = outcome.rejections.into_iter().chain(rejections).collect();
    (outcome.cluster, plan, rejections)
}

#[test]
fn any_history_of_the_same_objects_gives_the_same_maps() {
    let mut random = Random(0x6f72_6465);
    let (mut events, mut passes, mut operations, mut disputes) = (0, 0, 0, 0);
    for world in worlds() {
        let is_frame = |value: &Value| matches!(kind(value), "Namespace" | "Node");
        let (frame, mut rest): (Vec<Value>, Vec<Value>) = world.into_iter().partition(is_frame);
        for _ in 0..HISTORIES {
            random.shuffle(&mut rest);
            let sample = &rest[..SAMPLE.min(rest.len())];
            let all: Vec<Value> = frame.iter().chain(sample).cloned().collect();
            let last: Vec<Value> = all.iter().filter(|_| random.chance(80)).cloned().collect();
            let (_, plan, rejections) = fresh(&last);
            let mut node = Follower::new();
            for event in history(&mut random, &last, &all) {
                node.take(&event);
                events += 1;
                if random.chance(25) {
                    node.pass();
                    passes += 1;
                    disputes += usize::from(!node.rejections.is_empty());
                }
            }
            node.pass();
            let context = || {
                format!(
                    "{:#?}",
                    last.iter().map(Value::to_string).collect::<Vec<_>>()
                )
            };
            assert!(node.maps == maps(&plan), "the maps differ: {}", context());
            assert!(node.plan == plan, "the names differ: {}", context());
            assert_eq!(node.rejections, rejections, "{}", context());
            operations += node.operations;
        }
    }
    println!(
        "{events} events, {passes} passes, {operations} operations, {disputes} with rejections"
    );
    // The histories are worth something.
    assert!(events > 3_000 && passes > 500 && operations > 10_000);
    assert!(disputes > 50, "addresses were never in dispute: {disputes}");
}

/// The object with a spec that every kind rejects.
fn broken(value: &Value) -> Value {
    let mut made = value.clone();
    made["spec"] = json!(7);
    assert!(!is_valid(&made), "{made}");
    made
}

#[test]
fn rejected_update_depends_only_on_the_last_good_version() {
    let kinds = [
        "NetworkPolicy",
        "MeshPolicy",
        "ClusterNetworkPolicy",
        "ClusterMeshPolicy",
        "MeshAuthentication",
    ];
    let mut random = Random(7);
    let mut tried = [0; 5];
    for world in worlds() {
        let of_kinds: Vec<Value> = world
            .iter()
            .filter(|value| kinds.contains(&kind(value)))
            .cloned()
            .collect();
        for _ in 0..12 {
            let good = &of_kinds[random.below(of_kinds.len())];
            let others: Vec<Value> = world.iter().filter(|o| *o != good).cloned().collect();
            let mut first = Follower::new();
            others.iter().for_each(|o| first.learn(o));
            let mut never = Follower::new();
            others.iter().for_each(|o| never.learn(o));
            first.pass();
            let without = first.maps.clone();

            // Good once, whatever came between, then rejected.
            if let Some(other) = variant(&mut random, good, &world)
                .filter(|v| v["metadata"].get("uid") == good["metadata"].get("uid"))
            {
                first.learn(&other);
                first.pass();
            }
            first.learn(good);
            first.pass();
            let in_force = first.maps.clone();
            assert!(in_force == maps(&fresh(&world).1), "{good}");
            first.learn(&broken(good));
            first.pass();
            assert!(
                first.maps == in_force,
                "the last good version stays: {good}"
            );
            assert!(!first.rejections.is_empty(), "{good}");

            // Never good: as a node that reads it for the first time, after any history of others.
            never.learn(&broken(good));
            never.pass();
            let mut all = others.clone();
            all.push(broken(good));
            assert!(never.maps == maps(&fresh(&all).1), "{good}");

            // Another good version, and the object's end, leave nothing of either past.
            for node in [&mut first, &mut never] {
                node.learn(good);
                node.pass();
                assert!(node.maps == in_force, "a good version counts: {good}");
                node.learn(&broken(good));
                node.take(&Event::Go(good.clone()));
                node.pass();
                assert!(node.maps == without, "an object that is gone: {good}");
            }
            let position = kinds
                .iter()
                .position(|k| *k == kind(good))
                .expect("of them");
            tried[position] += 1;
        }
    }
    assert!(tried.iter().all(|n| *n > 2), "{tried:?}");
}
