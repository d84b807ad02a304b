// SPDX-License-Identifier: Apache-2.0
//! Services as a table of cases, each a real connection or datagram from a pod through two agents.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::{Tcp, Udp};
use mesh_test::{Lab, Mesh, Pod, PodSpec, Topology, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 80;

/// An endpoint's three conditions: ready, serving, terminating.
type Conditions = (bool, bool, bool);
const READY: Conditions = (true, true, false);
const NOT_READY: Conditions = (false, false, false);
const LEAVING: Conditions = (false, true, true);
const GONE: Conditions = (false, false, true);

/// A service with one address of each family, its endpoints, and who is to answer.
struct Case {
    name: &'static str,
    endpoints: &'static [(&'static str, Conditions)],
    publish_not_ready: bool,
    answer: &'static [&'static str],
}

/// `near` is on the client's node, `far` on the other one.
const CASES: &[Case] = &[
    Case {
        name: "all-ready",
        endpoints: &[("near", READY), ("far", READY)],
        publish_not_ready: false,
        answer: &["near", "far"],
    },
    Case {
        name: "one-not-ready",
        endpoints: &[("near", NOT_READY), ("far", READY)],
        publish_not_ready: false,
        answer: &["far"],
    },
    Case {
        name: "ready-before-leaving",
        endpoints: &[("near", LEAVING), ("far", READY)],
        publish_not_ready: false,
        answer: &["far"],
    },
    Case {
        name: "only-leaving",
        endpoints: &[("near", LEAVING), ("far", GONE)],
        publish_not_ready: false,
        answer: &["near"],
    },
    Case {
        name: "published-not-ready",
        endpoints: &[("far", NOT_READY)],
        publish_not_ready: true,
        answer: &["far"],
    },
    Case {
        name: "none-ready",
        endpoints: &[("near", NOT_READY), ("far", GONE)],
        publish_not_ready: false,
        answer: &[],
    },
    Case {
        name: "no-endpoints",
        endpoints: &[],
        publish_not_ready: false,
        answer: &[],
    },
    Case {
        name: "hairpin",
        endpoints: &[("client", READY)],
        publish_not_ready: false,
        answer: &["client"],
    },
];

impl Case {
    fn addresses(&self, number: usize) -> [IpAddr; 2] {
        let last = u8::try_from(number + 10).expect("few cases");
        let v6 = format!("fd00:96::{last:x}").parse().expect("an address");
        [IpAddr::from([10, 96, 0, last]), v6]
    }

    fn apply(&self, mesh: &Mesh, number: usize) {
        let addresses = self.addresses(number);
        let protocols = ["TCP", "UDP"];
        let port = |protocol: &&str| json!({"name": protocol.to_lowercase(), "port": PORT, "protocol": protocol});
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "default", "uid": self.name},
            "spec": {
                "clusterIP": addresses[0],
                "clusterIPs": addresses,
                "ipFamilies": ["IPv4", "IPv6"],
                "publishNotReadyAddresses": self.publish_not_ready,
                "ports": protocols.iter().map(port).collect::<Vec<_>>(),
            },
        });
        mesh.apply(&format!("service-{}", self.name), &service)
            .expect("apply");
        for (family, at) in [("IPv4", 0), ("IPv6", 1)] {
            let endpoint = |(name, (ready, serving, terminating)): &(&str, Conditions)| {
                json!({
                    "addresses": [mesh.pod(name).addresses()[at]],
                    "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
                    "nodeName": mesh.pod(name).node().name(),
                })
            };
            let target = |protocol: &&str| json!({"name": protocol.to_lowercase(), "port": 8080, "protocol": protocol});
            let slice: Value = json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}", self.name, family.to_lowercase()),
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": self.name},
                },
                "addressType": family,
                "endpoints": self.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
                "ports": protocols.iter().map(target).collect::<Vec<_>>(),
            });
            mesh.apply(&format!("slice-{}-{family}", self.name), &slice)
                .expect("apply");
        }
    }
}

fn mesh() -> Mesh {
    let pods = [
        PodSpec::new("client", 1),
        PodSpec::new("near", 1),
        PodSpec::new("far", 2),
    ];
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods(pods)
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    for (number, case) in CASES.iter().enumerate() {
        case.apply(&mesh, number);
    }
    mesh
}

