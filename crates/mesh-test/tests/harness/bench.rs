// SPDX-License-Identifier: Apache-2.0
//! The bench in its shortest form: it starts, measures every row, and writes its results. A busy machine
//! cannot judge the figures themselves.

use std::path::Path;
use std::process::Command;

use mesh_test::bench::{Row, Scenario};

fn bench(json: &Path, args: &[&str]) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(args)
        .args([
            "--rounds",
            "1",
            "--seconds",
            "0.2",
            "--idle",
            "0.5",
            "--json",
        ])
        .arg(json)
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}\n{error}");
    let text = std::fs::read_to_string(json).expect("results");
    std::fs::remove_file(json).expect("remove");
    serde_json::from_str(&text).expect("JSON")
}

fn rows(report: &serde_json::Value) -> Vec<Row> {
    serde_json::from_value(report["rows"].clone()).expect("rows")
}

#[test]
fn bench_measures_every_row_plain_and_meshed() {
    let json = std::env::temp_dir().join(format!("bench-{}-mesh.json", std::process::id()));
    let report = bench(&json, &[]);
    let rows = rows(&report);
    let metrics = ["bulk_1", "bulk_4", "rr_1", "rr_16", "crr_1", "crr_16"];
    let expected = Scenario::ALL
        .into_iter()
        .flat_map(|scenario| metrics.map(|metric| (scenario, metric.to_owned())));
    let found = rows.iter().map(|row| (row.scenario, row.metric.clone()));
    assert_eq!(found.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    for row in &rows {
        assert!(row.plain > 0.0 && row.mesh > 0.0, "{row:?}");
        assert!(
            row.ratio_min <= row.ratio && row.ratio <= row.ratio_max,
            "{row:?}"
        );
        assert_eq!((row.rounds, row.group.as_str()), (1, "datapath"));
        let timed = !row.metric.starts_with("bulk");
        assert_eq!((row.p50_us.is_some(), row.p99_us.is_some()), (timed, timed));
        if row.scenario == Scenario::CrossNode {
            assert!(row.cpu_s_per_unit > 0.0, "agents carry this: {row:?}");
        }
    }
    let agents = report["config"]["agents"].as_array().expect("agents");
    assert_eq!(agents.len(), 2);
    let resident = report["config"]["agent_rss_end_bytes"].as_array();
    assert_eq!(resident.expect("memory").len(), 2);
}

#[test]
fn bench_control_has_no_agents_and_metric_selects_rows() {
    let json = std::env::temp_dir().join(format!("bench-{}-control.json", std::process::id()));
    let report = bench(&json, &["crr", "--control", "--metric", "crr_16"]);
    let rows = rows(&report);
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert!(rows.iter().all(|row| row.metric == "crr_16"));
    assert!(rows.iter().all(|row| row.cpu_s_per_unit.abs() < 1e-9));
    assert_eq!(report["config"]["agents"], serde_json::json!([]));
}

#[test]
fn bench_measures_one_agent_of_a_cluster() {
    let json = std::env::temp_dir().join(format!("bench-{}-kube.json", std::process::id()));
    let report = bench(&json, &["kube", "--pods", "100"]);
    let value = |metric: &str| {
        let rows = report["rows"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["metric"] == metric);
        let row = row.unwrap_or_else(|| panic!("no {metric}: {report}"));
        assert_eq!(row["group"], "kube");
        assert!(row["unit"].is_string());
        row["value"].as_f64().expect("a number")
    };
    for metric in [
        "start_to_in_force",
        "start_to_ready",
        "start_cpu",
        "rss_idle",
        "rss_peak",
        "pod_changes",
        "pod_changes_cpu",
        "pod_changes_cpu_of_servers",
        "policy_enforced_p50",
        "label_enforced_p50",
    ] {
        assert!(value(metric) > 0.0, "{metric}");
    }
    assert!(value("rss_peak") >= value("rss_idle"));
    assert!(value("policy_enforced_p99") >= value("policy_enforced_p50"));
    assert_eq!(report["config"]["objects"]["pods"], 100);
}
