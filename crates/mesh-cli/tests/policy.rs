// SPDX-License-Identifier: Apache-2.0
//! `meshctl` as a user runs it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;

use tempfile::TempDir;

const MANIFESTS: &str = "
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {nodeName: n1, serviceAccountName: web, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}, status: {podIPs: [{ip: 10.0.0.1}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: app, namespace: shop, labels: {app: app}}, spec: {nodeName: n2, serviceAccountName: app}, status: {podIPs: [{ip: 10.0.0.2}, {ip: 'fd00::2'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: six, namespace: shop, labels: {app: six}}, spec: {nodeName: n2}, status: {podIPs: [{ip: 'fd00::6'}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: shop}, spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 192.0.2.0/24}}], ports: [{port: http}]}]}}
---
{apiVersion: mesh.rs/v1alpha1, kind: MeshPolicy, metadata: {name: web, namespace: shop}, spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{serviceAccounts: [app]}], ports: [{port: 8080}]}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}], selector: {app: web}}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: six, namespace: shop}, spec: {podSelector: {matchLabels: {app: six}}, policyTypes: [Egress]}}
";

struct Run {
    code: i32,
    out: String,
    err: String,
}

fn meshctl(args: &[&str]) -> Run {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_meshctl"))
        .args(args)
        .output()
        .expect("meshctl runs");
    Run {
        code: output.status.code().expect("it was not killed"),
        out: String::from_utf8(output.stdout).expect("text"),
        err: String::from_utf8(output.stderr).expect("text"),
    }
}

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

/// Runs checks, in YAML, over [`MANIFESTS`].
fn checks(rows: &str) -> Run {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("m")).unwrap();
    fs::write(dir.path().join("m/all.yaml"), MANIFESTS).unwrap();
    fs::write(
        dir.path().join("t.yaml"),
        format!("name: t\nmanifests: [m]\nchecks:\n{rows}"),
    )
    .unwrap();
    meshctl(&["policy", "test", &path(&dir, "t.yaml")])
}

#[test]
fn passing_checks_exit_with_0() {
    let run = checks(
        "- {from: shop/app, to: shop/web, port: 8080, evidence: tls, expect: allow}
- {from: shop/app, to: shop/web, port: http, evidence: tls, expect: allow, expectIngress: allow, expectEgress: allow}
- {from: shop/app, to: shop/web, port: 8080, evidence: address, expect: deny, comment: an account needs proof}
- {from: shop/app, to: shop/web, port: '8080', expect: deny}
- {from: shop/app, to: shop/web, port: 8081, evidence: tls, expect: deny}
- {from: shop/app, to: shop/web, port: 8080, protocol: UDP, expect: deny}
- {from: 192.0.2.7, to: shop/web, port: 8080, expect: allow}
- {from: 192.0.3.7, to: shop/web, port: 8080, expect: deny}
- {from: 10.0.0.2, to: shop/web, port: 8080, evidence: tls, expect: allow, name: an address of a pod is the pod}
- {from: shop/six, to: shop/app, port: 1, expect: deny, expectIngress: allow, expectEgress: deny}
- {from: shop/web, to: shop/web, port: 1, expect: allow}
- {from: shop/app, to: shop/six, port: 1, protocol: UDP, evidence: tls, expect: allow, name: a node knows its own pods}
- {from: shop/web, to: 203.0.113.1, port: 1, expect: allow}
",
    );
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "13 checks, 0 wrong\n"),
        "{}",
        run.err
    );
}

#[test]
fn failed_checks_are_shown_with_their_rules() {
    let run = checks(
        "- {from: shop/app, to: shop/web, port: 8080, evidence: tls, expect: deny, name: surprise}
- {from: shop/app, to: shop/web, port: 8080, expect: deny}
- {from: shop/six, to: shop/app, port: 1, expectEgress: allow}
",
    );
    assert_eq!(run.code, 1);
    assert!(run.out.contains("t.yaml: t: check 1: surprise: shop/app -> shop/web TCP 8080 by tls: expected deny, got allow"), "{}", run.out);
    assert!(
        run.out
            .contains("ingress: allow by MeshPolicy shop/web ingress[0]"),
        "{}",
        run.out
    );
    assert!(!run.out.contains("check 2"));
    assert!(run.out.contains("check 3") && run.out.contains("expected egress allow, got deny"));
    assert!(run.out.contains("NetworkPolicy shop/six"));
    assert!(run.out.ends_with("3 checks, 2 wrong\n"));
}

