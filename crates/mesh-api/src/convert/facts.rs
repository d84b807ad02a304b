// SPDX-License-Identifier: Apache-2.0
//! Objects that come one by one: each is read once, and only what it says is kept.
//!
//! For sources that tell of changes. Reading is as in [`super::convert()`], and so is everything
//! that is rejected; [`Facts::outcome`] says what holds now without reading anything again, and puts
//! together only what an object that has changed is part of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_plan::authentication;
use mesh_plan::cluster::{
    Authentication, Cluster, Labels, Namespace, Node, ObjectName, ObjectRef, Pod, Rejection,
    Service, Transport, Version,
};
use mesh_plan::shared::Shared;
use serde_json::Value;

use super::assemble;
use super::kinds::kind_of;
use super::object::{Subject, head};
use super::{Fact, Kept, LastGood, Object, Options, Outcome, Warning, lasts, one};

/// What every known object says.
#[derive(Debug)]
pub struct Facts {
    options: Options,
    /// From an earlier run, for objects that are bad when they are first met.
    before: LastGood,
    entries: BTreeMap<ObjectRef, Entry>,
    /// Objects of which something is wrong or odd.
    said: BTreeSet<ObjectRef>,
    /// What holds, but for what is stale.
    cluster: Cluster,
    stale: Stale,
    common: Common,
    changes: u64,
}

/// What of the facts is to be put together again.
#[derive(Debug, Default)]
struct Stale {
    /// All: at first, and while anything is out of the ordinary.
    all: bool,
    /// Whether these pods are ready, by UID.
    pods: BTreeSet<Arc<str>>,
    /// The same of all pods of a namespace.
    namespaces: BTreeSet<String>,
    /// The same of all pods of a node.
    nodes: BTreeSet<String>,
    /// Services, with their endpoints.
    services: BTreeSet<ObjectName>,
}

/// What pods of one workload have in common is kept once.
#[derive(Debug, Default)]
struct Common {
    labels: BTreeSet<Arc<Labels>>,
    ports: BTreeSet<Arc<BTreeMap<(String, Transport), u16>>>,
    /// When to look what nobody has any more.
    full: usize,
}

