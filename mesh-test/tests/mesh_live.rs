// SPDX-License-Identifier: Apache-2.0
//! Connections that are open while policy changes: who is denied is ended at once, at both ends and
//! by name; whom a change does not concern notices nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::Held;
use mesh_test::{AgentConfig, Cmd, Lab, Mesh, Pod, PodSpec, Proc, Topology, eventually};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
/// After a change is in force, a connection that it denies is gone by then.
const AT_ONCE: Duration = Duration::from_secs(1);
const PORT: u16 = 7000;
/// What refuses by [`let_in`] and by [`DENY_GOOD`], as records name it.
const NOT_LET_IN: &str = "NetworkPolicy default/server";
const RULE: &str = "MeshPolicy default/server ingress[0]";
/// Instead of the number of a rule, by which a node knows what another has decided.
const NUMBER: &str = "a number";

/// The clients, two of each way to the server: the name, the namespace, the node.
const CLIENTS: [(&str, &str, u8); 6] = [
    ("far-good", "default", 1),
    ("far-bad", "default", 1),
    ("near-good", "default", 2),
    ("near-bad", "default", 2),
    ("clear-good", "plain", 1),
    ("clear-bad", "plain", 1),
];

fn mesh(tunnel_port: &str) -> Mesh {
    let builder = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pod(PodSpec::new("server", 2))
        .pod(PodSpec::new("other", 2));
    let lab = CLIENTS
        .into_iter()
        .fold(builder, |lab, (name, namespace, node)| {
            let who = if name.ends_with("good") {
                "good"
            } else {
                "bad"
            };
            let spec = PodSpec::new(name, node).namespace(namespace);
            lab.pod(spec.label("who", who))
        })
        .build()
        .expect("lab");
    let config = AgentConfig::new(&Mesh::own_ca(&lab)).flag("--tunnel-port", tunnel_port);
    Mesh::start_with(lab, &config).expect("mesh")
}

/// A connection of each family that says something all the time and hears it again.
fn open(client: &Pod, server: &Pod) -> [Proc; 2] {
    [server.v4().into(), server.v6().into()].map(|ip| {
        let to = SocketAddr::new(ip, PORT);
        let line = format!("hold --to {to} --pulse-ms 5 --timeout-ms 5000");
        let proc = client.start_probe(&line).expect("client");
        assert!(matches!(said(&proc, SOON), Held::Open(_)), "{to}");
        proc
    })
}

fn said(client: &Proc, within: Duration) -> Held {
    let line = client.line(within).expect("in time").expect("a line");
    serde_json::from_str(&line).expect("a report")
}

/// The policy of the server: whom it lets in, by the label `who`.
fn let_in(who: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: server, namespace: default}}\n\
         spec:\n  podSelector: {{matchLabels: {{app: server}}}}\n  ingress:\n\
         \x20   - from: [{{namespaceSelector: {{}}, podSelector: {{matchExpressions: \
         [{{key: who, operator: In, values: [{who}]}}]}}}}]\n"
    )
}

/// Changes that end nothing of what is open: of another pod, of more than is used, and of the ways
/// to prove oneself.
fn that_end_nothing() -> Vec<String> {
    let other = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                 metadata: {name: other, namespace: default}\n\
                 spec: {podSelector: {matchLabels: {app: other}}, policyTypes: [Ingress, Egress]}\n";
    let strict = "apiVersion: mesh.rs/v1alpha1\nkind: MeshAuthentication\n\
                  metadata: {name: ports, namespace: default}\n\
                  spec: {mtls: Permissive, ports: [{port: 7001, mtls: Strict}]}\n";
    let both = let_in("good, bad");
    vec![
        other.to_owned(),
        both.clone(),
        format!("{both}---\n{other}"),
        format!("{both}---\n{strict}"),
        String::new(),
        both,
    ]
}

/// What the records say of connections that a policy's change ended: who opened them, which end
/// reports, and what ended them.
fn ended(mesh: &Mesh) -> Vec<[String; 3]> {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut all = Vec::new();
    for agent in &mesh.agents {
        for r in agent.flows().expect("flows") {
            if r["close"] == "policy_changed" {
                assert_eq!(r["closed_by"], "agent", "{r:#}");
                let [source, reporter, by] =
                    [&r["source"]["workload"], &r["reporter"], &r["ended_by"]].map(text);
                let is_number = u64::from_str_radix(&by, 16).is_ok();
                let by = if is_number { NUMBER.to_owned() } else { by };
                all.push([source, reporter, by]);
            }
        }
    }
    all.sort();
    all
}

