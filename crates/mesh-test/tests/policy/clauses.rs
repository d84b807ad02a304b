// SPDX-License-Identifier: Apache-2.0
//! Policy clauses as truth tables over real connections: from the same and the other node, from inside
//! and outside the mesh, by IPv4 and IPv6.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::Tcp;
use mesh_test::{Host, Lab, Mesh, PodSpec, Topology};

/// Refused means at once, not after a time-out.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Who tries to reach the server, which is on node 2: pods of its namespace on the other node and
/// on its own, one of another namespace, one that is not in the mesh, a host that is not in the
/// cluster, and the two nodes.
const CLIENTS: [&str; 7] = ["far", "near", "blue", "plain", "outside", "node1", "node2"];
const PORTS: [u16; 2] = [7000, 7001];

struct Row {
    name: &'static str,
    objects: &'static str,
    /// In the order of [`CLIENTS`]: which of [`PORTS`] each may reach.
    expected: [&'static str; 7],
}

const NETWORK_POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
";

const ROWS: &[Row] = &[
    Row {
        name: "no policy",
        objects: "",
        expected: ["++", "++", "++", "++", "++", "++", "++"],
    },
    Row {
        name: "nothing is allowed; the node reaches its own pods nevertheless",
        objects: "NP  ingress: []",
        expected: ["--", "--", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "a pod of the namespace",
        objects: "NP  ingress: [{from: [{podSelector: {matchLabels: {app: far}}}]}]",
        expected: ["++", "--", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "all pods of the namespace",
        objects: "NP  ingress: [{from: [{podSelector: {}}]}]",
        expected: ["++", "++", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "another namespace",
        objects: "NP  ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]",
        expected: ["--", "--", "++", "--", "--", "--", "++"],
    },
    Row {
        name: "a pod of a namespace outside the mesh: its address is enough for NetworkPolicy",
        objects: "NP  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: plain}}}]}]",
        expected: ["--", "--", "--", "++", "--", "--", "++"],
    },
    Row {
        name: "addresses, with an exception",
        objects: "NP  ingress: [{from: [
            {ipBlock: {cidr: 10.244.1.0/24, except: [10.244.1.10/32]}},
            {ipBlock: {cidr: 'fd00:244:1::/64', except: ['fd00:244:1::a/128']}}]}]",
        expected: ["--", "--", "++", "++", "--", "--", "++"],
    },
    Row {
        name: "addresses of no pod",
        objects: "NP  ingress: [{from: [
            {ipBlock: {cidr: 192.168.50.100/32}}, {ipBlock: {cidr: 'fd00:50::64/128'}}]}]",
        expected: ["--", "--", "--", "--", "++", "--", "++"],
    },
    Row {
        name: "a port",
        objects: "NP  ingress: [{ports: [{port: 7000}]}]",
        expected: ["+-", "+-", "+-", "+-", "+-", "+-", "++"],
    },
    Row {
        name: "a named port, and from whom",
        objects: "NP  ingress: [{from: [{podSelector: {}}], ports: [{port: web, protocol: TCP}]}]",
        expected: ["+-", "+-", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "a range of ports",
        objects: "NP  ingress: [{ports: [{port: 7001, endPort: 7009}]}]",
        expected: ["-+", "-+", "-+", "-+", "-+", "-+", "++"],
    },
    Row {
        name: "the protocol is another",
        objects: "NP  ingress: [{ports: [{port: 7000, protocol: UDP}]}]",
        expected: ["--", "--", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "egress: one port of one pod",
        objects: "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchExpressions: [{key: app, operator: In, values: [far, near]}]}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: server}}}], ports: [{port: 7001}]}]
",
        expected: ["-+", "-+", "++", "++", "++", "++", "++"],
    },
    Row {
        name: "service accounts: proven by certificate or by the node, never by address",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{serviceAccounts: [far, near, plain/plain]}]}]
",
        expected: ["++", "++", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "a denial beats what is allowed",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  action: Deny
  ingress: [{from: [{serviceAccounts: [far, plain/plain]}], ports: [{port: 7000}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {}}]}]
",
        expected: ["-+", "++", "--", "--", "--", "--", "++"],
    },
    Row {
        name: "a denial of service accounts matches addresses, too",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  action: Deny
  ingress: [{from: [{serviceAccounts: [far, plain/plain]}]}]
",
        expected: ["--", "++", "++", "--", "++", "++", "++"],
    },
    Row {
        name: "entities",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
    - {from: [{entities: [world]}], ports: [{port: 7000}]}
    - {from: [{entities: [remote-node]}], ports: [{port: 7001}]}
",
        expected: ["--", "--", "--", "--", "+-", "-+", "++"],
    },
    Row {
        name: "audit refuses nothing",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  mode: Audit
  ingress: []
",
        expected: ["++", "++", "++", "++", "++", "++", "++"],
    },
    Row {
        name: "the admin tier decides before the namespace, also about the node",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: ClusterMeshPolicy
metadata: {name: case}
spec:
  tier: Admin
  priority: 10
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: red}}
  podSelector: {matchLabels: {app: server}}
  ingress:
    - {action: Deny, from: [{entities: [host]}], ports: [{port: 7001}]}
    - {action: Allow, from: [{entities: [world]}]}
    - {action: Pass, from: [{serviceAccounts: [red/far]}]}
    - {action: Deny, from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: red}}}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {}}], ports: [{port: 7000}]}]