impl Common {
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

impl Entry {
    /// For status: of policies and the like, and of what something is said about.
    fn version(&self) -> Option<Version> {
        let is_reported = match self.fact {
            Some(Fact::Policy(_) | Fact::Authentication(_)) => true,
            Some(
                Fact::Namespace(_)
                | Fact::Node(_)
                | Fact::Pod(_)
                | Fact::Service(_)
                | Fact::Slice(_)
                | Fact::Report(_),
            )
            | None => self.said.is_some(),
        };
        is_reported.then(|| Version {
            uid: self.uid.clone(),
            generation: self.generation,
            newest: self.newest,
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
            said: BTreeSet::new(),
            cluster: Cluster::default(),
            stale: Stale {
                all: true,
                ..Stale::default()
            },
            common: Common::default(),
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
            self.common.share(pod);
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
        let object = head.object;
        // Most writes of a cluster are heartbeats and counts that nobody here reads.
        let is_news = known.as_ref() != Some(&entry);
        self.entries.insert(object.clone(), entry);
        if is_news {
            self.turn(&object, known);
        }
        Some(object)
    }

    /// Forgets an object.
    pub fn remove(&mut self, object: &ObjectRef) {
        if let Some(entry) = self.entries.remove(object) {
            self.turn(object, Some(entry));
        }
    }

    /// Forgets the objects of a kind that are not among these: for after a list.
    pub fn retain(&mut self, kind: &str, listed: &BTreeSet<ObjectRef>) {
        let gone = |object: &ObjectRef| object.kind == kind && !listed.contains(object);
        let gone: Vec<(ObjectRef, Entry)> = (self.entries)
            .extract_if(.., |object, _| gone(object))
            .collect();
        for (object, entry) in gone {
            self.turn(&object, Some(entry));
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
        let said = self.said.iter().filter_map(|object| {
            let entry = self.entries.get(object)?;
            entry.said.as_deref()
        });
        for said in said {
            outcome.rejections.extend(said.rejections.iter().cloned());
            outcome.warnings.extend(said.warnings.iter().cloned());
        }
        if self.stale.all || self.stale.lost_namespace(&self.cluster) {
            self.assemble(&mut outcome);
        } else {
            self.assemble_parts();
        }
        outcome.cluster = self.cluster.clone();
        outcome.rejections.sort();
        outcome.rejections.dedup();
        outcome.warnings.sort();
        outcome.warnings.dedup();
        outcome
    }

    /// Puts everything together.
    fn assemble(&mut self, outcome: &mut Outcome) {
        let facts = self
            .entries
            .iter()
            .filter_map(|(object, entry)| Some((object, entry.fact.as_ref()?)));
        let said = outcome.rejections.len();
        assemble::assemble(facts, self.options, outcome);
        let before = self.cluster.ready.take().unwrap_or_default();
        let mut cluster = std::mem::take(&mut outcome.cluster);
        if let Some(reported) = cluster.ready.take() {
            cluster.ready = Some(still_ready(&cluster, &reported, &before).into());
        }
        cluster.versions = self.versions();
        self.cluster = cluster;
        self.stale = Stale {
            // Without a control plane every pod may be an endpoint of every service; and which of two
            // pods with one UID is known depends on both.
            all: self.options.standalone || outcome.rejections.len() > said,
            ..Stale::default()
        };
    }

    /// Puts together what is stale.
    fn assemble_parts(&mut self) {
        let stale = std::mem::take(&mut self.stale);
        for name in stale.services {
            let service = self.service(&name).map(Arc::new);
            if assemble::is_api_server(&name) {
                let endpoints = service.iter().flat_map(|service| &service.endpoints);
                self.cluster.api_servers = endpoints.map(|endpoint| endpoint.address).collect();
            }
            match service {
                Some(service) => drop(self.cluster.services.insert(name, service)),
                None => drop(self.cluster.services.remove(&name)),
            }
        }
        let Some(mut ready) = self.cluster.ready.take() else {
            return;
        };
        let pods = &self.cluster.pods;
        for uid in &stale.pods {
            if ready.contains(uid) && !pods.contains_key(uid) {
                ready.remove(uid);
            }
        }
        let concerned: Vec<(&Arc<str>, &Arc<Pod>)> =
            if stale.namespaces.is_empty() && stale.nodes.is_empty() {
                let pods = stale.pods.iter().map(|uid| pods.get_key_value(uid));
                pods.flatten().collect()
            } else {
                let is_concerned = |(uid, pod): &(&Arc<str>, &Arc<Pod>)| {
                    stale.nodes.contains(&pod.node)
                        || stale.namespaces.contains(&pod.name.namespace)
                        || stale.pods.contains(*uid)
                };
                pods.iter().filter(is_concerned).collect()
            };
        for (uid, pod) in concerned {
            let was = ready.contains(uid);
            let is =
                self.is_reported(pod) || (was && authentication::is_enrolled(&self.cluster, pod));
            match (was, is) {
                (false, true) => drop(ready.insert(Arc::clone(uid))),
                (true, false) => drop(ready.remove(uid)),
                (true, true) | (false, false) => {}
            }
        }
        self.cluster.ready = Some(ready);
    }

    /// A service with its endpoints.
    fn service(&self, name: &ObjectName) -> Option<Service> {
        let object = ObjectRef::new("Service", &*name.namespace, &*name.name);
        let Some(Fact::Service(fact)) = &self.entries.get(&object)?.fact else {
            return None;
        };
        let first = ObjectRef::new("EndpointSlice", &*name.namespace, "");
        let slices = self.entries.range(&first..).take_while(|(object, _)| {
            object.kind == first.kind && object.namespace == first.namespace
        });
        let slices = slices.filter_map(|(_, entry)| match &entry.fact {
            Some(Fact::Slice(slice)) if slice.service == *name => Some(slice.endpoints.as_slice()),
            _ => None,
        });
        Some(assemble::with(fact, slices.collect::<Vec<_>>().concat()))
    }

    /// Whether a pod's own node says that it accepts tunnels for it.
    fn is_reported(&self, pod: &Pod) -> bool {
        let report = self
            .entries
            .get(&ObjectRef::new("MeshNode", "", &*pod.node));
        match report.and_then(|entry| entry.fact.as_ref()) {
            Some(Fact::Report(report)) => {
                let namespace = self.cluster.namespaces.get(&pod.name.namespace);
                assemble::accepts_all(report, namespace) || report.pods.contains(&*pod.uid)
            }
            _ => false,
        }
    }

    fn versions(&self) -> Shared<BTreeMap<ObjectRef, Version>> {
        let version = |(object, entry): (&ObjectRef, &Entry)| {
            let version = entry.version()?;
            Some((object.clone(), version))
        };
        self.entries.iter().filter_map(version).collect()
    }

    /// Takes note of an object that is not what it was.
    fn turn(&mut self, object: &ObjectRef, was: Option<Entry>) {
        self.changes += 1;
        let now = self.entries.get(object);
        match now.and_then(|entry| entry.said.as_ref()) {
            Some(_) => drop(self.said.insert(object.clone())),
            None => drop(self.said.remove(object)),
        }
        if self.stale.all {
            return;
        }
        let version = now.and_then(Entry::version);
        if version != was.as_ref().and_then(Entry::version) {
            match version {
                Some(version) => drop(self.cluster.versions.insert(object.clone(), version)),
                None => drop(self.cluster.versions.remove(object)),
            }
        }
        let was = was.and_then(|entry| entry.fact);
        let now = now.and_then(|entry| entry.fact.as_ref());
        if was.as_ref() != now {
            let cluster = &mut self.cluster;
            if let Some(fact) = &was {
                self.stale.leaves(cluster, object, fact);
            }
            if let Some(fact) = now {
                self.stale.comes(cluster, object, fact);
            }
        }
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
            let known = self.entries.insert(object.clone(), entry);
            self.turn(&object, known);
        }
        object
    }
}

/// The pods that are reported as ready, and those that were and are still in the mesh: a report that
/// shrinks, as that of an agent that starts again, must not send their traffic in clear. Whoever joins
/// it again is ready when its node says so again: before that, answers to what it sends in clear
/// would be dropped.
fn still_ready(
    cluster: &Cluster,
    reported: &BTreeSet<Arc<str>>,
    before: &BTreeSet<Arc<str>>,
) -> BTreeSet<Arc<str>> {
    let (mut reported, mut before) = (reported.iter().peekable(), before.iter().peekable());
    let is_ready = |(uid, pod): &(&Arc<str>, &Arc<Pod>)| {
        while before.next_if(|other| other < uid).is_some() {}
        let was = before.next_if_eq(uid).is_some();
        let is = reported.next_if_eq(uid).is_some();
        is || (was && authentication::is_enrolled(cluster, pod))
    };
    let ready = cluster.pods.iter().filter(is_ready);
    ready.map(|(uid, _)| Arc::clone(uid)).collect()
}

impl Stale {
    /// Whether an object is gone that pods may still name.
    fn lost_namespace(&self, cluster: &Cluster) -> bool {
        let mut names = self.namespaces.iter();
        names.any(|name| !cluster.namespaces.contains_key(name))
    }

    /// What an object says holds no more.
    fn leaves(&mut self, cluster: &mut Cluster, object: &ObjectRef, fact: &Fact) {
        let name = || ObjectName::new(&*object.namespace, &*object.name);
        match fact {
            Fact::Namespace(_) => {
                cluster.namespaces.remove(&object.name);
                self.namespaces.insert(object.name.clone());
            }
            Fact::Node(_) => drop(cluster.nodes.remove(&object.name)),
            Fact::Pod(fact) => {
                cluster.pods.remove(&fact.pod.uid);
                self.pods.insert(Arc::clone(&fact.pod.uid));
                let namespace = cluster.namespaces.get(&fact.pod.name.namespace);
                // It may have been the last that names a namespace that nothing describes.
                self.all |= namespace.is_none_or(|namespace| namespace.uid.is_empty());
            }
            Fact::Service(_) => drop(self.services.insert(name())),
            Fact::Slice(slice) => drop(self.services.insert(slice.service.clone())),
            Fact::Policy(_) => drop(cluster.policies.remove(object)),
            Fact::Authentication(_) => drop(cluster.authentications.remove(&name())),
            Fact::Report(_) => drop(self.nodes.insert(object.name.clone())),
        }
    }

    /// What an object says holds.
    fn comes(&mut self, cluster: &mut Cluster, object: &ObjectRef, fact: &Fact) {
        let name = || ObjectName::new(&*object.namespace, &*object.name);
        match fact {
            Fact::Namespace(namespace) => {
                let name = object.name.clone();
                self.namespaces.insert(name.clone());
                cluster.namespaces.insert(name, Namespace::clone(namespace));
            }
            Fact::Node(node) => {
                let node = Node::clone(node);
                cluster.nodes.insert(object.name.clone(), node);
            }
            Fact::Pod(fact) => {
                let pod = &fact.pod;
                self.pods.insert(Arc::clone(&pod.uid));
                let is_named = cluster.namespaces.contains_key(&pod.name.namespace);
                let other = cluster.pods.insert(Arc::clone(&pod.uid), Arc::clone(pod));
                self.all |= !is_named || other.is_some();
            }
            Fact::Service(_) => drop(self.services.insert(name())),
            Fact::Slice(slice) => drop(self.services.insert(slice.service.clone())),
            Fact::Policy(policy) => {
                cluster.policies.insert(object.clone(), Arc::clone(policy));
            }
            Fact::Authentication(authentication) => {
                let authentication = Authentication::clone(authentication);
                cluster.authentications.insert(name(), authentication);
            }
            Fact::Report(_) => drop(self.nodes.insert(object.name.clone())),
        }
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
