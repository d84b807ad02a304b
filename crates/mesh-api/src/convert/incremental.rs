// SPDX-License-Identifier: Apache-2.0
//! Converts objects one by one, for sources that report changes.
//!
//! Each object is parsed once, and only its parsed content is kept. Parsing and rejection are the same
//! as in [`super::convert()`]. [`IncrementalConverter::outcome`] assembles only the parts of the
//! snapshot that a changed object belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_plan::authentication;
use mesh_plan::cluster::{
    Authentication, ClusterSnapshot, Labels, Namespace, Node, ObjectName, ObjectRef, Pod,
    Rejection, Service, Transport, Version,
};
use mesh_plan::shared::Shared;
use serde_json::Value;

use super::assemble;
use super::object::{RawObject, head};
use super::{Kept, Kind, LastGood, Options, Outcome, ParsedObject, Warning, read};

/// The parsed content of every known object, and the snapshot assembled from it.
#[derive(Debug)]
pub struct IncrementalConverter {
    options: Options,
    /// The last good versions of an earlier run, for objects that are invalid when first seen.
    before: LastGood,
    entries: BTreeMap<ObjectRef, Entry>,
    /// The objects that have rejections or warnings.
    diagnosed: BTreeSet<ObjectRef>,
    /// The snapshot, valid except for the stale parts.
    cluster: ClusterSnapshot,
    stale: Stale,
    interned: Interned,
    changes: u64,
}

/// The parts of the snapshot that must be assembled again.
#[derive(Debug, Default)]
struct Stale {
    /// The whole snapshot: at the start, and while objects depend on each other in unusual ways.
    all: bool,
    /// The readiness of these pods, by UID.
    pods: BTreeSet<Arc<str>>,
    /// The readiness of all pods in these namespaces.
    namespaces: BTreeSet<String>,
    /// The readiness of all pods on these nodes.
    nodes: BTreeSet<String>,
    /// These services and their endpoints.
    services: BTreeSet<ObjectName>,
}

/// Values that the pods of one workload share, stored once.
#[derive(Debug, Default)]
struct Interned {
    labels: BTreeSet<Arc<Labels>>,
    ports: BTreeSet<Arc<BTreeMap<(String, Transport), u16>>>,
    /// The number of values at which unused ones are removed.
    full: usize,
}

impl Interned {
    fn share(&mut self, pod: &mut Pod) {
        intern(&mut self.labels, &mut pod.labels);
        intern(&mut self.ports, &mut pod.named_ports);
        if self.labels.len() + self.ports.len() > self.full {
            self.labels.retain(|known| Arc::strong_count(known) > 1);
            self.ports.retain(|known| Arc::strong_count(known) > 1);
            self.full = 64 + 2 * (self.labels.len() + self.ports.len());
        }
    }
}

fn intern<T: Ord>(known: &mut BTreeSet<Arc<T>>, value: &mut Arc<T>) {
    match known.get(value) {
        Some(same) => *value = Arc::clone(same),
        None => drop(known.insert(Arc::clone(value))),
    }
}

#[derive(Debug, PartialEq)]
struct Entry {
    uid: String,
    parsed: Option<ParsedObject>,
    /// The generation of `parsed`; 0 if it is unknown or `parsed` is a fallback.
    generation: i64,
    /// The generation of the newest version of the object.
    newest: i64,
    /// True if `parsed` is the current or the last good version, false for a fallback.
    good: bool,
    diagnostics: Option<Box<Diagnostics>>,
}

/// The rejections and warnings of one object.
#[derive(Debug, PartialEq)]
struct Diagnostics {
    rejections: Vec<Rejection>,
    warnings: Vec<Warning>,
}

impl Diagnostics {
    fn of(outcome: Outcome) -> Option<Box<Self>> {
        let is_empty = outcome.rejections.is_empty() && outcome.warnings.is_empty();
        (!is_empty).then(|| {
            Box::new(Self {
                rejections: outcome.rejections,
                warnings: outcome.warnings,
            })
        })
    }
}

