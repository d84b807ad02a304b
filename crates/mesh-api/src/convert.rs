// SPDX-License-Identifier: Apache-2.0
//! The door from Kubernetes objects to facts.
//!
//! [`convert()`] is pure: objects and what was good before go in; facts, what is good now,
//! rejections and warnings come out. The order of the objects does not matter. What cannot be used
//! is rejected by object and field, never guessed, and never opens anything: the last good version
//! stays in force, and where there is none the strictest reading does.

mod assemble;
mod cluster_network_policy;
mod endpoint_slice;
mod facts;
mod kinds;
mod mesh_authentication;
mod mesh_node;
mod mesh_policy;
mod namespace;
mod network_policy;
mod node;
mod object;
mod pod;
mod rules;
mod selector;
mod service;
mod validate;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use mesh_plan::cluster::{Authentication, Cluster, Namespace, Node, ObjectRef, Policy, Rejection};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::convert::endpoint_slice::SliceFact;
pub use crate::convert::facts::Facts;
use crate::convert::kinds::{Kind, kind_of};
use crate::convert::mesh_node::NodeReport;
use crate::convert::object::{Head, Issues, Subject, head};
use crate::convert::pod::PodFact;
use crate::convert::service::ServiceFact;

/// An object, and where it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Its file, for people; empty where it comes from an API server.
    pub origin: String,
    /// The object as JSON.
    pub value: Value,
}

/// What depends on where objects come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// There is no control plane behind the objects: `status.podIPs` is required, services without
    /// EndpointSlices get endpoints from their selector, the annotation `mesh.rs/netns` counts, and
    /// pods need no MeshNode to be ready for tunnels.
    pub standalone: bool,
}

/// Something that works, and probably not as meant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Warning {
    /// The object.
    pub object: ObjectRef,
    /// The field's path; empty = the object as a whole.
    pub field: String,
    /// What is to be known about it.
    pub what: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            write!(f, "{}: {}", self.object, self.what)
        } else {
            write!(f, "{}: {}: {}", self.object, self.field, self.what)
        }
    }
}

/// What [`convert()`] makes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The facts.
    pub cluster: Cluster,
    /// What is good now: for the next call.
    pub last_good: LastGood,
    /// What could not be used, and what holds instead, in order.
    pub rejections: Vec<Rejection>,
    /// What works and is probably not meant, in order.
    pub warnings: Vec<Warning>,
}

/// The last good version of every object. Serialised, it keeps what must survive a restart of the
/// agent: everything but pods and endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastGood {
    #[serde(serialize_with = "lasting")]
    kept: BTreeMap<ObjectRef, Kept>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// An object with another UID is another object.
    uid: String,
    fact: Fact,
}

/// What one object says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Fact {
    Namespace(Box<Namespace>),
    Node(Box<Node>),
    Pod(Box<PodFact>),
    Service(Arc<ServiceFact>),
    Slice(Box<SliceFact>),
    Policy(Arc<Policy>),
    Authentication(Box<Authentication>),
    Report(Box<NodeReport>),
}

fn lasting<S: Serializer>(kept: &BTreeMap<ObjectRef, Kept>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(kept.iter().filter(|(_, kept)| lasts(&kept.fact)))
}

/// Whether it must survive a restart.
fn lasts(fact: &Fact) -> bool {
    match fact {
        Fact::Pod(_) | Fact::Slice(_) | Fact::Report(_) => false,
        Fact::Namespace(_)
        | Fact::Node(_)
        | Fact::Service(_)
        | Fact::Policy(_)
        | Fact::Authentication(_) => true,
    }
}

impl LastGood {
    fn get(&self, object: &ObjectRef, uid: &str) -> Option<&Fact> {
        let kept = self.kept.get(object);
        kept.filter(|kept| kept.uid == uid).map(|kept| &kept.fact)
    }
}

/// Turns objects of any kinds into facts. Kinds that the mesh does not read are passed over.
#[must_use]
pub fn convert(objects: &[Object], previous: &LastGood, options: Options) -> Outcome {
    let mut outcome = Outcome::default();
    let mut facts: Vec<(ObjectRef, Fact)> = Vec::new();
    for (kind, head, object) in admitted(objects, &mut outcome) {
        let subject = Subject {
            head: &head,
            value: &object.value,
            standalone: options.standalone,
        };
        let before = previous.get(&head.object, &head.uid);
        let read = one(kind, &subject, before, &mut outcome);
        let Some(fact) = read.fact else { continue };
        if read.good {
            let kept = Kept {
                uid: head.uid,
                fact: fact.clone(),
            };
            outcome.last_good.kept.insert(head.object.clone(), kept);
        }
        facts.push((head.object, fact));
    }
    let facts = facts.iter().map(|(object, fact)| (object, fact));
    assemble::assemble(facts, options, &mut outcome);
    outcome.rejections.sort();
    outcome.rejections.dedup();
    outcome.warnings.sort();
    outcome.warnings.dedup();
    outcome
}

/// The objects of known kinds that have a name, each once, by kind and name.
fn admitted<'a>(
    objects: &'a [Object],
    outcome: &mut Outcome,
) -> Vec<(&'static Kind, Head, &'a Object)> {
    let mut admitted = Vec::new();
    for object in objects {
        let kind = match kind_of(&object.value) {
            Ok(Some(kind)) => kind,
            Ok(None) => continue,
            Err(rejection) => {
                outcome.rejections.push(rejection.of(object));
                continue;
            }
        };
        match head(kind, object) {
            Ok(head) => admitted.push((kind, head, object)),
            Err(bad) => outcome.rejections.push(bad.of(kind, object)),
        }
    }
    admitted.sort_by(|a, b| (&a.1.object, &a.2.origin).cmp(&(&b.1.object, &b.2.origin)));
    let mut unique: Vec<(&'static Kind, Head, &'a Object)> = Vec::with_capacity(admitted.len());
    for next in admitted {
        match unique.last() {
            Some(first) if first.1.object == next.1.object => outcome.warnings.push(Warning {
                object: next.1.object,
                field: String::new(),
                what: format!(
                    "is in {} and in {}: the first is used, the second ignored",
                    place(&first.2.origin),
                    place(&next.2.origin)
                ),
            }),
            _ => unique.push(next),
        }
    }
    unique
}

fn place(origin: &str) -> &str {
    if origin.is_empty() {
        "the same source"
    } else {
        origin
    }
}

/// What holds for one object.
struct Read {
    fact: Option<Fact>,
    /// It is what the object says, or said when it was last good.
    good: bool,
}

/// What one object says, or said when it was last good, or says at its strictest.
fn one(kind: &Kind, subject: &Subject<'_>, before: Option<&Fact>, outcome: &mut Outcome) -> Read {
    let object = &subject.head.object;
    let mut issues = Issues::default();
    let fact = (kind.parse)(subject, &mut issues);
    let Issues { problems, warnings } = issues;
    outcome
        .warnings
        .extend(warnings.into_iter().map(|(field, what)| Warning {
            object: object.clone(),
            field,
            what,
        }));
    if problems.is_empty() {
        return Read { fact, good: true };
    }
    let (fact, good, consequence) = match before {
        Some(fact) => (
            Some(fact.clone()),
            true,
            "the last good version stays in force".to_owned(),
        ),
        None => {
            let held = (kind.rejected)(subject);
            (held.fact, false, held.consequence)
        }
    };
    outcome
        .rejections
        .extend(problems.into_iter().map(|(field, why)| Rejection {
            object: object.clone(),
            field,
            why,
            consequence: consequence.clone(),
        }));
    Read { fact, good }
}
