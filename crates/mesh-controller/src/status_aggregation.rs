// SPDX-License-Identifier: Apache-2.0
//! Aggregates the reports of nodes into the status of an object. Pure.
//!
//! A node counts for an object if it enforces the newest generation of the object. A node without a
//! report on that generation is lagging; a node that rejects the generation reports the reason.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use mesh_api::crd::{ACCEPTED, FieldRejection, IN_FORCE, MeshNodeStatus, PolicyStatus};

/// Maximum number of rejections in a status.
const MAX_REJECTIONS: usize = 16;
/// Maximum number of node names in a message.
const MAX_NAMES: usize = 5;

/// An object's UID and generation.
type Version<'a> = (&'a str, i64);
/// Field and message of each rejection, with the nodes that report it.
type Fields<'a> = BTreeMap<(&'a str, &'a str), BTreeSet<&'a str>>;

/// The reports of all nodes.
#[derive(Debug, Default)]
pub(super) struct NodeReports<'a> {
    nodes: BTreeSet<&'a str>,
    in_force: BTreeMap<Version<'a>, BTreeSet<&'a str>>,
    rejected: BTreeMap<Version<'a>, Fields<'a>>,
}

impl<'a> NodeReports<'a> {
    /// Groups the reports by version of object.
    pub(super) fn new(all: impl IntoIterator<Item = (&'a str, &'a MeshNodeStatus)>) -> Self {
        let mut reports = Self::default();
        for (node, status) in all {
            reports.nodes.insert(node);
            for object in &status.in_force {
                let nodes = reports.in_force.entry((&object.uid, object.generation));
                nodes.or_default().insert(node);
            }
            for rejection in &status.rejections {
                let version = (&*rejection.object.uid, rejection.object.generation);
                let fields = reports.rejected.entry(version).or_default();
                let field = fields.entry((&rejection.field, &rejection.message));
                field.or_default().insert(node);
            }
        }
        reports
    }

    /// Returns the number of nodes.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Returns the status of a version of an object. `before` = the current status.
    pub(super) fn status(
        &self,
        (uid, generation): (&str, i64),
        before: &PolicyStatus,
        now: &Time,
    ) -> PolicyStatus {
        let none = BTreeSet::new();
        let nothing = BTreeMap::new();
        let rejected = self.rejected.get(&(uid, generation)).unwrap_or(&nothing);
        let rejecting: BTreeSet<&str> = rejected.values().flatten().copied().collect();
        let reported = self.in_force.get(&(uid, generation)).unwrap_or(&none);
        let good: BTreeSet<&str> = reported
            .intersection(&self.nodes)
            .copied()
            .filter(|node| !rejecting.contains(node))
            .collect();
        let lagging: Vec<&str> = self
            .nodes
            .iter()
            .copied()
            .filter(|node| !good.contains(node) && !rejecting.contains(node))
            .collect();
        let total = self.nodes.len();
        let accepted = accepted(rejected, &good, total);
        let in_force = in_force(&good, &rejecting, &lagging, total);
        let condition = |kind: &str, (status, reason, message): Verdict| {
            let old = before.conditions.iter().find(|one| one.type_ == kind);
            let since = old.filter(|old| old.status == status);
            Condition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: reason.to_owned(),
                message,
                observed_generation: Some(generation),
                last_transition_time: since
                    .map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
            }
        };
        PolicyStatus {
            conditions: vec![condition(ACCEPTED, accepted), condition(IN_FORCE, in_force)],
            nodes: format!("{}/{total}", good.len()),
            rejections: rejected
                .iter()
                .take(MAX_REJECTIONS)
                .map(|((field, message), nodes)| FieldRejection {
                    field: (*field).to_owned(),
                    message: (*message).to_owned(),
                    nodes: i32::try_from(nodes.len()).unwrap_or(i32::MAX),
                })
                .collect(),
        }
    }
}

/// Status, reason and message of a condition.
type Verdict = (&'static str, &'static str, String);

fn accepted(
    rejected: &BTreeMap<(&str, &str), BTreeSet<&str>>,
    good: &BTreeSet<&str>,
    total: usize,
) -> Verdict {
    if let Some(((field, message), _)) = rejected.first_key_value() {
        let place = if field.is_empty() { "" } else { ": " };
        let more = match rejected.len() {
            1 => String::new(),
            count => format!(" (and {} more)", count - 1),
        };
        return ("False", "Invalid", format!("{field}{place}{message}{more}"));
    }
    if good.is_empty() {
        let why = if total == 0 {
            "no node runs an agent"
        } else {
            "no node has reported on this version yet"
        };
        return ("Unknown", "Pending", why.to_owned());
    }
    ("True", "Accepted", "every field can be used".to_owned())
}

