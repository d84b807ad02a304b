// SPDX-License-Identifier: Apache-2.0

use std::sync::Arc;

use mesh_api::convert::Warning;
use mesh_plan::cluster::{Namespace, ObjectName, Version};

use super::*;
use crate::control::Status;

fn node(pods: &[(&str, bool, bool)], ready: &[&str]) -> InForce {
    let mut snapshot = ClusterSnapshot::default();
    let label = ("mesh.rs/dataplane".to_owned(), "enabled".to_owned());
    let namespace = Namespace {
        uid: "uid-shop".to_owned(),
        labels: [label].into(),
    };
    snapshot.namespaces.insert("shop".to_owned(), namespace);
    snapshot.ready = Some(ready.iter().map(|uid| (*uid).into()).collect());
    let pods = pods.iter().map(|(uid, enrolled, gated)| {
        let pod = PodStatus {
            name: ObjectName::new("shop", *uid),
            managed: *gated,
            wanted: true,
            enrolled: *enrolled,
            gated: *gated,
            ..PodStatus::default()
        };
        ((*uid).to_owned(), pod)
    });
    let status = Status {
        applied: 1,
        pods: pods.collect(),
        ..Status::default()
    };
    InForce {
        status: Arc::new(status),
        snapshot: Arc::new(snapshot),
        ..InForce::default()
    }
}

fn enrolled(reporter: &mut Reporter, node: &InForce) -> (Vec<String>, Vec<String>) {
    let (report, _) = reporter.report(node, &Report::default(), SystemTime::UNIX_EPOCH);
    (report.enrolled_namespaces, report.enrolled_pods)
}

#[test]
fn namespace_is_ready_once_all_its_pods_accept_and_stays_ready() {
    let mut reporter = Reporter::default();
    let half = node(&[("a", true, true), ("b", false, true)], &[]);
    assert_eq!(
        enrolled(&mut reporter, &half),
        (vec![], vec!["a".to_owned()])
    );
    let full = node(&[("a", true, true), ("b", true, true)], &[]);
    let all = (vec!["uid-shop".to_owned()], vec![]);
    assert_eq!(enrolled(&mut reporter, &full), all);
    // A starting pod does not retract the report.
    assert_eq!(enrolled(&mut reporter, &half), all);
    let mut gone = half.clone();
    Arc::make_mut(&mut gone.snapshot).namespaces.clear();
    assert_eq!(enrolled(&mut reporter, &gone), (vec![], vec![]));
}

#[test]
fn agent_restart_retracts_no_report() {
    let known = node(&[("a", true, true), ("b", false, true)], &["a", "b"]);
    let all = (vec!["uid-shop".to_owned()], vec![]);
    assert_eq!(enrolled(&mut Reporter::default(), &known), all);
    // Pod b was never reported.
    let some = node(&[("a", false, true), ("b", false, true)], &["a"]);
    assert_eq!(
        enrolled(&mut Reporter::default(), &some),
        (vec![], vec!["a".to_owned()])
    );
}

#[test]
fn only_lasting_problems_are_reported_as_unprotected() {
    let mut reporter = Reporter::default();
    let bad = node(&[("a", true, true), ("b", false, false)], &[]);
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let (report, soon) = reporter.report(&bad, &Report::default(), at(10));
    assert!(report.unprotected.is_empty() && soon);
    let (report, soon) = reporter.report(&bad, &Report::default(), at(14));
    assert!(!soon);
    assert_eq!(report.unprotected.len(), 1);
    assert_eq!(report.unprotected[0].uid, "b");
    assert_eq!(report.unprotected[0].since, time(at(10)));
}

#[test]
fn object_statuses_carry_their_generations() {
    let mut now = node(&[], &[]);
    let object = ObjectRef::new("MeshPolicy", "shop", "web");
    let version = Version {
        uid: "u".to_owned(),
        generation: 3,
        newest: 4,
    };
    Arc::make_mut(&mut now.snapshot)
        .versions
        .insert(object.clone(), version.clone());
    let source = Report {
        rejected: [(object.clone(), version)].into(),
        rejections: vec![Rejection {
            object,
            field: "spec.ingress".to_owned(),
            why: "is wrong".to_owned(),
            consequence: "the last good version stays in force".to_owned(),
        }],
        ..Report::default()
    };
    let (report, _) = Reporter::default().report(&now, &source, SystemTime::UNIX_EPOCH);
    assert_eq!(
        (report.in_force[0].generation, &*report.in_force[0].uid),
        (3, "u")
    );
    assert_eq!(report.rejections[0].object.generation, 4);
    assert_eq!(
        report.rejections[0].message,
        "is wrong; the last good version stays in force"
    );
}

#[test]
fn unsupported_fields_are_reported_with_their_generation() {
    let mut status = node(&[], &[]);
    let object = ObjectRef::new("ClusterNetworkPolicy", "", "names");
    let version = Version {
        uid: "uid-names".to_owned(),
        generation: 3,
        newest: 3,
    };
    let snapshot = Arc::make_mut(&mut status.snapshot);
    snapshot.versions.insert(object.clone(), version);
    let warning = |n: usize| Warning {
        object: object.clone(),
        field: format!("spec.egress[{n}].to[0].domainNames"),
        what: "is not supported: it matches nothing".to_owned(),
    };
    let source = Report {
        warnings: (0..MOST + 1).map(warning).collect(),
        ..Report::default()
    };
    let (report, _) = Reporter::default().report(&status, &source, SystemTime::UNIX_EPOCH);
    assert_eq!(report.warnings.len(), MOST);
    let first = &report.warnings[0];
    assert_eq!(
        (&*first.object.uid, first.object.generation),
        ("uid-names", 3)
    );
    assert_eq!(first.field, "spec.egress[0].to[0].domainNames");
    assert_eq!(first.message, "is not supported: it matches nothing");
}

#[test]
fn plan_that_is_not_in_force_and_stale_state_are_warnings_of_the_node() {
    let mut reporter = Reporter {
        node: "n1".to_owned(),
        ..Reporter::default()
    };
    let mut node = node(&[], &[]);
    let source = Report {
        stale: Some("connection refused".to_owned()),
        ..Report::default()
    };
    node.status = Arc::new(Status {
        error: Some("no space in SERVICES".to_owned()),
        ..Status::clone(&node.status)
    });
    let (report, _) = reporter.report(&node, &source, SystemTime::UNIX_EPOCH);
    let told: Vec<_> = report
        .warnings
        .iter()
        .map(|one| (&*one.object.name, &*one.message))
        .collect();
    let expected = [
        (
            "n1",
            "the newest plan is not completely in force: no space in SERVICES",
        ),
        (
            "n1",
            "the cluster's state is not current: connection refused",
        ),
    ];
    assert_eq!(told, expected);
}