#[test]
fn json_and_multi_document_tables_are_read() {
    let dir = TempDir::new().unwrap();
    let manifests = r#"[{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "x"}, "status": {"podIPs": [{"ip": "10.0.0.1"}]}}]}]"#;
    let table = |name: &str, expect: &str| {
        format!(
            r#"{{"name": "{name}", "manifests": {manifests}, "checks": [{{"from": "192.0.2.1", "to": "x/a", "port": 80, "protocol": "TCP", "expect": "{expect}"}}]}}"#
        )
    };
    fs::write(dir.path().join("one.json"), table("one", "allow")).unwrap();
    let list = format!("[{}, {}]", table("good", "allow"), table("bad", "deny"));
    fs::write(dir.path().join("list.json"), &list).unwrap();
    fs::write(
        dir.path().join("list.yaml"),
        format!("---\n{list}\n---\n{}\n", table("third", "allow")),
    )
    .unwrap();
    assert_eq!(
        meshctl(&["policy", "test", &path(&dir, "one.json")]).code,
        0
    );
    for (name, count) in [("list.json", 2), ("list.yaml", 3)] {
        let run = meshctl(&["policy", "test", &path(&dir, name)]);
        assert_eq!(run.code, 1, "{}", run.err);
        assert!(run.out.contains(": bad: check 1"), "{}", run.out);
        assert!(run.out.ends_with(&format!("{count} checks, 1 wrong\n")));
    }
}

#[test]
fn invalid_checks_exit_with_2_and_a_reason() {
    let rows = [
        (
            "- {from: shop/none, to: shop/web, port: 1, expect: deny}",
            "there is no pod shop/none",
        ),
        (
            "- {from: web, to: shop/web, port: 1, expect: deny}",
            "neither NAMESPACE/POD nor an IP address",
        ),
        ("- {from: shop/app, to: shop/web, port: 1}", "needs expect"),
        (
            "- {from: shop/app, to: shop/web, port: https, expect: deny}",
            "no TCP port named",
        ),
        (
            "- {from: shop/six, to: shop/web, port: 1, expect: deny}",
            "shop/six and shop/web have no address family in common",
        ),
        (
            "- {from: shop/app, to: shop/web, port: 1, expects: deny}",
            "unknown field",
        ),
        (
            "- {from: shop/app, to: shop/web, port: 1, expect: maybe}",
            "maybe",
        ),
        (
            "- {from: shop/app, to: shop/web, port: 70000, expect: deny}",
            "invalid port 70000: must be between 1 and 65535",
        ),
        (
            "- {from: shop/app, to: shop/web, port: 0, expect: deny}",
            "invalid port \"0\": must be between 1 and 65535",
        ),
        (
            "- {from: shop/app, to: shop/web, port: [80], expect: deny}",
            "invalid port [80]: must be a number or a name",
        ),
        (
            "- {from: 10.0.0.2, to: 'fd00::6', port: 1, expect: deny}",
            "no address family in common",
        ),
        (
            "- {from: shop/app, to: 10.96.0.1, port: 80, expect: allow}",
            "10.96.0.1 is the address of Service shop/web",
        ),
        (
            "- {from: shop/app, to: shop/web, port: 1, protocol: UDP, evidence: tls, expect: deny}",
            "t.yaml: t: check 1: evidence: tls: UDP from another node",
        ),
        (
            "- {from: 192.0.2.1, to: shop/web, port: 1, protocol: SCTP, evidence: tls, expect: deny}",
            "t.yaml: t: check 1: evidence: tls: SCTP from another node",
        ),
        (
            "- {from: shop/app, to: shop/web, port: 1, expect: deny}
- {from: shop/app, to: shop/web, port: 1, expect: none}",
            "t.yaml: t: check 2: expect: unknown variant `none`",
        ),
        (" []", "no checks found"),
        // The others are asked all the same.
        (
            "- {from: shop/none, to: shop/web, port: 1, expect: deny}
- {from: shop/app, to: shop/web, port: 1, expect: allow}",
            "1 invalid checks",
        ),
    ];
    for (row, expected) in rows {
        let run = checks(row);
        if row.contains("expect: allow}") && row.contains("shop/none") {
            assert!(run.out.contains("2 checks, 1 wrong"), "{}", run.out);
        }
        assert_eq!(run.code, 2, "{row}: {}", run.out);
        assert!(run.err.contains(expected), "{row}: {}", run.err);
    }
    assert_eq!(meshctl(&["policy", "test", "/nonexistent.yaml"]).code, 2);
    assert_eq!(meshctl(&["policy", "test"]).code, 2);
    assert_eq!(meshctl(&["polici"]).code, 2);
}

