// SPDX-License-Identifier: Apache-2.0
//! Services, endpoints and modes that are changed, deleted and made again in a real API server, and
//! watches that are cut, while traffic flows.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::Context as _;
use mesh_test::reports::Tcp;
use mesh_test::{Cmd, Pod, eventually};
use serde_json::{Value, json};

use super::fixture::{Fixture, PORT, SOON, does_reach, serve, storm, unharmed};
use super::{DENY, is_tunnelled};

const VIP: &str = "10.96.0.77";

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "shop", "namespace": "default"},
        "spec": {"clusterIP": VIP, "ports": [{"port": PORT}]},
    })
}

fn slice(pods: &[&Pod]) -> Value {
    let endpoint = |pod: &&Pod| json!({"addresses": [pod.v4()], "conditions": {"ready": true}});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "shop-1", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "shop"},
        },
        "addressType": "IPv4",
        "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"port": PORT, "protocol": "TCP"}],
    })
}

/// Waits until the service is answered by these pods and no others.
fn answered_by(fixture: &Fixture, from: &Pod, pods: &[&Pod]) {
    let to = SocketAddr::new(VIP.parse().expect("an address"), PORT);
    let line = format!("tcp --to {to} --timeout-ms 1500");
    let expected: BTreeSet<String> = pods.iter().map(|pod| pod.name().to_owned()).collect();
    let answer = || {
        let report: Tcp = from.probe(&line).ok()?.json().ok()?;
        report.ok.then_some(report.identity?.name)
    };
    eventually("the service to be answered so", SOON, || {
        let names: BTreeSet<String> = (0..8).filter_map(|_| answer()).collect();
        (names == expected).then_some(())
    })
    .with_context(|| format!("{expected:?}: {:?}\n{}", answer(), fixture.logs()))
    .expect("answered");
}

#[test]
fn service_and_mode_changes_are_enforced_under_traffic() {
    let mut fixture = Fixture::open();
    fixture.kube.namespace("plain", &[]).expect("namespace");
    let plain = fixture.add_in("plain", "plain", 1);
    let [a, near, b] = ["a", "near", "b"].map(|name| fixture.mesh.pod(name));
    let _servers = [&near, &b].map(|pod| {
        let line = format!("--tcp [::]:{PORT} --name {}", pod.name());
        pod.serve(&line).expect("server")
    });
    is_tunnelled(&fixture, &a, &b);
    let storm = storm(&a, &b);
    let apply = |object: &Value| {
        let applied = fixture.kube.apply_text(&object.to_string());
        applied.expect("applied")
    };
    // Deleted, and made again under the same name.
    for _ in 0..2 {
        apply(&service());
        apply(&slice(&[&b]));
        answered_by(&fixture, &a, &[&b]);
        apply(&slice(&[&near]));
        answered_by(&fixture, &a, &[&near]);
        apply(&slice(&[&near, &b]));
        answered_by(&fixture, &a, &[&near, &b]);
        for kind in ["endpointslice", "service"] {
            let name = if kind == "service" { "shop" } else { "shop-1" };
            let delete = ["delete", kind, name];
            fixture.kube.kubectl(delete).expect("delete");
            answered_by(&fixture, &a, &[]);
        }
    }
    let strict = |mtls: &str| {
        json!({
            "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshAuthentication",
            "metadata": {"name": "mode", "namespace": "default"},
            "spec": {"podSelector": {"matchLabels": {"app": "b"}}, "mtls": mtls},
        })
    };
    for _ in 0..2 {
        fixture.until(&plain, &b, true);
        apply(&strict("Strict"));
        fixture.until(&plain, &b, false);
        apply(&strict("Permissive"));
        fixture.until(&plain, &b, true);
        apply(&strict("Strict"));
        fixture.until(&plain, &b, false);
        let delete = ["delete", "meshauthentication", "mode"];
        fixture.kube.kubectl(delete).expect("delete");
    }
    fixture.until(&plain, &b, true);
    unharmed(&storm);
}

#[test]
fn interrupted_watch_is_resumed() {
    let fixture = Fixture::open();
    let [a, near, b] = ["a", "near", "b"].map(|name| fixture.mesh.pod(name));
    let _servers = [&near, &b].map(|pod| serve(pod));
    is_tunnelled(&fixture, &a, &b);
    let storm = storm(&a, &b);
    let view = [
        "config",
        "view",
        "--output=jsonpath={.clusters[0].cluster.server}",
    ];
    let server = fixture.kube.kubectl(view).expect("kubeconfig");
    let (_, port) = server.trim().rsplit_once(':').expect("a port");
    for _ in 0..5 {
        for node in [1, 2] {
            let cut = format!("ss -HKtn state established dport = :{port}");
            let cut = fixture.mesh.node(node).run(Cmd::line(&cut), SOON);
            let cut = cut.expect("run").ok().expect("ss").text();
            assert!(!cut.trim().is_empty(), "node {node} watches nothing");
        }
        fixture.kube.apply_text(DENY).expect("apply");
        fixture.until(&a, &near, false);
        let delete = ["delete", "networkpolicy", "lock"];
        fixture.kube.kubectl(delete).expect("delete");
        fixture.until(&a, &near, true);
        assert!(does_reach(&a, &b));
    }
    unharmed(&storm);
}
