// SPDX-License-Identifier: Apache-2.0
//! Namespaces.

use mesh_plan::cluster::{Labels, Namespace};

use super::Fact;
use super::object::{Held, Issues, Subject};

/// The label that enrols, on namespaces and pods.
const DATAPLANE: &str = "mesh.rs/dataplane";
const NAME: &str = "kubernetes.io/metadata.name";

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    let mut labels = subject.labels();
    check_enrolment(&labels, &["enabled", "disabled", "required"], issues);
    labels.insert(NAME.to_owned(), subject.head.object.name.clone());
    Some(Fact::Namespace(Box::new(Namespace {
        uid: subject.head.uid.clone(),
        labels,
    })))
}

pub(super) fn rejected(subject: &Subject<'_>) -> Held {
    let mut labels = subject.labels();
    labels.insert(NAME.to_owned(), subject.head.object.name.clone());
    enrol(&mut labels);
    Held {
        fact: Some(Fact::Namespace(Box::new(Namespace {
            uid: subject.head.uid.clone(),
            labels,
        }))),
        consequence: "it counts as enabled".to_owned(),
    }
}

/// Rejects a value of the enrolment label that is none.
pub(super) fn check_enrolment(labels: &Labels, values: &[&str], issues: &mut Issues) {
    if let Some(value) = labels.get(DATAPLANE)
        && !values.contains(&value.as_str())
    {
        issues.reject(
            format!("metadata.labels.{DATAPLANE}"),
            format!("{value:?} is none of {}", values.join(", ")),
        );
    }
}

/// What an enrolment label that cannot be read counts as: a typo must not leave pods in clear.
pub(super) fn enrol(labels: &mut Labels) {
    labels.insert(DATAPLANE.to_owned(), "enabled".to_owned());
}