#[test]
fn rejected_manifests_are_reported_and_fail_closed() {
    let dir = TempDir::new().unwrap();
    let text = "manifests:
- {apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x}, status: {podIPs: [{ip: 10.0.0.1}]}}
- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: {podSelector: {}, ingress: [{ports: [{port: 0}]}]}}
checks:
- {from: 192.0.2.1, to: x/a, port: 80, expect: deny}
";
    fs::write(dir.path().join("t.yaml"), text).unwrap();
    let run = meshctl(&["policy", "test", &path(&dir, "t.yaml")]);
    assert_eq!(run.code, 0, "{}", run.out);
    assert!(
        run.err
            .contains("NetworkPolicy x/p: spec.ingress[0].ports[0].port: invalid port 0"),
        "{}",
        run.err
    );
}

#[test]
fn explain_names_the_rule_and_the_transport() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("m.yaml"), MANIFESTS).unwrap();
    let explain = |from: &str, to: &str| {
        meshctl(&[
            "policy",
            "explain",
            "-f",
            &path(&dir, "m.yaml"),
            "--from",
            from,
            "--to",
            to,
        ])
    };
    let run = explain("192.0.2.7", "shop/web:http");
    assert_eq!(run.code, 0, "{}{}", run.out, run.err);
    assert!(
        run.out
            .contains("NetworkPolicy shop/web ingress[0] (allow) matches"),
        "{}",
        run.out
    );
    let run = explain("shop/app", "shop/web:8080");
    assert_eq!(run.code, 1, "{}", run.out);
    assert!(
        [
            "NetworkPolicy shop/web ingress[0] (allow) is about other peers",
            "MeshPolicy shop/web ingress[0] (allow) needs a proven identity",
            "denied by default",
            "directly, as plaintext",
        ]
        .iter()
        .all(|words| run.out.contains(words)),
        "{}",
        run.out
    );
    let run = explain("shop/app", "[fd00::6]:80");
    assert!(
        run.out.contains("egress of shop/app to fd00::6"),
        "{}",
        run.out
    );
    let run = explain("shop/six", "[fd00::2]:80");
    assert!(run.out.contains("NetworkPolicy shop/six"), "{}", run.out);
    // An object that is rejected might refuse what the others allow.
    let rejected = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: other}
spec: {podSelector: {matchLabels: {a: ' b'}}}
";
    fs::write(dir.path().join("m.yaml"), format!("{MANIFESTS}{rejected}")).unwrap();
    let run = explain("192.0.2.7", "shop/web:http");
    assert_eq!(run.code, 2, "{}{}", run.out, run.err);
    assert!(
        run.err.contains("rejected: NetworkPolicy other/closed"),
        "{}",
        run.err
    );
    assert!(
        !run.out.contains("=>") && run.err.contains("not decided"),
        "{}{}",
        run.out,
        run.err
    );
}

#[test]
fn matrix_shows_allowed_ports_and_tables() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("m.yaml"), MANIFESTS).unwrap();
    let matrix = |more: &[&str]| {
        let file = path(&dir, "m.yaml");
        let mut args = vec!["policy", "matrix", "-f", &file];
        args.extend(more);
        meshctl(&args)
    };
    // Nobody is enrolled: no service account is proven between nodes.
    let run = matrix(&[]);
    assert!(
        run.out.contains("shop/app -> shop/web: nothing\n"),
        "{}",
        run.out
    );
    let run = matrix(&["--evidence", "tls"]);
    assert_eq!(run.code, 0, "{}", run.err);
    let mut lines: Vec<&str> = run.out.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "shop/app -> shop/six: everything",
            "shop/app -> shop/web: 8080",
            "shop/six -> shop/app: nothing",
            "shop/six -> shop/web: nothing",
            "shop/web -> shop/app: everything",
            "shop/web -> shop/six: nothing",
        ]
    );
    let run = matrix(&["--port", "8080", "--evidence", "tls"]);
    assert!(run.out.contains("shop/app  - + +\n"), "{}", run.out);
    assert!(run.out.ends_with("+ allowed, . refused\n"), "{}", run.out);
    let run = matrix(&["--port", "http", "--evidence", "tls"]);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.out.contains("shop/app  - ? +\n"), "{}", run.out);
    assert!(run.out.contains("shop/web  ? ? -\n"), "{}", run.out);
    let legend = "+ allowed, . refused, ? no port of that name\n";
    assert!(run.out.ends_with(legend), "{}", run.out);
    for (port, protocol, words) in [
        ("https", "TCP", "no pod has a TCP port named \"https\""),
        ("http", "UDP", "no pod has a UDP port named \"http\""),
        (
            "0",
            "TCP",
            "invalid port \"0\": must be between 1 and 65535",
        ),
        (
            "65536",
            "TCP",
            "invalid port \"65536\": must be between 1 and 65535",
        ),
    ] {
        let run = matrix(&["--port", port, "--protocol", protocol]);
        assert_eq!(run.code, 2, "{}", run.out);
        assert!(run.err.contains(words), "{}", run.err);
    }
    let run = matrix(&["-n", "nobody"]);
    assert_eq!(run.code, 2);
    assert!(
        run.err.contains("namespace nobody has no pods"),
        "{}",
        run.err
    );
}