fn in_force(
    good: &BTreeSet<&str>,
    rejecting: &BTreeSet<&str>,
    lagging: &[&str],
    total: usize,
) -> Verdict {
    let count = format!("in force on {} of {total} nodes", good.len());
    if total == 0 {
        return ("Unknown", "NoNodes", "no node runs an agent".to_owned());
    }
    if good.len() == total {
        return ("True", "EveryNode", count);
    }
    let names = |nodes: &mut dyn Iterator<Item = &str>, len: usize| {
        let mut text = nodes.take(MAX_NAMES).collect::<Vec<_>>().join(", ");
        if len > MAX_NAMES {
            text.push_str(&format!(" and {} more", len - MAX_NAMES));
        }
        text
    };
    if !rejecting.is_empty() {
        let who = names(&mut rejecting.iter().copied(), rejecting.len());
        return ("False", "Rejected", format!("{count}; rejected by {who}"));
    }
    let who = names(&mut lagging.iter().copied(), lagging.len());
    ("False", "Lagging", format!("{count}; waiting for {who}"))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use mesh_api::crd::{ReportedField, ReportedObject};

    use super::*;

    fn version(generation: i64) -> ReportedObject {
        ReportedObject {
            kind: "MeshPolicy".to_owned(),
            namespace: "shop".to_owned(),
            name: "p".to_owned(),
            uid: "u".to_owned(),
            generation,
        }
    }

    fn enforces(generation: i64) -> MeshNodeStatus {
        MeshNodeStatus {
            in_force: vec![version(generation)],
            ..MeshNodeStatus::default()
        }
    }

    fn rejects(generation: i64, field: &str) -> MeshNodeStatus {
        MeshNodeStatus {
            rejections: vec![ReportedField {
                object: version(generation),
                field: field.to_owned(),
                message: "is wrong".to_owned(),
            }],
            ..enforces(generation - 1)
        }
    }

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn aggregate(nodes: &[(&str, MeshNodeStatus)]) -> (String, Vec<String>, PolicyStatus) {
        let reports = NodeReports::new(nodes.iter().map(|(name, status)| (*name, status)));
        let status = reports.status(("u", 3), &PolicyStatus::default(), &at(1));
        let rows = status.conditions.iter().map(|one| {
            format!(
                "{} {} {}: {}",
                one.type_, one.status, one.reason, one.message
            )
        });
        (status.nodes.clone(), rows.collect(), status)
    }

    #[test]
    fn status_counts_nodes_and_explains_conditions() {
        type Nodes<'a> = &'a [(&'a str, MeshNodeStatus)];
        let rows: &[(Nodes<'_>, &str, &str, &str)] = &[
            (
                &[],
                "0/0",
                "Unknown Pending: no node runs an agent",
                "Unknown NoNodes: no node runs an agent",
            ),
            (
                &[("a", enforces(3)), ("b", enforces(3)), ("c", enforces(3))],
                "3/3",
                "True Accepted: every field can be used",
                "True EveryNode: in force on 3 of 3 nodes",
            ),
            (
                &[
                    ("a", enforces(3)),
                    ("b", enforces(2)),
                    ("c", MeshNodeStatus::default()),
                ],
                "1/3",
                "True Accepted: every field can be used",
                "False Lagging: in force on 1 of 3 nodes; waiting for b, c",
            ),
            (
                &[("a", enforces(2))],
                "0/1",
                "Unknown Pending: no node has reported on this version yet",
                "False Lagging: in force on 0 of 1 nodes; waiting for a",
            ),
            (
                &[("a", enforces(3)), ("b", rejects(3, "spec.x"))],
                "1/2",
                "False Invalid: spec.x: is wrong",
                "False Rejected: in force on 1 of 2 nodes; rejected by b",
            ),
            // The rejection of an older version has no effect on this one.
            (
                &[("a", rejects(2, "spec.x"))],
                "0/1",
                "Unknown Pending: no node has reported on this version yet",
                "False Lagging: in force on 0 of 1 nodes; waiting for a",
            ),
        ];
        for (nodes, count, accepted, in_force) in rows {
            let (nodes, conditions, _) = aggregate(nodes);
            assert_eq!(nodes, *count);
            assert_eq!(conditions[0], format!("Accepted {accepted}"));
            assert_eq!(conditions[1], format!("InForce {in_force}"));
        }
    }

    #[test]
    fn rejections_are_counted_by_field() {
        let (_, conditions, status) = aggregate(&[
            ("a", rejects(3, "spec.x")),
            ("b", rejects(3, "spec.x")),
            ("c", rejects(3, "spec.y")),
        ]);
        assert_eq!(
            conditions[0],
            "Accepted False Invalid: spec.x: is wrong (and 1 more)"
        );
        let fields: Vec<_> = status
            .rejections
            .iter()
            .map(|one| (one.field.as_str(), one.nodes))
            .collect();
        assert_eq!(fields, [("spec.x", 2), ("spec.y", 1)]);
    }

    #[test]
    fn transition_time_changes_only_with_the_status() {
        let good = [("a", enforces(3))];
        let reports = NodeReports::new(good.iter().map(|(name, status)| (*name, status)));
        let first = reports.status(("u", 3), &PolicyStatus::default(), &at(1));
        let again = reports.status(("u", 3), &first, &at(2));
        assert_eq!(again, first);
        let changed = reports.status(("u", 4), &first, &at(3));
        assert_eq!(changed.conditions[1].last_transition_time, at(3));
    }
}
