// SPDX-License-Identifier: Apache-2.0
//! Parses Namespaces.

use mesh_plan::cluster::{Labels, Namespace};

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject};

/// The enrollment label of namespaces and pods.
const DATAPLANE: &str = "mesh.rs/dataplane";
const NAME: &str = "kubernetes.io/metadata.name";

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let mut labels = object.labels();
    check_enrollment(&labels, &["enabled", "disabled", "required"], issues);
    labels.insert(NAME.to_owned(), object.head.object.name.clone());
    Some(ParsedObject::Namespace(Box::new(Namespace {
        uid: object.head.uid.clone(),
        labels,
    })))
}

pub(super) fn fallback(object: &RawObject<'_>) -> Fallback {
    let mut labels = object.labels();
    labels.insert(NAME.to_owned(), object.head.object.name.clone());
    enroll(&mut labels);
    Fallback {
        parsed: Some(ParsedObject::Namespace(Box::new(Namespace {
            uid: object.head.uid.clone(),
            labels,
        }))),
        consequence: "the namespace is enrolled".to_owned(),
    }
}

/// Rejects an unsupported value of the enrollment label.
pub(super) fn check_enrollment(labels: &Labels, values: &[&str], issues: &mut Issues) {
    if let Some(value) = labels.get(DATAPLANE)
        && !values.contains(&value.as_str())
    {
        issues.reject(
            format!("metadata.labels.{DATAPLANE}"),
            format!(
                "unsupported value {value:?}: must be one of {}",
                values.join(", ")
            ),
        );
    }
}

/// Replaces an invalid enrollment label by `enabled`: a typo must not make traffic plaintext.
pub(super) fn enroll(labels: &mut Labels) {
    labels.insert(DATAPLANE.to_owned(), "enabled".to_owned());
}