#[test]
fn example_shop_checks_pass() {
    let table =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/examples/shop.checks.yaml");
    let run = meshctl(&["policy", "test", &table.display().to_string()]);
    assert_eq!((run.code, run.err.as_str()), (0, ""), "{}", run.out);
}

#[test]
fn truth_tables_pass() {
    let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mesh-test/truth");
    let mut files = 0;
    for entry in fs::read_dir(tables).unwrap() {
        let table = entry.unwrap().path().display().to_string();
        let run = meshctl(&["policy", "test", "--quiet", &table]);
        assert_eq!((run.code, run.err.as_str()), (0, ""), "{}", run.out);
        files += 1;
    }
    assert!(files >= 5, "{files}");
}

/// An agent that answers one question.
fn answering(
    dir: &TempDir,
    status: &'static str,
    body: &'static str,
) -> thread::JoinHandle<String> {
    let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            request.push(byte[0]);
        }
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        String::from_utf8(request).unwrap()
    })
}

#[test]
fn agent_pages_are_printed() {
    let ask = |command: &str, status: &'static str, body: &'static str| {
        let dir = TempDir::new().unwrap();
        let agent = answering(&dir, status, body);
        let run = meshctl(&[command, "--socket", &path(&dir, "agent.sock")]);
        (run, agent.join().unwrap())
    };
    let (run, request) = ask("dump", "200 OK", "pods:\n");
    assert_eq!((run.code, run.out.as_str()), (0, "pods:\n"));
    assert!(request.starts_with("GET /plan HTTP/1.1\r\n"));
    let (run, _) = ask("status", "200 OK", r#"{"ready": true, "rejections": []}"#);
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "ready: true\nrejections: 0\n")
    );
    let (run, _) = ask(
        "status",
        "200 OK",
        r#"{"ready": true, "rejections": [{"object": "Pod a/b", "field": "f", "why": "w", "consequence": "c"}]}"#,
    );
    assert_eq!(run.code, 1);
    assert!(run.out.contains("  Pod a/b: f: w; c\n"), "{}", run.out);
    let (run, _) = ask("flows", "404 Not Found", "no such page");
    assert_eq!(run.code, 1);
    assert!(run.err.contains("404"), "{}", run.err);
    assert_eq!(meshctl(&["status", "--socket", "/nonexistent"]).code, 1);
}

#[test]
fn status_lists_rejections_and_warnings() {
    let dir = TempDir::new().unwrap();
    let body = r#"{"ready": true, "policies_in_force": ["NetworkPolicy a/b"],
        "match_nothing": ["ClusterNetworkPolicy c: spec.egress[0].to[0].domainNames"],
        "warnings": [{"object": "Pod a/b", "field": "f", "what": "w"}], "rejections": []}"#;
    let agent = answering(&dir, "200 OK", body);
    let run = meshctl(&["status", "--socket", &path(&dir, "agent.sock")]);
    agent.join().unwrap();
    assert_eq!(run.code, 0, "{}", run.err);
    assert_eq!(
        run.out,
        "ready: true\npolicies in force on this node: 1\n  NetworkPolicy a/b\npeers that match no pod: 1\n  \
         ClusterNetworkPolicy c: spec.egress[0].to[0].domainNames\nwarnings: 1\n  Pod a/b: f: w\n\
         rejections: 0\n"
    );
}

