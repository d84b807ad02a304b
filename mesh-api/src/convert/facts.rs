// SPDX-License-Identifier: Apache-2.0
//! Objects that come one by one: each is read once, and only what it says is kept.
//!
//! For sources that tell of changes. Reading is as in [`super::convert()`], and so is everything
//! that is rejected; [`Facts::outcome`] puts together what holds now without reading anything
//! again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_plan::authentication;
use mesh_plan::cluster::{
    Cluster, Labels, ObjectName, ObjectRef, Pod, Rejection, Transport, Version,
};
use serde_json::Value;

use super::assemble::Known;
use super::kinds::kind_of;
use super::object::{Subject, head};
use super::{Fact, Kept, LastGood, Object, Options, Outcome, Warning, assemble, lasts, one};

/// What every known object says.
#[derive(Debug)]
pub struct Facts {
    options: Options,
    /// From an earlier run, for objects that are bad when they are first met.
    before: LastGood,
    entries: BTreeMap<ObjectRef, Entry>,
    /// UIDs of pods that were ready for tunnels once: they stay so while they exist. A report that
    /// shrinks, as that of an agent that starts again, must not send their traffic in clear.
    ready: BTreeSet<String>,
    /// As they were put together last, but for those that have changed since.
    known: Known,
    shared: Shared,
    changes: u64,
}

/// What pods of one workload have in common is kept once.
#[derive(Debug, Default)]
struct Shared {
    labels: BTreeSet<Arc<Labels>>,
    ports: BTreeSet<Arc<BTreeMap<(String, Transport), u16>>>,
    /// When to look what nobody has any more.
    full: usize,
}

impl Shared {
    fn share(&mut self, pod: &mut Pod) {
        one_of(&mut self.labels, &mut pod.labels);
        one_of(&mut self.ports, &mut pod.named_ports);
        if self.labels.len() + self.ports.len() > self.full {
            self.labels.retain(|known| Arc::strong_count(known) > 1);
            self.ports.retain(|known| Arc::strong_count(known) > 1);
            self.full = 64 + 2 * (self.labels.len() + self.ports.len());
        }
    }
}

fn one_of<T: Ord>(known: &mut BTreeSet<Arc<T>>, value: &mut Arc<T>) {
    match known.get(value) {
        Some(same) => *value = Arc::clone(same),
        None => drop(known.insert(Arc::clone(value))),
    }
}

#[derive(Debug, PartialEq)]
struct Entry {
    uid: String,
    fact: Option<Fact>,
    /// The generation that `fact` is of; 0 = not known, or of none.
    generation: i64,
    /// That of the newest version.
    newest: i64,
    /// The fact is what the object says, or said when it was last good.
    good: bool,
    said: Option<Box<Said>>,
}

/// What is wrong with an object, and what is odd.
#[derive(Debug, PartialEq)]
struct Said {
    rejections: Vec<Rejection>,
    warnings: Vec<Warning>,
}

impl Said {
    fn of(outcome: Outcome) -> Option<Box<Self>> {
        let is_silent = outcome.rejections.is_empty() && outcome.warnings.is_empty();
        (!is_silent).then(|| {
            Box::new(Self {
                rejections: outcome.rejections,
                warnings: outcome.warnings,
            })
        })
    }
}

impl Facts {
    /// Nothing is known yet but what was good in an earlier run.
    #[must_use]
    pub fn new(before: LastGood, options: Options) -> Self {
        Self {
            options,
            before,
            entries: BTreeMap::new(),
            ready: BTreeSet::new(),
            known: Known::default(),
            shared: Shared::default(),
            changes: 0,
        }
    }

    /// Takes a new or changed object. Returns its name; `None` = it is of no kind that is read.
    pub fn apply(&mut self, object: &Object) -> Option<ObjectRef> {
        let mut outcome = Outcome::default();
        let kind = match kind_of(&object.value) {
            Ok(kind) => kind?,
            Err(wrong) => return Some(self.reject(wrong.of(object))),
        };
        let head = match head(kind, object) {
            Ok(head) => head,
            Err(bad) => return Some(self.reject(bad.of(kind, object))),
        };
        let known = self.entries.remove(&head.object);
        let good = |entry: &&Entry| entry.uid == head.uid && entry.good;
        let old = known.as_ref().filter(good);
        let before = match old {
            Some(entry) => entry.fact.as_ref(),
            None => self.before.get(&head.object, &head.uid),
        };
        let subject = Subject {
            head: &head,
            value: &object.value,
            standalone: self.options.standalone,
        };
        let mut read = one(kind, &subject, before, &mut outcome);
        if let Some(Fact::Pod(fact)) = &mut read.fact
            && let Some(pod) = Arc::get_mut(&mut fact.pod)
        {
            self.shared.share(pod);
        }
        let newest = generation(&object.value);
        let generation = match (outcome.rejections.is_empty(), old) {
            (true, _) => newest,
            (false, Some(entry)) => entry.generation,
            (false, None) => 0,
        };
        let entry = Entry {
            uid: head.uid,
            fact: read.fact,
            generation,
            newest,
            good: read.good,
            said: Said::of(outcome),
        };
        // Most writes of a cluster are heartbeats and counts that nobody here reads.
        if known.as_ref() != Some(&entry) {
            self.changes += 1;
            for entry in known.iter().chain([&entry]) {
                touch(&mut self.known, &head.object, entry);
            }
        }
        self.entries.insert(head.object.clone(), entry);
        Some(head.object)
    }