impl Entry {
    /// The version for status reports: of policies, and of objects with rejections or warnings.
    fn version(&self) -> Option<Version> {
        let is_reported = match self.parsed {
            Some(ParsedObject::Policy(_) | ParsedObject::Authentication(_)) => true,
            Some(
                ParsedObject::Namespace(_)
                | ParsedObject::Node(_)
                | ParsedObject::Pod(_)
                | ParsedObject::Service(_)
                | ParsedObject::Slice(_)
                | ParsedObject::Report(_),
            )
            | None => self.diagnostics.is_some(),
        };
        is_reported.then(|| Version {
            uid: self.uid.clone(),
            generation: self.generation,
            newest: self.newest,
        })
    }
}

impl IncrementalConverter {
    /// Creates a converter that knows no objects, only the last good versions of an earlier run.
    #[must_use]
    pub fn new(before: LastGood, options: Options) -> Self {
        Self {
            options,
            before,
            entries: BTreeMap::new(),
            diagnosed: BTreeSet::new(),
            cluster: ClusterSnapshot::default(),
            stale: Stale {
                all: true,
                ..Stale::default()
            },
            interned: Interned::default(),
            changes: 0,
        }
    }

    /// Applies a new or changed object of a kind, and returns its name. The object's own `apiVersion`
    /// and `kind` are not needed.
    pub fn apply(&mut self, kind: Kind, value: &Value) -> ObjectRef {
        let mut outcome = Outcome::default();
        let head = match head(kind, value) {
            Ok(head) => head,
            Err(bad) => return self.reject(bad.of(kind, "")),
        };
        let known = self.entries.remove(&head.object);
        let good = |entry: &&Entry| entry.uid == head.uid && entry.good;
        let old = known.as_ref().filter(good);
        let before = match old {
            Some(entry) => entry.parsed.as_ref(),
            None => self.before.get(&head.object, &head.uid),
        };
        let raw = RawObject {
            head: &head,
            value,
            standalone: self.options.standalone,
        };
        let mut read = read(kind, &raw, before, &mut outcome);
        if let Some(ParsedObject::Pod(parsed)) = &mut read.parsed
            && let Some(pod) = Arc::get_mut(&mut parsed.pod)
        {
            self.interned.share(pod);
        }
        let newest = generation(value);
        let generation = match (outcome.rejections.is_empty(), old) {
            (true, _) => newest,
            (false, Some(entry)) => entry.generation,
            (false, None) => 0,
        };
        let entry = Entry {
            uid: head.uid,
            parsed: read.parsed,
            generation,
            newest,
            good: read.good,
            diagnostics: Diagnostics::of(outcome),
        };
        let object = head.object;
        // Most writes in a cluster are heartbeats and counters, which do not change the snapshot.
        let is_changed = known.as_ref() != Some(&entry);
        self.entries.insert(object.clone(), entry);
        if is_changed {
            self.note_change(&object, known);
        }
        object
    }

    /// Removes an object.
    pub fn remove(&mut self, object: &ObjectRef) {
        if let Some(entry) = self.entries.remove(object) {
            self.note_change(object, Some(entry));
        }
    }

    /// Removes the objects of a kind that a completed list does not contain.
    pub fn retain(&mut self, kind: Kind, listed: &BTreeSet<ObjectRef>) {
        let gone = |object: &ObjectRef| object.kind == kind.name() && !listed.contains(object);
        let gone: Vec<(ObjectRef, Entry)> = (self.entries)
            .extract_if(.., |object, _| gone(object))
            .collect();
        for (object, entry) in gone {
            self.note_change(&object, Some(entry));
        }
    }

    /// Adds the last good versions that an earlier run had of a kind which cannot be listed now.
    pub fn restore(&mut self, kind: Kind) {
        let is_missing = |(object, _): &(&ObjectRef, &Kept)| {
            object.kind == kind.name() && !self.entries.contains_key(*object)
        };
        let restored: Vec<(ObjectRef, Entry)> = (self.before.kept.iter().filter(is_missing))
            .map(|(object, kept)| {
                let entry = Entry {
                    uid: kept.uid.clone(),
                    parsed: Some(kept.parsed.clone()),
                    generation: 0,
                    newest: 0,
                    good: true,
                    diagnostics: None,
                };
                (object.clone(), entry)
            })
            .collect();
        for (object, entry) in restored {
            self.entries.insert(object.clone(), entry);
            self.note_change(&object, None);
        }
    }