#[test]
fn diff_compares_decisions_over_a_flow_log() {
    let dir = TempDir::new().unwrap();
    let record = |from: &str, to: &str, verdict: &str| {
        let (reason, kind) = match verdict {
            "allowed" => ("no_policy", "connection"),
            _ => ("default_deny", "denied"),
        };
        format!(
            "{{\"kind\":\"{kind}\",\"protocol\":\"tcp\",\"source\":{{\"address\":\"{from}\"}},\
             \"destination\":{{\"address\":\"{to}\",\"port\":8080}},\"verdict\":\"{verdict}\",\
             \"reason\":\"{reason}\",\"security\":\"none\"}}\n"
        )
    };
    let log = [
        record("192.0.2.1", "10.0.0.1", "denied"),
        record("198.51.100.1", "10.0.0.1", "allowed"),
        record("198.51.100.1", "10.0.0.1", "allowed"),
        record("10.0.0.1", "198.51.100.1", "allowed"),
    ];
    fs::write(dir.path().join("flows"), log.concat()).unwrap();
    fs::write(dir.path().join("new.yaml"), MANIFESTS).unwrap();
    let (new, flows) = (path(&dir, "new.yaml"), path(&dir, "flows"));
    let run = meshctl(&["policy", "diff", "-f", &new, "--flows", &flows]);
    assert_eq!(
        (run.code, run.out.as_str()),
        (
            1,
            "192.0.2.1 -> shop/web:8080 TCP: deny -> allow by NetworkPolicy shop/web ingress[0] (policy); open 0, seen 1\n\
             198.51.100.1 -> shop/web:8080 TCP: allow -> deny by MeshPolicy shop/web (default_deny); open 0, seen 2\n\
             2 of 3 kinds of connections would change\n"
        ),
        "{}",
        run.err
    );
    let same = meshctl(&[
        "policy", "diff", "-f", &new, "--flows", &flows, "--old", &new,
    ]);
    assert_eq!(same.code, 0, "{}", same.out);

    // SCTP, a line without anything, and an update that an agent would not take.
    let sctp = record("192.0.2.1", "10.0.0.1", "denied").replace("tcp", "sctp");
    fs::write(dir.path().join("flows"), format!("{sctp}\n")).unwrap();
    let bad = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: shop}, spec: {podSelector: {}, ingress: [{ports: [{port: 0}]}]}}";
    fs::write(dir.path().join("bad.yaml"), bad).unwrap();
    let bad = path(&dir, "bad.yaml");
    let run = meshctl(&[
        "policy", "diff", "-f", &bad, "--flows", &flows, "--old", &new,
    ]);
    assert_eq!(
        (run.code, run.out.as_str()),
        (2, "0 of 1 kinds of connections would change\n"),
        "{}",
        run.err
    );
    assert!(
        run.err.contains("the version in force stays"),
        "{}",
        run.err
    );
}

#[test]
fn pod_given_by_address_is_evaluated_with_that_address() {
    let dir = TempDir::new().unwrap();
    let text = "manifests:
- {apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x}, spec: {nodeName: n}, status: {podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: b, namespace: x}, spec: {nodeName: m}, status: {podIPs: [{ip: 10.0.0.2}, {ip: 'fd00::2'}]}}
- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}}
checks:
- {from: x/b, to: x/a, port: 80, expect: allow}
- {from: x/b, to: 10.0.0.1, port: 80, expect: allow}
- {from: x/b, to: 'fd00::1', port: 80, expect: deny}
- {from: 'fd00::2', to: x/a, port: 80, expect: deny}
";
    fs::write(dir.path().join("t.yaml"), text).unwrap();
    let run = meshctl(&["policy", "test", &path(&dir, "t.yaml")]);
    assert_eq!((run.code, run.out.as_str()), (0, "4 checks, 0 wrong\n"));
}

#[test]
fn pods_without_addresses_and_nodes_get_them() {
    let dir = TempDir::new().unwrap();
    let pod = |name: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: s, labels: {{app: {name}}}}}}}"
        )
    };
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: n, namespace: s}, \
                  spec: {podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}}";
    let table = format!(
        "manifests:\n- {}\n- {}\n- {}\n- {policy}\nchecks:\n\
         - {{from: s/a, to: s/b, port: 80, expect: allow}}\n\
         - {{from: s/c, to: s/b, port: 80, expect: deny}}\n\
         - {{from: s/b, to: s/c, port: 80, expect: allow}}\n",
        pod("a"),
        pod("b"),
        pod("c"),
    );
    let file = path(&dir, "t.yaml");
    fs::write(&file, &table).unwrap();
    let run = meshctl(&["policy", "test", &file]);
    assert_eq!(
        (run.code, &*run.out, &*run.err),
        (0, "3 checks, 0 wrong\n", "")
    );
    // A row that cannot be asked is told from those that hold.
    fs::write(
        &file,
        table + "- {from: s/d, to: s/b, port: 80, expect: deny}\n",
    )
    .unwrap();
    let run = meshctl(&["policy", "test", &file]);
    assert_eq!(
        (run.code, &*run.out),
        (2, "4 checks, 0 wrong, 1 invalid\n"),
        "{}",
        run.err
    );
}