    /// Forgets an object.
    pub fn remove(&mut self, object: &ObjectRef) {
        if let Some(entry) = self.entries.remove(object) {
            self.changes += 1;
            touch(&mut self.known, object, &entry);
        }
    }

    /// Forgets the objects of a kind that are not among these: for after a list.
    pub fn retain(&mut self, kind: &str, listed: &BTreeSet<ObjectRef>) {
        let gone = |object: &ObjectRef| object.kind == kind && !listed.contains(object);
        for (object, entry) in self.entries.extract_if(.., |object, _| gone(object)) {
            self.changes += 1;
            touch(&mut self.known, &object, &entry);
        }
    }

    /// Grows whenever [`Facts::outcome`] may have become another.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// How many objects are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What is good now, of what is to survive a restart.
    #[must_use]
    pub fn last_good(&self) -> LastGood {
        let kept = |(object, entry): (&ObjectRef, &Entry)| {
            let fact = entry.fact.as_ref();
            let fact = fact.filter(|fact| entry.good && lasts(fact))?;
            let kept = Kept {
                uid: entry.uid.clone(),
                fact: fact.clone(),
            };
            Some((object.clone(), kept))
        };
        LastGood {
            kept: self.entries.iter().filter_map(kept).collect(),
        }
    }

    /// What holds now, but for [`Outcome::last_good`], which is empty.
    #[must_use]
    pub fn outcome(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        for entry in self.entries.values() {
            if let Some(said) = &entry.said {
                outcome.rejections.extend(said.rejections.iter().cloned());
                outcome.warnings.extend(said.warnings.iter().cloned());
            }
        }
        let facts = self
            .entries
            .iter()
            .filter_map(|(object, entry)| Some((object, entry.fact.as_ref()?)));
        assemble::assemble(facts, self.options, &self.known, &mut outcome);
        let cluster = &mut outcome.cluster;
        // Without a control plane every pod may be an endpoint of every service.
        if !self.options.standalone {
            self.known.services.clone_from(&cluster.services);
        }
        self.known.policies.clone_from(&cluster.policies);
        if let Some(reported) = cluster.ready.take() {
            let ready = still_ready(cluster, &reported, &self.ready);
            if self.ready != ready {
                self.ready.clone_from(&ready);
            }
            cluster.ready = Some(ready);
        }
        cluster.versions = self.versions();
        outcome.rejections.sort();
        outcome.rejections.dedup();
        outcome.warnings.sort();
        outcome.warnings.dedup();
        outcome
    }

    fn versions(&self) -> BTreeMap<ObjectRef, Version> {
        self.entries
            .iter()
            .filter(|(_, entry)| match entry.fact {
                Some(Fact::Policy(_) | Fact::Authentication(_)) => true,
                Some(
                    Fact::Namespace(_)
                    | Fact::Node(_)
                    | Fact::Pod(_)
                    | Fact::Service(_)
                    | Fact::Slice(_)
                    | Fact::Report(_),
                )
                | None => entry.said.is_some(),
            })
            .map(|(object, entry)| {
                let version = Version {
                    uid: entry.uid.clone(),
                    generation: entry.generation,
                    newest: entry.newest,
                };
                (object.clone(), version)
            })
            .collect()
    }

    fn reject(&mut self, rejection: Rejection) -> ObjectRef {
        let object = rejection.object.clone();
        let said = Said {
            rejections: vec![rejection],
            warnings: Vec::new(),
        };
        let entry = Entry {
            uid: String::new(),
            fact: None,
            generation: 0,
            newest: 0,
            good: false,
            said: Some(Box::new(said)),
        };
        if self.entries.get(&object) != Some(&entry) {
            self.changes += 1;
            if let Some(known) = self.entries.insert(object.clone(), entry) {
                touch(&mut self.known, &object, &known);
            }
        }
        object
    }
}

/// The pods that are reported as ready, and those that were and are still in the mesh. Whoever joins
/// it again is ready when its node says so again: before that, answers to what it sends in clear
/// would be dropped.
fn still_ready(
    cluster: &Cluster,
    reported: &BTreeSet<String>,
    before: &BTreeSet<String>,
) -> BTreeSet<String> {
    let (mut reported, mut before) = (reported.iter().peekable(), before.iter().peekable());
    let is_ready = |(uid, pod): &(&String, &Arc<Pod>)| {
        while before.next_if(|other| other < uid).is_some() {}
        let was = before.next_if_eq(uid).is_some();
        let is = reported.next_if_eq(uid).is_some();
        is || (was && authentication::is_enrolled(cluster, pod))
    };
    let ready = cluster.pods.iter().filter(is_ready);
    ready.map(|(uid, _)| uid.clone()).collect()
}

/// Forgets how that was put together which an object is, or is part of.
fn touch(known: &mut Known, object: &ObjectRef, entry: &Entry) {
    match &entry.fact {
        Some(Fact::Service(_)) => {
            let name = ObjectName::new(&*object.namespace, &*object.name);
            known.services.remove(&name);
        }
        Some(Fact::Slice(slice)) => drop(known.services.remove(&slice.service)),
        Some(Fact::Policy(_)) => drop(known.policies.remove(object)),
        Some(
            Fact::Namespace(_)
            | Fact::Node(_)
            | Fact::Pod(_)
            | Fact::Authentication(_)
            | Fact::Report(_),
        )
        | None => {}
    }
}

fn generation(object: &Value) -> i64 {
    object
        .pointer("/metadata/generation")
        .and_then(Value::as_i64)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
