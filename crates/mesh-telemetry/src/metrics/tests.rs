// SPDX-License-Identifier: Apache-2.0
//! The page: complete, readable by Prometheus, and described.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use mesh_common::Verdict;
use mesh_common::policy::RuleId;

use super::*;
use crate::record::Security;

struct Fake;

impl Kernel for Fake {
    fn counter(&self, counter: Counter) -> u64 {
        u64::from(counter.index()) + 1
    }

    fn map_usage(&self) -> Vec<(&'static str, u64, u64)> {
        vec![("PEERS", 3, 262_144), ("PODS", 2, 1024)]
    }
}

fn full() -> Metrics {
    let metrics = Metrics::new();
    metrics.set_kernel(Fake);
    let group = Arc::new(Group {
        namespace: "shop".to_owned(),
        workload: "odd \"name\"\\\n".to_owned(),
        service_account: "web".to_owned(),
    });
    let open = metrics.open(Labels {
        reporter: Reporter::Source,
        source: Arc::clone(&group),
        destination: group,
        service: "shop/db".to_owned(),
        security: Security::MutualTls,
    });
    open.add(10, 20);
    drop(open);
    metrics.closed(Reporter::Source, &Close::Aborted);
    metrics.verdict(
        Direction::Ingress,
        &Verdict::deny(Reason::DefaultDeny, RuleId::NONE),
    );
    let rule = "MeshPolicy shop/db ingress[0]";
    metrics.audited(Direction::Ingress, rule, Reason::Policy);
    metrics.handshake(Role::Client, Ok(()));
    metrics.handshake(Role::Server, Err("wrong_identity"));
    // It is shown for as long as somebody counts.
    std::mem::forget(metrics.usage("shop", "web"));
    metrics.revocation_lists(BTreeMap::from([("/crl.pem".to_owned(), 1_800_000_000)]));
    metrics.silent(true);
    metrics.violated(Role::Server);
    metrics.retried(&Close::Failed(Reason::ConnectFailed));
    let in_use = CertificateInUse {
        expires: 1_800_000_000,
        revoked: true,
    };
    metrics.certificate("shop", "web", Some(in_use));
    metrics.plan_applied(1, Duration::from_millis(3));
    metrics.rejected_fields(1);
    metrics.pods(PodCounts {
        enrolled: 2,
        not_enrolled: 1,
        not_protected: 0,
        isolated: 0,
    });
    metrics.readiness().set("plan", true);
    metrics.lost(4);
    metrics
}

/// Names of the families that a page describes, and those of its samples.
fn families(page: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let described = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let sampled = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next());
    (
        described.map(str::to_owned).collect(),
        sampled.map(str::to_owned).collect(),
    )
}

#[test]
fn promtool_accepts_the_page() {
    let page = full().page(Format::Prometheus);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (Debian package prometheus; cargo xtask setup)");
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(page.as_bytes()).unwrap();
    drop(stdin);
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.trim().is_empty(),
        "{said}\n{page}"
    );
}

#[test]
fn the_page_has_exactly_the_described_families() {
    let page = full().page(Format::Prometheus);
    let expected: BTreeSet<_> = DESCRIPTIONS.iter().map(|one| one.name.to_owned()).collect();
    let (described, sampled) = families(&page);
    assert_eq!(described, expected);
    for name in sampled {
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|part| name.strip_suffix(part))
            .unwrap_or(&name);
        assert!(expected.contains(base), "{name}");
    }
    // A series has exactly the labels of its description.
    for one in DESCRIPTIONS.iter().filter(|one| !one.labels.is_empty()) {
        let start = format!("{}{{", one.name);
        let line = page.lines().find_map(|line| line.strip_prefix(&start));
        let labels = line.unwrap_or_else(|| panic!("no sample of {}", one.name));
        for label in one.labels {
            assert!(
                labels.contains(&format!("{label}=\"")),
                "{label} of {}",
                one.name
            );
        }
        assert_eq!(
            labels.matches("=\"").count(),
            one.labels.len(),
            "{}",
            one.name
        );
    }
}

