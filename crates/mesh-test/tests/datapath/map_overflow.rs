// SPDX-License-Identifier: Apache-2.0
//! A policy that does not fit into the kernel's maps isolates the pods that it selects, is reported, and
//! affects no other pod.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::maps::{MAX_POLICY_CIDRS, MAX_SERVICES};
use mesh_test::reports::Tcp;
use mesh_test::{Host, Lab, Mesh, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(60);
const PORT: u16 = 7000;

fn reaches(from: &Host, to: SocketAddr) -> bool {
    let line = format!("tcp --to {to} --timeout-ms 2000");
    let report: Tcp = from.probe(&line).expect("run").json().expect("report");
    report.ok
}

/// A policy that lets everybody in, and names so many blocks beside.
fn policy(name: &str, blocks: u32) -> String {
    let mut text = format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: {name}}}}}
  ingress:
  - from:
    - {{podSelector: {{}}}}
"
    );
    for number in 0..blocks {
        // Every other address, so that no two are one block.
        let [_, b, c, d] = (number * 2).to_be_bytes();
        let _infallible = writeln!(text, "    - {{ipBlock: {{cidr: 172.{b}.{c}.{d}/32}}}}");
    }
    text
}

#[test]
fn policy_map_overflow_isolates_only_affected_pods() {
    let pods = ["client", "victim", "neighbour"];
    let lab = Lab::builder(Topology::Routed)
        .namespace("shop", &[])
        .pods(pods.map(|name| PodSpec::new(name, 1).namespace("shop").label("app", name)))
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let line = format!("--tcp [::]:{PORT}");
    let _servers =
        ["client", "victim", "neighbour"].map(|name| mesh.pod(name).serve(&line).expect("server"));
    let [client, victim, neighbour] = ["client", "victim", "neighbour"].map(|it| mesh.pod(it));
    let at = |pod: &mesh_test::Pod| SocketAddr::from((pod.v4(), PORT));
    let isolated = || {
        let labels = [("state", "isolated")];
        mesh.metric("mesh_pods", &labels).expect("metric")
    };
    let rejections = || mesh.agent(1).ask("/status").expect("status")["rejections"].to_string();

    let log = || std::fs::read_to_string(mesh.agent(1).process().log()).expect("log");

    // It fits, if barely: said before anything is cut off.
    let most = MAX_POLICY_CIDRS / 2;
    mesh.apply_text("neighbour", &policy("neighbour", 3))
        .expect("apply");
    mesh.apply_text("victim", &policy("victim", most - 100))
        .expect("apply");
    eventually("the map to be nearly full", SOON, || {
        let labels = [("map", "POLICY_CIDRS")];
        let entries = mesh.metric("mesh_map_entries", &labels).expect("metric");
        (entries >= f64::from(most - 100)).then_some(())
    })
    .expect("in force");
    assert!(reaches(&client, at(&victim)) && reaches(&client, at(&neighbour)));
    assert!(log().contains("map is nearly full"));
    assert!(isolated() < 1.0);

    mesh.apply_text("victim", &policy("victim", most + 1))
        .expect("apply");
    eventually("the pod to be cut off", SOON, || {
        (isolated() > 0.0).then_some(())
    })
    .expect("isolated");
    // Neither in nor out, also where no policy speaks of it.
    assert!(!reaches(&client, at(&victim)));
    assert!(!reaches(&victim, at(&client)));
    assert!(reaches(&client, at(&neighbour)) && reaches(&neighbour, at(&client)));
    assert!(isolated() < 2.0);
    let said = rejections();
    for word in ["shop/victim", "address blocks", &most.to_string()] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let log = log();
    assert!(
        log.contains("policy only partly enforced") && log.contains("isolates"),
        "{log}"
    );

    mesh.apply_text("victim", &policy("victim", 3))
        .expect("apply");
    eventually("the pod to be back", SOON, || {
        (isolated() < 1.0).then_some(())
    })
    .expect("back");
    assert!(reaches(&client, at(&victim)) && reaches(&victim, at(&client)));
    assert!(reaches(&client, at(&neighbour)));
    assert_eq!(rejections(), "[]");
}

/// A Service with as many external addresses and ports as fill the map of services.
fn greedy_service() -> String {
    let mut text = "apiVersion: v1
kind: Service
metadata: {name: greedy, namespace: tenant}
spec:
  clusterIP: 10.96.9.9
  externalIPs:
"
    .to_owned();
    for number in 0..300 {
        let _infallible = writeln!(text, "  - 198.18.{}.{}", number / 250, number % 250 + 1);
    }
    text += "  ports:\n";
    for port in 1..=240 {
        let _infallible = writeln!(text, "  - {{name: p{port}, port: {port}}}");
    }
    text
}

#[test]
fn service_map_overflow_holds_up_neither_policy_nor_services_of_others() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("shop", &[])
        .namespace("tenant", &[])
        .pods(["client", "server"].map(|name| PodSpec::new(name, 1).namespace("shop")))
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let [client, server] = ["client", "server"].map(|it| mesh.pod(it));
    let _server = server.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let direct = SocketAddr::from((server.v4(), PORT));
    assert!(reaches(&client, direct));

    mesh.apply_text("greedy", &greedy_service()).expect("apply");
    eventually("the map to be nearly full", SOON, || {
        let labels = [("map", "SERVICES")];
        let entries = mesh.metric("mesh_map_entries", &labels).expect("metric");
        (entries >= f64::from(MAX_SERVICES - 500)).then_some(())
    })
    .expect("in force");
    eventually("the rejection", SOON, || {
        let status = mesh.agent(1).ask("/status").expect("status");
        let told = status["rejections"].to_string();
        (told.contains("tenant") && told.contains("do not fit")).then_some(())
    })
    .expect("rejected by name");

    // Another tenant's service, and a policy.
    let service = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec: {{clusterIP: 10.96.9.10, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-1, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{name: http, port: {PORT}, protocol: TCP}}]
endpoints: [{{addresses: [{}]}}]
",
        server.v4()
    );
    mesh.apply_text("web", &service).expect("apply");
    let virtual_address = SocketAddr::from(([10, 96, 9, 10], 80));
    eventually("the service of others", SOON, || {
        reaches(&client, virtual_address).then_some(())
    })
    .expect("in force");
    mesh.apply_text(
        "closed",
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress]}
",
    )
    .expect("apply");
    eventually("the policy", SOON, || {
        (!reaches(&client, direct)).then_some(())
    })
    .expect("in force");
    let (ready, conditions) = mesh.agent(1).get("/readyz").expect("page");
    assert_eq!(ready, 200, "{conditions}");
    assert!(
        conditions.contains("[+] newest plan in force: ok"),
        "{conditions}"
    );
}
