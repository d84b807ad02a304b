// SPDX-License-Identifier: Apache-2.0
//! The truth tables over real connections: pods get the verdict that the compiler gives each clause.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mesh_api::truth::{Check, Expected, Table};
use mesh_test::truth::{Report, read, run};
use serde_json::json;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("truth/{name}.yaml"))
}

/// Every table of a file, and how many rows at most cannot be run here.
fn holds(name: &str, mtls: bool, not_run: usize) {
    let file = file(name);
    for table in read(&file).expect("tables") {
        let what = table.name.clone().unwrap_or_default();
        let report = run(&table, &file, mtls).expect(&what);
        assert_eq!(report.differ, [""; 0], "{what}");
        assert_eq!(report.right + report.not_run.len(), report.checks, "{what}");
        assert!(
            report.not_run.len() <= not_run,
            "{what}: {:?}",
            report.not_run
        );
    }
}

#[test]
fn network_policy_over_mutual_tls() {
    holds("network_policy", true, 2);
}

#[test]
fn network_policy_between_unenrolled_pods() {
    holds("network_policy", false, 2);
}

#[test]
fn mesh_policy_over_mutual_tls() {
    holds("mesh_policy", true, 1);
}

#[test]
fn mesh_policy_between_unenrolled_pods() {
    holds("mesh_policy", false, 8);
}

#[test]
fn cluster_mesh_policy_over_mutual_tls() {
    holds("cluster_mesh_policy", true, 0);
}

#[test]
fn cluster_network_policy_over_mutual_tls() {
    holds("cluster_network_policy", true, 2);
}

#[test]
fn cluster_network_policy_between_unenrolled_pods() {
    holds("cluster_network_policy", false, 2);
}

#[test]
fn mesh_authentication_over_mutual_tls() {
    holds("mesh_authentication", true, 0);
}

/// Two clauses of each protocol, small enough to be run twice.
fn small() -> Table {
    let pod = |name: &str, node: &str, ip: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "x", "labels": {"app": name}},
            "spec": {"nodeName": node},
            "status": {"podIPs": [{"ip": ip}]},
        })
    };
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "x"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}],
        },
    });
    let mut checks = Vec::new();
    for protocol in ["TCP", "UDP"] {
        for (from, expect) in [
            ("x/b", "allow"),
            ("x/c", "deny"),
            ("192.0.2.1", "deny"),
            ("x/a", "allow"),
        ] {
            checks.push(json!({"from": from, "to": "x/a", "port": 80, "protocol": protocol, "expect": expect}));
        }
    }
    let table = json!({
        "manifests": [pod("a", "one", "10.9.0.1"), pod("b", "two", "10.9.0.2"), pod("c", "one", "10.9.0.3"), policy],
        "checks": checks,
    });
    serde_json::from_value(table).expect("a table")
}

fn run_small(table: &Table) -> Report {
    run(table, Path::new("small.yaml"), true).expect("it is run")
}

#[test]
fn wrong_rows_are_reported() {
    let mut table = small();
    let right = run_small(&table);
    assert_eq!((right.right, right.differ.len()), (8, 0), "{right:?}");
    for check in &mut table.checks {
        check.expect = Some(Expected::of(check.expect == Some(Expected::Deny)));
    }
    let wrong = run_small(&table);
    assert_eq!((wrong.right, wrong.differ.len()), (0, 8), "{wrong:?}");
    let told = wrong.differ.join("\n");
    assert!(
        told.contains("check 1: x/b -> x/a TCP 80 by address: expected deny, got allow (answered:"),
        "{told}"
    );
    assert!(
        told.contains("NetworkPolicy x/p"),
        "the rule is named: {told}"
    );
}

#[test]
fn unrunnable_rows_are_reported_and_not_counted() {
    let mut table = small();
    let row = |row| serde_json::from_value::<Check>(row).expect("a row");
    table.checks = vec![
        row(json!({"from": "x/b", "to": "x/a", "port": 80, "protocol": "SCTP", "expect": "allow"})),
        row(json!({"from": "192.0.2.1", "to": "192.0.2.2", "port": 80, "expect": "allow"})),
        row(json!({"from": "x/b", "to": "x/a", "port": 15008, "expect": "deny"})),
        row(json!({"from": "x/c", "to": "x/a", "port": 80, "expectEgress": "allow"})),
    ];
    let report = run_small(&table);
    assert_eq!((report.right, report.not_run.len()), (0, 4), "{report:?}");
    table.checks = vec![row(
        json!({"from": "x/nobody", "to": "x/a", "port": 80, "expect": "deny"}),
    )];
    let error = run(&table, Path::new("small.yaml"), true).expect_err("there is no such pod");
    assert!(
        format!("{error:#}").contains("there is no pod x/nobody"),
        "{error:#}"
    );
}

#[test]
fn every_clause_has_allowed_and_denied_rows() {
    let dir = file("x");
    let dir = dir.parent().expect("a directory");
    let mut clauses: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("tables") {
        for table in read(&entry.expect("a file").path()).expect("tables") {
            for check in table.checks {
                let of = clauses.entry(check.name.expect("a row names its clause"));
                let of = of.or_default();
                match check.expect.expect("a row expects something") {
                    Expected::Allow => of[0] += 1,
                    Expected::Deny => of[1] += 1,
                }
            }
        }
    }
    assert!(clauses.len() > 150, "{}", clauses.len());
    for (clause, of) in clauses {
        assert!(of[0] > 0 && of[1] > 0, "{clause}: {of:?}");
    }
}
