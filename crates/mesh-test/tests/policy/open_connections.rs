// SPDX-License-Identifier: Apache-2.0
//! Open connections under policy changes: denied ones are closed at both endpoints and recorded; all
//! others stay.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_test::manifests::isolate;
use mesh_test::mesh::ENROLLED;
use mesh_test::reports::Held;
use mesh_test::{AgentConfig, Cmd, Lab, Mesh, Pod, PodSpec, Proc, Topology, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);
/// After a change is in force, a connection that it denies is gone by then.
const AT_ONCE: Duration = Duration::from_secs(1);
const PORT: u16 = 7000;
/// The rules of [`let_in`] and [`DENY_GOOD`] that refuse, as records name them.
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
    let clients = CLIENTS.map(|(name, namespace, node)| {
        let who = if name.ends_with("good") {
            "good"
        } else {
            "bad"
        };
        let spec = PodSpec::new(name, node).namespace(namespace);
        spec.label("who", who)
    });
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .namespace("plain", &[])
        .pods([("server", 2), ("other", 2)])
        .pods(clients)
        .build()
        .expect("lab");
    let config = AgentConfig::new(&Mesh::own_ca(&lab)).flag("--tunnel-port", tunnel_port);
    Mesh::start_with(lab, &config).expect("mesh")
}