/// Whose connections the server has open, by its own sockets; the agent's are left out.
fn at_the_server(server: &Pod) -> BTreeSet<IpAddr> {
    let list = Cmd::line("ss -Htnp state established");
    let list = server
        .run(list, SOON)
        .expect("run")
        .ok()
        .expect("ss")
        .text();
    let of_probe = list.lines().filter(|line| line.contains("\"probe\""));
    let peers = of_probe.filter_map(|line| {
        let peer: SocketAddr = line.split_whitespace().nth(3)?.parse().ok()?;
        Some(peer.ip().to_canonical())
    });
    peers.collect()
}

/// A policy that denies who is left, by a rule with a name.
const DENY_GOOD: &str = "
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: server, namespace: default}
spec:
  podSelector: {matchLabels: {app: server}}
  action: Deny
  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {who: good}}}]}]
";

/// The connections to the server, client by client.
struct Open {
    clients: Vec<(Arc<Pod>, [Proc; 2])>,
}

impl Open {
    /// No connection ends within this time, and the server has those of these clients, no others.
    fn go_on(&self, server: &Pod, time: Duration, what: &str) {
        let until = Instant::now() + time;
        for (client, procs) in &self.clients {
            for proc in procs {
                let left = until.saturating_duration_since(Instant::now());
                let line = proc.line(left);
                assert!(line.is_err(), "{what}: {}: {line:?}", client.name());
            }
        }
        let had = eventually("the server to have what is open", AT_ONCE, || {
            (at_the_server(server) == self.addresses()).then_some(())
        });
        assert_eq!(at_the_server(server), self.addresses(), "{what}: {had:?}");
    }

    fn addresses(&self) -> BTreeSet<IpAddr> {
        let pods = self.clients.iter();
        pods.flat_map(|(pod, _)| pod.addresses()).copied().collect()
    }

    /// The connections of these clients are ended at once, the others go on.
    fn end(&mut self, who: &str, server: &Pod, what: &str) {
        let ends = |(client, _): &mut (Arc<Pod>, _)| client.name().ends_with(who);
        for (client, procs) in self.clients.extract_if(.., ends) {
            let client = client.name();
            for proc in &procs {
                let end = said(proc, AT_ONCE);
                let Held::Closed { how, echoed, .. } = &end else {
                    unreachable!("{what}: {client}: {end:?}");
                };
                assert!(["reset", "aborted"].contains(&&**how), "{end:?}");
                assert!(*echoed > 0, "{what}: {client}: {end:?}");
            }
        }
        self.go_on(server, Duration::ZERO, what);
    }
}

/// What is to be recorded once connections of the `who` clients have ended by `by`: two of each,
/// one a family. A reset is all that a node without a tunnel is told of what another decides.
fn records(who: &str, by: &str) -> Vec<[String; 3]> {
    let rows = [
        ("clear", "destination", by),
        ("far", "destination", by),
        ("far", "source", NUMBER),
        ("near", "destination", by),
        ("near", "source", by),
    ];
    let row = |(client, end, by): (&str, &str, &str)| {
        [format!("{client}-{who}"), end.to_owned(), by.to_owned()]
    };
    rows.into_iter()
        .map(row)
        .flat_map(|r| [r.clone(), r])
        .collect()
}

#[test]
fn a_change_ends_what_it_denies_and_nothing_else() {
    for tunnel_port in ["15008", "real"] {
        let mesh = mesh(tunnel_port);
        let server = mesh.pod("server");
        let line = format!("--tcp [::]:{PORT}");
        let _listener = server.serve(&line).expect("a server");
        let connected = |(name, ..): (&str, _, _)| {
            let client = mesh.pod(name);
            let procs = open(&client, &server);
            (client, procs)
        };
        let mut open = Open {
            clients: CLIENTS.into_iter().map(connected).collect(),
        };
        for change in that_end_nothing() {
            mesh.enforce(&change).expect("in force");
        }
        // Some connections are looked at a while later.
        open.go_on(&server, AT_ONCE, tunnel_port);
        assert!(ended(&mesh).is_empty(), "{tunnel_port}: {:?}", ended(&mesh));

        let mut expected = Vec::new();
        for (who, policy, by) in [
            ("bad", let_in("good"), NOT_LET_IN),
            ("good", DENY_GOOD.to_owned(), RULE),
        ] {
            mesh.enforce(&policy).expect("in force");
            open.end(who, &server, &format!("{tunnel_port}: {who}"));
            expected.extend(records(who, by));
            expected.sort();
            let recorded = eventually("records", SOON, || (ended(&mesh) == expected).then_some(()));
            assert_eq!(ended(&mesh), expected, "{tunnel_port}: {recorded:?}");
        }
    }
}