#[test]
fn the_page_shows_the_counted_values() {
    let page = full().page(Format::OpenMetrics);
    let deny = Verdict::deny(Reason::DefaultDeny, RuleId::NONE);
    let by_kernel = Fake.counter(Counter::Verdict {
        direction: Direction::Ingress,
        allowed: deny.allowed,
        reason: deny.reason,
    });
    let odd = r#"workload="odd \"name\"\\\n""#;
    for expected in [
        "# HELP mesh_tcp_sent_bytes Application bytes from source to destination\n".to_owned(),
        format!("destination_{odd},destination_service_account=\"web\""),
        "security=\"mutual_tls\"} 20\n".to_owned(),
        "mesh_tcp_connections_failed_total{reporter=\"source\",reason=\"aborted\"} 1\n".to_owned(),
        "reason=\"default_deny\",decided_by=\"agent\"} 1\n".to_owned(),
        format!("reason=\"default_deny\",decided_by=\"kernel\"}} {by_kernel}\n"),
        "mesh_tls_handshakes_total{role=\"client\",result=\"ok\"} 1\n".to_owned(),
        "{role=\"server\",result=\"wrong_identity\"} 1\n".to_owned(),
        "{namespace=\"shop\",service_account=\"web\"} 1800000000\n".to_owned(),
        "mesh_certificate_revoked{namespace=\"shop\",service_account=\"web\"} 1\n".to_owned(),
        "mesh_plan_apply_seconds_bucket{le=\"0.005\"} 1\n".to_owned(),
        "mesh_flow_events_lost_total{at=\"flow_log\"} 4\n".to_owned(),
        "mesh_map_capacity{map=\"PEERS\"} 262144\n".to_owned(),
        "mesh_policy_revision 1\n".to_owned(),
        "mesh_ready{condition=\"plan\"} 1\n".to_owned(),
        "# EOF\n".to_owned(),
    ] {
        assert!(page.contains(&expected), "{expected}\nis not in\n{page}");
    }
}

#[test]
fn a_certificate_that_is_no_longer_used_disappears() {
    let metrics = full();
    metrics.certificate("shop", "web", None);
    let page = metrics.page(Format::Prometheus);
    assert!(!page.contains("mesh_certificate_expiry_timestamp_seconds{"));
}

#[test]
fn the_format_is_negotiated() {
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4";
    assert_eq!(Format::negotiate(prometheus), Format::OpenMetrics);
    assert_eq!(Format::negotiate("*/*"), Format::Prometheus);
    assert!(Format::Prometheus.content_type().contains("0.0.4"));
}

#[test]
fn the_references_are_up_to_date() {
    mesh_fixtures::golden("docs/metrics.md", &reference());
    mesh_fixtures::golden("docs/reasons.md", &crate::metrics::reasons());
}

/// Words of a text that look like the names of metrics of ours, without the suffixes of
/// histograms.
fn names(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("mesh_") || word.starts_with("process_"))
        .map(|word| word.trim_end_matches("_bucket"))
        .collect()
}

#[test]
fn alerts_and_dashboard_use_metrics_that_exist() {
    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy");
    let known: BTreeSet<_> = DESCRIPTIONS.iter().map(|one| one.name).collect();
    for file in ["alerts/mesh.yaml", "grafana/mesh.json"] {
        let text = std::fs::read_to_string(format!("{deploy}/{file}")).unwrap();
        let used = names(&text);
        assert!(used.len() > 8, "{file}: {used:?}");
        for name in used {
            assert!(known.contains(name), "{file}: {name}");
        }
    }
    let checked = Command::new("promtool")
        .args(["check", "rules", &format!("{deploy}/alerts/mesh.yaml")])
        .output()
        .expect("promtool is installed (Debian package prometheus; cargo xtask setup)");
    assert!(checked.status.success(), "{checked:?}");
}