",
        expected: ["+-", "--", "--", "--", "++", "--", "+-"],
    },
    Row {
        name: "the baseline tier decides where the namespace does not isolate",
        objects: "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: case}
spec:
  tier: Baseline
  priority: 10
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: server}}}}
  ingress:
    - {name: blue, action: Accept, from: [{namespaces: {matchLabels: {team: blue}}}]}
    - {name: others, action: Deny, from: [{namespaces: {}}]}
",
        expected: ["--", "--", "++", "--", "++", "++", "++"],
    },
    Row {
        name: "strict: who is in the mesh, and the node",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: case, namespace: red}
spec: {mtls: Strict}
",
        expected: ["++", "++", "++", "--", "--", "--", "++"],
    },
    Row {
        name: "strict but for a port, and policy",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  mtls: Strict
  ports: [{port: 7001, mtls: Permissive}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [near]}]}}]}]
",
        expected: ["++", "--", "++", "-+", "--", "--", "++"],
    },
    Row {
        name: "permissive but for a port",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  mtls: Permissive
  ports: [{port: 7001, mtls: Strict}]
",
        expected: ["++", "++", "++", "+-", "+-", "+-", "++"],
    },
    Row {
        name: "a port alone, the rest as the mesh says",
        objects: "
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: default, namespace: mesh-system}
spec: {mtls: Strict}
---
apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: case, namespace: red}
spec:
  podSelector: {matchLabels: {app: server}}
  ports: [{port: 7000, mtls: Permissive}]
",
        expected: ["++", "++", "++", "+-", "+-", "+-", "++"],
    },
    Row {
        name: "no policy any more",
        objects: "",
        expected: ["++", "++", "++", "++", "++", "++", "++"],
    },
];

fn lab(topology: Topology) -> Lab {
    Lab::builder(topology)
        .outside()
        .namespace("red", &[ENROLLED])
        .namespace("blue", &[ENROLLED, ("team", "blue")])
        .namespace("plain", &[])
        .pod(PodSpec::new("far", 1).namespace("red"))
        .pod(PodSpec::new("near", 2).namespace("red"))
        .pod(PodSpec::new("blue", 1).namespace("blue"))
        .pod(PodSpec::new("plain", 1).namespace("plain"))
        .pod(
            PodSpec::new("server", 2)
                .namespace("red")
                .port("web", PORTS[0], "TCP"),
        )
        .build()
        .expect("lab")
}

/// `+` or `-` for each port; both families must agree.
fn reaches(client: &Host, server: &[IpAddr]) -> String {
    let sign = |port: &u16| {
        let outcomes: Vec<bool> = server
            .iter()
            .map(|ip| {
                let begun = Instant::now();
                let to = SocketAddr::new(*ip, *port);
                let output = client.probe(&format!("tcp --to {to}")).expect("run");
                let report: Tcp = output.json().expect("report");
                let took = begun.elapsed();
                assert!(took < AT_ONCE, "{to} after {took:?}: {report:?}");
                report.ok
            })
            .collect();
        match outcomes[..] {
            [true, true] => '+',
            [false, false] => '-',
            _ => '?',
        }
    };
    PORTS.iter().map(sign).collect()
}

/// Puts a row's objects in force; none of them is rejected.
fn enforce(mesh: &Mesh, row: &Row) {
    let objects = match row.objects.strip_prefix("NP") {
        Some(rules) => format!("{NETWORK_POLICY}{rules}"),
        None => row.objects.to_owned(),
    };
    mesh.enforce(&objects).expect(row.name);
    for agent in &mesh.agents {
        let status = agent.ask("/status").expect("status");
        let none = status["rejections"].as_array().is_some_and(Vec::is_empty);
        assert!(none, "{}: {status:#}", row.name);
    }
}

#[test]
fn policy_clauses_decide_real_connections() {
    let mesh = Mesh::start(lab(Topology::Routed)).expect("mesh");
    let server = mesh.pod("server");
    let ports = format!("{}-{}", PORTS[0], PORTS[1]);
    let line = format!("--tcp [::]:0 --ports {ports} --name server");
    let _server = server.serve(&line).expect("server");
    let pods = ["far", "near", "blue", "plain"].map(|name| mesh.pod(name));
    let outside = mesh.outside().expect("outside");
    let clients: [&Host; 7] = [
        &pods[0],
        &pods[1],
        &pods[2],
        &pods[3],
        outside,
        mesh.node(1),
        mesh.node(2),
    ];
    let mut wrong = Vec::new();
    for row in ROWS {
        enforce(&mesh, row);
        let found: Vec<String> = std::thread::scope(|scope| {
            let addresses = server.addresses();
            let all: Vec<_> = clients
                .into_iter()
                .map(|client| scope.spawn(move || reaches(client, addresses)))
                .collect();
            all.into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        for ((client, found), expected) in CLIENTS.iter().zip(&found).zip(row.expected) {
            if found != expected {
                wrong.push(format!(
                    "{}: {client}: expected {expected}, found {found}",
                    row.name
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