    /// The number of known objects of a kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        let kinds = self.entries.keys().map(|object| object.kind.as_str());
        kinds.filter(|name| *name == kind.name()).count()
    }

    /// A counter that increases whenever [`Self::outcome`] may have changed.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// The number of known objects.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no objects are known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The last good versions that must survive a restart.
    #[must_use]
    pub fn last_good(&self) -> LastGood {
        let kept = |(object, entry): (&ObjectRef, &Entry)| {
            let parsed = entry.parsed.as_ref();
            let parsed = parsed.filter(|parsed| entry.good && parsed.is_persistent())?;
            let kept = Kept {
                uid: entry.uid.clone(),
                parsed: parsed.clone(),
            };
            Some((object.clone(), kept))
        };
        LastGood {
            kept: self.entries.iter().filter_map(kept).collect(),
        }
    }

    /// The current outcome. [`Outcome::last_good`] is empty; use [`Self::last_good`].
    #[must_use]
    pub fn outcome(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        let diagnosed = self.diagnosed.iter().filter_map(|object| {
            let entry = self.entries.get(object)?;
            entry.diagnostics.as_deref()
        });
        for Diagnostics {
            rejections,
            warnings,
        } in diagnosed
        {
            outcome.rejections.extend(rejections.iter().cloned());
            outcome.warnings.extend(warnings.iter().cloned());
        }
        if self.stale.all || self.stale.lost_namespace(&self.cluster) {
            self.assemble(&mut outcome);
        } else {
            self.assemble_parts();
        }
        outcome.cluster = self.cluster.clone();
        outcome.sort_messages();
        outcome
    }

    /// Assembles the whole snapshot.
    fn assemble(&mut self, outcome: &mut Outcome) {
        let objects = self
            .entries
            .iter()
            .filter_map(|(object, entry)| Some((object, entry.parsed.as_ref()?)));
        let rejected = outcome.rejections.len();
        assemble::assemble(objects, self.options, outcome);
        let before = self.cluster.ready.take().unwrap_or_default();
        let mut cluster = std::mem::take(&mut outcome.cluster);
        if let Some(reported) = cluster.ready.take() {
            cluster.ready = Some(still_ready(&cluster, &reported, &before).into());
        }
        cluster.versions = self.versions();
        self.cluster = cluster;
        self.stale = Stale {
            // Without a control plane every pod may be an endpoint of every service, and of two pods
            // with one UID only the first is used, which depends on both.
            all: self.options.standalone || outcome.rejections.len() > rejected,
            ..Stale::default()
        };
    }

    /// Assembles the stale parts.
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

    /// A service with the endpoints of its EndpointSlices.
    fn service(&self, name: &ObjectName) -> Option<Service> {
        let object = ObjectRef::new(Kind::Service.name(), &*name.namespace, &*name.name);
        let Some(ParsedObject::Service(parsed)) = &self.entries.get(&object)?.parsed else {
            return None;
        };
        let first = ObjectRef::new(Kind::EndpointSlice.name(), &*name.namespace, "");
        let slices = self.entries.range(&first..).take_while(|(object, _)| {
            object.kind == first.kind && object.namespace == first.namespace
        });
        let slices = slices.filter_map(|(_, entry)| match &entry.parsed {
            Some(ParsedObject::Slice(slice)) if slice.service == *name => {
                Some(slice.endpoints.as_slice())
            }
            _ => None,
        });
        Some(assemble::with(parsed, slices.collect::<Vec<_>>().concat()))
    }

    /// Whether the MeshNode of a pod's node reports that the node accepts tunnels for the pod.
    fn is_reported(&self, pod: &Pod) -> bool {
        let report = self
            .entries
            .get(&ObjectRef::new(Kind::MeshNode.name(), "", &*pod.node));
        match report.and_then(|entry| entry.parsed.as_ref()) {
            Some(ParsedObject::Report(report)) => {
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

    /// Records that an object changed: updates the snapshot, or marks the affected parts as stale.
    fn note_change(&mut self, object: &ObjectRef, was: Option<Entry>) {
        self.changes += 1;
        let now = self.entries.get(object);
        match now.and_then(|entry| entry.diagnostics.as_ref()) {
            Some(_) => drop(self.diagnosed.insert(object.clone())),
            None => drop(self.diagnosed.remove(object)),
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
        let was = was.and_then(|entry| entry.parsed);
        let now = now.and_then(|entry| entry.parsed.as_ref());
        if was.as_ref() != now {
            let cluster = &mut self.cluster;
            if let Some(parsed) = &was {
                self.stale.removed(cluster, object, parsed);
            }
            if let Some(parsed) = now {
                self.stale.added(cluster, object, parsed);
            }
        }
    }

    fn reject(&mut self, rejection: Rejection) -> ObjectRef {
        let object = rejection.object.clone();
        let diagnostics = Diagnostics {
            rejections: vec![rejection],
            warnings: Vec::new(),
        };
        let entry = Entry {
            uid: String::new(),
            parsed: None,
            generation: 0,
            newest: 0,
            good: false,
            diagnostics: Some(Box::new(diagnostics)),
        };
        if self.entries.get(&object) != Some(&entry) {
            let known = self.entries.insert(object.clone(), entry);
            self.note_change(&object, known);
        }
        object
    }
}

/// The pods that are ready for tunnels: those that are reported, and those that were ready before and
/// are still enrolled. A report becomes smaller when an agent restarts, and that must not make traffic
/// to these pods plaintext. A pod that is enrolled again is not ready until its node reports it: before
/// that, the replies to its plaintext traffic would be dropped.
fn still_ready(
    cluster: &ClusterSnapshot,
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
    /// Whether a namespace was deleted that pods may still be in.
    fn lost_namespace(&self, cluster: &ClusterSnapshot) -> bool {
        let mut names = self.namespaces.iter();
        names.any(|name| !cluster.namespaces.contains_key(name))
    }

    /// Removes the content of an object from the snapshot.
    fn removed(
        &mut self,
        cluster: &mut ClusterSnapshot,
        object: &ObjectRef,
        parsed: &ParsedObject,
    ) {
        let name = || ObjectName::new(&*object.namespace, &*object.name);
        match parsed {
            ParsedObject::Namespace(_) => {
                cluster.namespaces.remove(&object.name);
                self.namespaces.insert(object.name.clone());
            }
            ParsedObject::Node(_) => drop(cluster.nodes.remove(&object.name)),
            ParsedObject::Pod(parsed) => {
                cluster.pods.remove(&parsed.pod.uid);
                self.pods.insert(Arc::clone(&parsed.pod.uid));
                let namespace = cluster.namespaces.get(&parsed.pod.name.namespace);
                // It may be the last pod in a namespace that has no Namespace object.
                self.all |= namespace.is_none_or(|namespace| namespace.uid.is_empty());
            }
            ParsedObject::Service(_) => drop(self.services.insert(name())),
            ParsedObject::Slice(slice) => drop(self.services.insert(slice.service.clone())),
            ParsedObject::Policy(_) => drop(cluster.policies.remove(object)),
            ParsedObject::Authentication(_) => drop(cluster.authentications.remove(&name())),
            ParsedObject::Report(_) => drop(self.nodes.insert(object.name.clone())),
        }
    }

    /// Adds the content of an object to the snapshot.
    fn added(&mut self, cluster: &mut ClusterSnapshot, object: &ObjectRef, parsed: &ParsedObject) {
        let name = || ObjectName::new(&*object.namespace, &*object.name);
        match parsed {
            ParsedObject::Namespace(namespace) => {
                let name = object.name.clone();
                self.namespaces.insert(name.clone());
                cluster.namespaces.insert(name, Namespace::clone(namespace));
            }
            ParsedObject::Node(node) => {
                let node = Node::clone(node);
                cluster.nodes.insert(object.name.clone(), node);
            }
            ParsedObject::Pod(parsed) => {
                let pod = &parsed.pod;
                self.pods.insert(Arc::clone(&pod.uid));
                let is_named = cluster.namespaces.contains_key(&pod.name.namespace);
                let other = cluster.pods.insert(Arc::clone(&pod.uid), Arc::clone(pod));
                self.all |= !is_named || other.is_some();
            }
            ParsedObject::Service(_) => drop(self.services.insert(name())),
            ParsedObject::Slice(slice) => drop(self.services.insert(slice.service.clone())),
            ParsedObject::Policy(policy) => {
                cluster.policies.insert(object.clone(), Arc::clone(policy));
            }
            ParsedObject::Authentication(authentication) => {
                let authentication = Authentication::clone(authentication);
                cluster.authentications.insert(name(), authentication);
            }
            ParsedObject::Report(_) => drop(self.nodes.insert(object.name.clone())),
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