/// Returns the ways in which a client connects to a service.
fn ways([v4, v6]: [IpAddr; 2], port: u16) -> [(SocketAddr, &'static str); 3] {
    let v4 = SocketAddr::new(v4, port);
    [(v4, ""), (v4, "--mapped"), (SocketAddr::new(v6, port), "")]
}

fn tcp(client: &Pod, to: SocketAddr, options: &str) -> Tcp {
    let output = client
        .probe(&format!("tcp --to {to} {options}"))
        .expect("run");
    output.json().expect("report")
}

const REFUSED: i32 = libc::ECONNREFUSED;

#[test]
fn service_cases_reach_expected_backends() {
    let mesh = mesh();
    let client = mesh.pod("client");
    let _servers: Vec<_> = ["client", "near", "far"]
        .map(|name| {
            let line = format!("--tcp [::]:8080 --udp [::]:8080 --name {name}");
            mesh.pod(name).serve(&line).expect("server")
        })
        .into();
    let last = CASES.len() - 1;
    let known = CASES[last].addresses(last);
    eventually("the last service to be known", SOON, || {
        tcp(&client, SocketAddr::new(known[1], PORT), "")
            .ok
            .then_some(())
    })
    .expect("services");
    for (number, case) in CASES.iter().enumerate() {
        for (to, options) in ways(case.addresses(number), PORT) {
            check_tcp(case, &client, to, options);
            check_udp(case, &client, to, options);
        }
        for (to, options) in ways(case.addresses(number), 81) {
            let report = tcp(&client, to, options);
            assert_eq!(
                report.errno,
                Some(REFUSED),
                "{}: no such port: {report:?}",
                case.name
            );
        }
    }
}

fn check_tcp(case: &Case, client: &Pod, to: SocketAddr, options: &str) {
    let what = format!("{} by TCP to {to} {options}", case.name);
    if case.answer.is_empty() {
        let begun = Instant::now();
        let report = tcp(client, to, options);
        assert_eq!(report.errno, Some(REFUSED), "{what}: {report:?}");
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "{what}: not at once"
        );
        return;
    }
    let mut answered = BTreeSet::new();
    // With two backends, the chance that one is not met in so many tries is 2^-15.
    for _ in 0..16 {
        let report = tcp(client, to, options);
        assert!(report.ok, "{what}: {report:?}");
        assert_eq!(report.peer, Some(to), "{what}: the peer is the service");
        let seen = report.identity.expect("an identity");
        let own = seen.client.ip() == client.v4() || seen.client.ip() == client.v6();
        assert!(
            own,
            "{what}: the server sees the client's own address: {seen}"
        );
        assert_eq!(
            Some(seen.client.port()),
            report.local.map(|at| at.port()),
            "{what}"
        );
        answered.insert(seen.name);
    }
    assert!(
        answered.iter().eq(sorted(case.answer)),
        "{what}: {answered:?}"
    );
}

fn check_udp(case: &Case, client: &Pod, to: SocketAddr, options: &str) {
    for connected in ["", "--connected"] {
        let what = format!("{} by UDP to {to} {options} {connected}", case.name);
        let line = format!("udp --to {to} {options} {connected} --count 2 --timeout-ms 3000");
        let report: Udp = client.probe(&line).expect("run").json().expect("report");
        if case.answer.is_empty() {
            assert_eq!((report.sent, report.received), (0, 0), "{what}: {report:?}");
            continue;
        }
        assert_eq!((report.sent, report.received), (2, 2), "{what}: {report:?}");
        assert_eq!(
            report.from.get(&to),
            Some(&2),
            "{what}: the service answers: {report:?}"
        );
        if !connected.is_empty() {
            assert_eq!(report.peer, Some(to), "{what}");
        }
        for name in report.names.keys() {
            assert!(case.answer.contains(&name.as_str()), "{what}: {name}");
        }
    }
}

fn sorted<'a>(names: &[&'a str]) -> BTreeSet<&'a str> {
    names.iter().copied().collect()
}

#[test]
fn headless_service_is_named_in_records() {
    let mesh = mesh();
    let (client, far) = (mesh.pod("client"), mesh.pod("far"));
    let _server = far.serve("--tcp [::]:8080").expect("server");
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "headless", "namespace": "default", "uid": "headless"},
        "spec": {"clusterIP": "None", "ports": [{"name": "tcp", "port": 8080}]},
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "headless-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "headless"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [far.v4()], "conditions": {"ready": true}}],
        "ports": [{"name": "tcp", "port": 8080, "protocol": "TCP"}],
    });
    mesh.apply("service-headless", &service).expect("apply");
    mesh.apply("slice-headless", &slice).expect("apply");
    let to = SocketAddr::new(far.v4().into(), 8080);
    eventually("a record with the service's name", SOON, || {
        let report = tcp(&client, to, "");
        assert!(report.ok, "{report:?}");
        let records = mesh.agent_of(&client).flows().ok()?;
        let named = |record: &Value| record["service"].to_string().contains("headless");
        records.iter().any(named).then_some(())
    })
    .expect("named");
}