/// A connection of each family that says something all the time and hears it again.
fn open(client: &Pod, server: [IpAddr; 2]) -> [Proc; 2] {
    server.map(|ip| {
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

/// Returns the clients of the server's open connections, without those of the agent.
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
    fn to(mesh: &Mesh, server: [IpAddr; 2]) -> Self {
        let connected = |(name, ..): (&str, _, _)| {
            let client = mesh.pod(name);
            let procs = open(&client, server);
            (client, procs)
        };
        Self {
            clients: CLIENTS.into_iter().map(connected).collect(),
        }
    }

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

    /// The connections of the clients with this in their name are ended at once, the others go on.
    fn end(&mut self, who: &str, server: &Pod, what: &str) {
        let ends = |(client, _): &mut (Arc<Pod>, _)| client.name().contains(who);
        for (client, procs) in self.clients.extract_if(.., ends) {
            let client = client.name();
            // The proxy ends a captured connection, by a reset; a socket that is destroyed under its
            // application is one of a connection without a tunnel.
            let hows: &[&str] = if client.starts_with("far") {
                &["reset"]
            } else {
                &["reset", "aborted"]
            };
            for proc in &procs {
                let end = said(proc, AT_ONCE);
                let Held::Closed { how, echoed, .. } = &end else {
                    unreachable!("{what}: {client}: {end:?}");
                };
                assert!(hows.contains(&&**how), "{what}: {client}: {end:?}");
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
fn policy_change_closes_only_denied_connections() {
    for tunnel_port in ["15008", "real"] {
        let mesh = mesh(tunnel_port);
        let server = mesh.pod("server");
        let line = format!("--tcp [::]:{PORT}");
        let _listener = server.serve(&line).expect("a server");
        let mut open = Open::to(&mesh, own(&server));
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

fn own(pod: &Pod) -> [IpAddr; 2] {
    [pod.v4().into(), pod.v6().into()]
}

/// The server's service, by which it is reached in [`egress_change_closes_open_connections`].
const VIPS: [&str; 2] = ["10.96.9.9", "fd96::9:9"];

fn service(mesh: &Mesh, server: &Pod) -> [IpAddr; 2] {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server", "namespace": "default", "uid": "server"},
        "spec": {
            "clusterIP": VIPS[0],
            "clusterIPs": VIPS,
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"port": PORT}],
        },
    });
    mesh.apply("service", &service).expect("apply");
    for (family, address) in ["IPv4", "IPv6"].into_iter().zip(own(server)) {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("server-{}", family.to_lowercase()),
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": "server"},
            },
            "addressType": family,
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
            "ports": [{"port": PORT, "protocol": "TCP"}],
        });
        mesh.apply(&format!("slice-{family}"), &slice)
            .expect("apply");
    }
    VIPS.map(|ip| ip.parse().expect("an address"))
}

#[test]
fn egress_change_closes_open_connections() {
    let mesh = mesh("15008");
    let server = mesh.pod("server");
    let vips = service(&mesh, &server);
    let line = format!("--tcp [::]:{PORT}");
    let _listener = server.serve(&line).expect("a server");
    let allowed = let_in("good, bad");
    mesh.enforce(&allowed).expect("in force");
    let mut open = Open::to(&mesh, vips);
    let mut expected: Vec<[String; 3]> = Vec::new();
    let mut ends = |who: &str, rows: &[[&str; 3]]| {
        open.end(who, &server, who);
        for row in rows {
            expected.extend([row.map(str::to_owned), row.map(str::to_owned)]);
        }
        expected.sort();
        let recorded = eventually("records", SOON, || (ended(&mesh) == expected).then_some(()));
        assert_eq!(ended(&mesh), expected, "{recorded:?}");
    };

    // A client loses the label that lets it in.
    let far = mesh.pod("far-bad");
    mesh.relabel(&far, &[("who", "nobody")]).expect("relabel");
    ends(
        "far-bad",
        &[
            ["far-bad", "destination", NOT_LET_IN],
            ["far-bad", "source", NUMBER],
        ],
    );

    // What clients may send, near and in clear, is taken away.
    let both = format!(
        "{allowed}{}{}",
        isolate("default", "near-bad", "Egress"),
        isolate("plain", "clear-bad", "Egress")
    );
    mesh.enforce(&both).expect("in force");
    ends(
        "bad",
        &[
            ["near-bad", "source", "NetworkPolicy default/near-bad"],
            ["near-bad", "destination", "NetworkPolicy default/near-bad"],
            ["clear-bad", "source", "NetworkPolicy plain/clear-bad"],
        ],
    );

    // The server accepts tunnels only.
    let strict = "---\napiVersion: mesh.rs/v1alpha1\nkind: MeshAuthentication\n\
                  metadata: {name: strict, namespace: default}\nspec: {mtls: Strict}\n";
    mesh.enforce(&format!("{both}{strict}")).expect("in force");
    ends(
        "clear-good",
        &[["clear-good", "destination", "plaintext_refused"]],
    );

    // What a client may send by a tunnel.
    let far = isolate("default", "far-good", "Egress");
    mesh.enforce(&format!("{both}{strict}{far}"))
        .expect("in force");
    ends(
        "far-good",
        &[
            ["far-good", "source", "NetworkPolicy default/far-good"],
            ["far-good", "destination", NUMBER],
        ],
    );
}

#[test]
fn strict_mode_closes_plaintext_connections_of_client() {
    let mesh = mesh("15008");
    let outside = mesh.pod("clear-good");
    let line = format!("--tcp [::]:{PORT}");
    let _listener = outside.serve(&line).expect("a server");
    mesh.enforce("").expect("in force");
    // On the other's node, and on another.
    let clients = ["far-bad", "near-bad"].map(|name| mesh.pod(name));
    let procs = clients.each_ref().map(|client| open(client, own(&outside)));
    let required = "apiVersion: mesh.rs/v1alpha1\nkind: MeshAuthentication\n\
                    metadata: {name: required, namespace: default}\n\
                    spec: {outbound: Required}\n";
    mesh.enforce(required).expect("in force");
    for proc in procs.iter().flatten() {
        let end = said(proc, AT_ONCE);
        assert!(
            matches!(&end, Held::Closed { echoed, .. } if *echoed > 0),
            "{end:?}"
        );
    }
    let why = "peer_not_enrolled";
    let expected = [
        ["far-bad", "destination", why],
        ["far-bad", "source", why],
        ["near-bad", "source", why],
    ];
    let expected: Vec<_> = expected
        .map(|row| row.map(str::to_owned))
        .into_iter()
        .flat_map(|row| [row.clone(), row])
        .collect();
    let recorded = eventually("records", SOON, || (ended(&mesh) == expected).then_some(()));
    assert_eq!(ended(&mesh), expected, "{recorded:?}");
    assert!(at_the_server(&outside).is_empty());
}

/// Accepts one connection, listens no more, and sends back what comes.
const ONCE: &str = "
import socket, sys
s = socket.create_server(('::', int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print('up'); c, _ = s.accept(); s.close()
while True: c.sendall(c.recv(100))
";

/// Says something all the time, hears it again, and says when that has ended.
const TALK: &str = "
import socket, sys, time
c = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); c.settimeout(5)
n = 0
try:
    while True:
        c.sendall(b'x'); assert c.recv(1) == b'x'; n += 1
        if n == 1: print('open')
        time.sleep(0.005)
except OSError as e: print('ended', e)
";

#[test]
fn closed_listener_keeps_server_direction() {
    let mesh = mesh("15008");
    let server = mesh.pod("other");
    let python = |pod: &Pod, script: &str, args: &[String]| {
        let cmd = Cmd::new("python3").args(["-uc", script]).args(args);
        pod.spawn_lines(cmd).expect("python3")
    };
    let clients = ["near-good", "clear-good"].map(|name| mesh.pod(name));
    let talks = [(0, 7100), (1, 7101)].map(|(client, port): (usize, u16)| {
        let listener = python(&server, ONCE, &[port.to_string()]);
        assert_eq!(listener.next_line(SOON).expect("a line"), "up");
        let args = [server.v4().to_string(), port.to_string()];
        let talk = python(&clients[client], TALK, &args);
        assert_eq!(talk.next_line(SOON).expect("a line"), "open");
        (listener, talk)
    });
    // It is no client: what it may send of its own does not matter.
    let quiet = isolate("default", "other", "Egress");
    mesh.enforce(&quiet).expect("in force");
    for (_, talk) in &talks {
        let line = talk.line(AT_ONCE);
        assert!(line.is_err(), "{line:?}");
    }
    let closed = quiet.replace("[Egress]", "[Ingress]");
    mesh.enforce(&closed).expect("in force");
    for (_, talk) in &talks {
        let line = talk.next_line(AT_ONCE).expect("ended at once");
        assert!(line.starts_with("ended"), "{line}");
    }
}
