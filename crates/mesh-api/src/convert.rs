// SPDX-License-Identifier: Apache-2.0
//! Converts Kubernetes objects to a cluster snapshot.
//!
//! [`convert()`] is pure: it takes objects and the last good version of each object, and returns the
//! snapshot, the new last good versions, rejections and warnings. The order of the objects does not
//! matter. An invalid object is rejected by object and field, is never guessed at, and never allows
//! more than a valid one: its last good version stays in force, or, without one, the strictest
//! interpretation applies.

mod assemble;
mod cluster_network_policy;
mod endpoint_slice;
mod incremental;
mod kinds;
mod mesh_authentication;
mod mesh_node;
mod mesh_policy;
mod mesh_traffic_policy;
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

use mesh_plan::cluster::{
    Authentication, ClusterSnapshot, Namespace, Node, ObjectRef, Policy, Rejection,
};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::convert::endpoint_slice::ParsedSlice;
pub use crate::convert::incremental::IncrementalConverter;
use crate::convert::kinds::kind_of;
pub use crate::convert::kinds::{Kind, Origin, Scope};
use crate::convert::mesh_node::NodeReport;
use crate::convert::object::{Head, Issues, RawObject, head};
use crate::convert::pod::ParsedPod;
use crate::convert::service::ParsedService;

/// A Kubernetes object and the file that it was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// The file name for messages; empty for an object from an API server.
    pub origin: String,
    /// The object as JSON.
    pub value: Value,
}

/// Options that depend on the source of the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// True if the objects have no control plane: `status.podIPs` is required, services without
    /// EndpointSlices get endpoints from their selector, the annotation `mesh.rs/netns` is used, and
    /// pods are ready for tunnels without a MeshNode.
    pub standalone: bool,
}

/// A part of a valid object that probably does not do what its author intended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Warning {
    /// The object.
    pub object: ObjectRef,
    /// The path of the field; empty for the object as a whole.
    pub field: String,
    /// The effect of the field.
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

/// The result of a conversion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The cluster snapshot.
    pub cluster: ClusterSnapshot,
    /// The last good version of every object, for the next conversion.
    pub last_good: LastGood,
    /// The rejected objects and their consequences, sorted.
    pub rejections: Vec<Rejection>,
    /// The warnings, sorted.
    pub warnings: Vec<Warning>,
}

impl Outcome {
    fn sort_messages(&mut self) {
        self.rejections.sort();
        self.rejections.dedup();
        self.warnings.sort();
        self.warnings.dedup();
    }
}

/// The last good version of every object. Its serialized form has what must survive a restart of
/// the agent: everything except pods, endpoints and node reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastGood {
    #[serde(serialize_with = "serialize_persistent")]
    kept: BTreeMap<ObjectRef, Kept>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// An object with the same name and another UID is a new object.
    uid: String,
    #[serde(rename = "fact")]
    parsed: ParsedObject,
}

/// The content of one object after parsing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum ParsedObject {
    Namespace(Box<Namespace>),
    Node(Box<Node>),
    Pod(Box<ParsedPod>),
    Service(Arc<ParsedService>),
    Slice(Box<ParsedSlice>),
    Policy(Arc<Policy>),
    Authentication(Box<Authentication>),
    Report(Box<NodeReport>),
}

fn serialize_persistent<S: Serializer>(
    kept: &BTreeMap<ObjectRef, Kept>,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_map(kept.iter().filter(|(_, kept)| kept.parsed.is_persistent()))
}

impl ParsedObject {
    /// Whether the object must survive a restart of the agent.
    fn is_persistent(&self) -> bool {
        match self {
            Self::Pod(_) | Self::Slice(_) | Self::Report(_) => false,
            Self::Namespace(_)
            | Self::Node(_)
            | Self::Service(_)
            | Self::Policy(_)
            | Self::Authentication(_) => true,
        }
    }
}

impl LastGood {
    fn get(&self, object: &ObjectRef, uid: &str) -> Option<&ParsedObject> {
        let kept = self.kept.get(object);
        kept.filter(|kept| kept.uid == uid).map(|kept| &kept.parsed)
    }
}

/// Converts objects of any kinds to a cluster snapshot. Objects of other kinds than [`Kind`] are
/// ignored.
#[must_use]
pub fn convert(objects: &[Object], previous: &LastGood, options: Options) -> Outcome {
    let mut outcome = Outcome::default();
    let mut all: Vec<(ObjectRef, ParsedObject)> = Vec::new();
    for (kind, head, object) in admitted(objects, &mut outcome) {
        let raw = RawObject {
            head: &head,
            value: &object.value,
            standalone: options.standalone,
        };
        let before = previous.get(&head.object, &head.uid);
        let read = read(kind, &raw, before, &mut outcome);
        let Some(parsed) = read.parsed else { continue };
        if read.good {
            let kept = Kept {
                uid: head.uid,
                parsed: parsed.clone(),
            };
            outcome.last_good.kept.insert(head.object.clone(), kept);
        }
        all.push((head.object, parsed));
    }
    let all = all.iter().map(|(object, parsed)| (object, parsed));
    assemble::assemble(all, options, &mut outcome);
    outcome.sort_messages();
    outcome
}

/// The objects of known kinds that have a name, each once, sorted by kind and name.
fn admitted<'a>(objects: &'a [Object], outcome: &mut Outcome) -> Vec<(Kind, Head, &'a Object)> {
    let mut admitted = Vec::new();
    for object in objects {
        let kind = match kind_of(&object.value) {
            Ok(Some(kind)) => kind,
            Ok(None) => continue,
            Err(wrong) => {
                outcome.rejections.push(wrong.of(object));
                continue;
            }
        };
        match head(kind, &object.value) {
            Ok(head) => admitted.push((kind, head, object)),
            Err(bad) => outcome.rejections.push(bad.of(kind, &object.origin)),
        }
    }
    admitted.sort_by(|a, b| (&a.1.object, &a.2.origin).cmp(&(&b.1.object, &b.2.origin)));
    let mut unique: Vec<(Kind, Head, &'a Object)> = Vec::with_capacity(admitted.len());
    for next in admitted {
        match unique.last() {
            Some(first) if first.1.object == next.1.object => outcome.warnings.push(Warning {
                object: next.1.object,
                field: String::new(),
                what: format!(
                    "defined in {} and again in {}; the second definition is ignored",
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

/// The version of an object that is in force.
struct Read {
    parsed: Option<ParsedObject>,
    /// True for the current or the last good version, false for a fallback.
    good: bool,
}

/// Parses one object. For an invalid object, gives its last good version or its fallback.
fn read(
    kind: Kind,
    raw: &RawObject<'_>,
    before: Option<&ParsedObject>,
    outcome: &mut Outcome,
) -> Read {
    let object = &raw.head.object;
    let mut issues = Issues::default();
    let parsed = kind.parse(raw, &mut issues);
    let Issues { problems, warnings } = issues;
    outcome
        .warnings
        .extend(warnings.into_iter().map(|(field, what)| Warning {
            object: object.clone(),
            field,
            what,
        }));
    if problems.is_empty() {
        return Read { parsed, good: true };
    }
    let (parsed, good, consequence) = match before {
        Some(parsed) => (
            Some(parsed.clone()),
            true,
            "the last good version stays in force".to_owned(),
        ),
        None => {
            let fallback = kind.fallback(raw);
            (fallback.parsed, false, fallback.consequence)
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
    Read { parsed, good }
}
