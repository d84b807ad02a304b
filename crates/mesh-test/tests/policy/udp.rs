// SPDX-License-Identifier: Apache-2.0
//! UDP under policy: replies pass, other datagrams do not; flows expire when idle and end with the
//! policy, label, pod or mode that allowed them.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::manifests::isolate;
use mesh_test::mesh::ENROLLED;
use mesh_test::pod::probe_cmd;
use mesh_test::reports::Udp;
use mesh_test::{Cmd, Lab, Mesh, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);

/// `client` and `stranger` on node 1, `server` on node 2.
fn mesh() -> Mesh {
    let pods = [
        PodSpec::new("client", 1).label("app", "client"),
        PodSpec::new("stranger", 1).label("app", "stranger"),
        PodSpec::new("server", 2).label("app", "server"),
    ];
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods(pods)
        .build()
        .expect("lab");
    Mesh::start(lab).expect("mesh")
}

fn udp(pod: &Pod, line: &str) -> Udp {
    pod.probe(line).expect("run").json().expect("report")
}

/// Waits until a datagram from `from` to `to` has become impossible, or possible.
fn until(from: &Pod, to: SocketAddr, possible: bool) {
    eventually("the policy to be in force", SOON, || {
        let report = udp(from, &format!("udp --to {to} --timeout-ms 300"));
        ((report.received == 1) == possible).then_some(())
    })
    .expect("in force");
}

#[test]
fn ingress_isolated_client_receives_only_replies() {
    let mesh = mesh();
    let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
    let _server = server.serve("--udp [::]:7000").expect("server");
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    until(&stranger, client.at(7001)[0], true);
    mesh.apply_text("isolate", &isolate("default", "client", "Ingress"))
        .expect("apply");
    until(&stranger, client.at(7001)[0], false);
    for to in server.at(7000) {
        for connected in ["", "--connected"] {
            let report = udp(&client, &format!("udp --to {to} {connected} --count 3"));
            assert_eq!(
                (report.sent, report.received),
                (3, 3),
                "{to} {connected}: {report:?}"
            );
        }
    }
    for (from, to) in [(&stranger, 0), (&server, 0), (&stranger, 1), (&server, 1)] {
        let to = client.at(7001)[to];
        let report = udp(from, &format!("udp --to {to} --timeout-ms 300"));
        assert_eq!(report.received, 0, "{} gets in", from.name());
    }
}

#[test]
fn egress_isolated_server_sends_only_replies() {
    let mesh = mesh();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _server = server.serve("--udp [::]:7000").expect("server");
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    until(&server, client.at(7001)[0], true);
    mesh.apply_text("isolate", &isolate("default", "server", "Egress"))
        .expect("apply");
    until(&server, client.at(7001)[0], false);
    for to in server.at(7000) {
        let report = udp(&client, &format!("udp --to {to} --count 3"));
        assert_eq!((report.sent, report.received), (3, 3), "{to}: {report:?}");
    }
    for to in client.at(7001) {
        let report = udp(&server, &format!("udp --to {to} --timeout-ms 300"));
        assert_eq!(report.sent, 0, "{to}: refused at once: {report:?}");
    }
}

/// Sends an ICMP error "port unreachable" which quotes a datagram that was never sent: from its
/// receiver's port 7100 to port 7001 of the sender of the error.
const FORGED_ERROR: &str = "
import ipaddress, socket, struct, sys
victim, own = (ipaddress.ip_address(text) for text in sys.argv[1:3])
udp = struct.pack('!HHHH', 7100, 7001, 8, 0)
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
if own.version == 4:
    ip = lambda check: struct.pack('!BBHHHBBH4s4s', 0x45, 0, 28, 1, 0, 64, 17, check, victim.packed, own.packed)
    quoted = ip(checksum(ip(0))) + udp
    error = lambda check: struct.pack('!BBHI', 3, 3, check, 0) + quoted
    error, family, protocol = error(checksum(error(0))), socket.AF_INET, socket.IPPROTO_ICMP
else:
    quoted = struct.pack('!IHBB16s16s', 6 << 28, 8, 17, 64, victim.packed, own.packed) + udp
    # The kernel fills in the checksum.
    error = struct.pack('!BBHI', 1, 4, 0, 0) + quoted
    family, protocol = socket.AF_INET6, socket.IPPROTO_ICMPV6
socket.socket(family, socket.SOCK_RAW, protocol).sendto(error, (str(victim), 0))
";

#[test]
fn forged_icmp_error_opens_no_flow() {
    let mesh = mesh();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    until(&server, client.at(7001)[0], true);
    mesh.apply_text("isolate", &isolate("default", "server", "Egress"))
        .expect("apply");
    until(&server, client.at(7001)[0], false);
    for (index, victim) in server.at(7100).into_iter().enumerate() {
        let (to, asks) = (client.at(7001)[index], client.at(7101)[index]);
        let args = [victim.ip().to_string(), to.ip().to_string()];
        let forge = Cmd::new("python3").args(["-c", FORGED_ERROR]).args(args);
        client.run(forge, SOON).expect("run").ok().expect("sent");
        let answer = |to| {
            udp(
                &server,
                &format!("udp --to {to} --from {victim} --no-answer"),
            )
        };
        let forged = answer(to);
        assert_eq!(forged.sent, 0, "{to}: {forged:?}");
        // The control: a datagram that was really sent opens a flow for its answers.
        let line = format!("udp --to {victim} --from {asks} --no-answer");
        assert_eq!(udp(&client, &line).sent, 1, "{victim}");
        let real = eventually("the answer", SOON, || {
            (answer(asks).sent == 1).then_some(())
        });
        real.expect("sent");
    }
}

#[test]
fn only_idle_flows_expire() {
    let mesh = mesh();
    let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
    let _server = server.serve("--udp [::]:7000 --report").expect("server");
    let _listener = client.serve("--udp [::]:7001").expect("listener");
    mesh.apply_text("isolate", &isolate("default", "client", "Ingress"))
        .expect("apply");
    until(&stranger, client.at(7001)[0], false);
    let to = server.at(7000)[0];
    // One flow with a datagram a second for longer than 30 s; another that was only ever sent to,
    // and is tried from the other end after it must have expired.
    let silent = server.at(7999)[0];
    let once = format!("udp --to {silent} --from {}:7777 --no-answer", client.v4());
    let report = udp(&client, &once);
    assert_eq!(report.sent, 1, "{report:?}");
    let _late = client.serve("--udp [::]:7777").expect("listener");
    let back = format!(
        "udp --to {}:7777 --from {silent} --timeout-ms 500",
        client.v4()
    );
    let report = udp(&server, &back.replace(":7999", ":7998"));
    assert_eq!(
        report.received, 0,
        "another port is no part of the flow: {report:?}"
    );
    let busy = format!("udp --to {to} --connected --count 36 --interval-ms 1000");
    let report: Udp = client
        .run(probe_cmd(&busy).expect("probe"), Duration::from_secs(60))
        .expect("run")
        .json()
        .expect("report");
    assert_eq!((report.sent, report.received), (36, 36), "{report:?}");
    let report = udp(&server, &back);
    assert_eq!(report.received, 0, "the entry has expired: {report:?}");
}

#[test]
fn denying_policy_ends_flow() {
    let mesh = mesh();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let _server = server.serve("--udp [::]:7000").expect("server");
    let to = server.at(7000)[0];
    until(&client, to, true);
    let busy = client
        .start_probe(&format!(
            "udp --to {to} --connected --count 100 --interval-ms 50 --timeout-ms 200"
        ))
        .expect("client");
    until(&client, to, true);
    mesh.apply_text("isolate", &isolate("default", "server", "Ingress"))
        .expect("apply");
    let line = busy
        .line(Duration::from_secs(60))
        .expect("line")
        .expect("report");
    let report: Udp = serde_json::from_str(&line).expect("report");
    assert!(report.received > 0, "it ran: {report:?}");
    assert!(report.received < 100, "it was ended: {report:?}");
    let report = udp(&client, &format!("udp --to {to} --timeout-ms 300"));
    assert_eq!(report.received, 0, "{report:?}");
}

/// The server lets in who has the label `app: client`, and sends nothing of its own.
const ONLY_CLIENT: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: default}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

/// A flow from the client's port 7777 to the server's port 7000, and what can still be sent on it.
struct Lasting<'a> {
    client: &'a Pod,
    server: &'a Pod,
    family: usize,
}

impl Lasting<'_> {
    fn ends(&self) -> (SocketAddr, SocketAddr) {
        (
            self.client.at(7777)[self.family],
            self.server.at(7000)[self.family],
        )
    }

    /// Whether a question reaches the server, which has no other reason to hear this.
    fn asks(&self) -> bool {
        let (client, server) = self.ends();
        let _server = self.server.serve("--udp [::]:7000").expect("server");
        let line = format!("udp --to {server} --from {client} --timeout-ms 300");
        udp(self.client, &line).received == 1
    }

    /// Whether the server can answer, from one of its ports, a question that was asked before.
    fn answers_from(&self, port: u16) -> bool {
        let (client, _) = self.ends();
        let server = self.server.at(port)[self.family];
        let _client = self.client.serve("--udp [::]:7777").expect("client");
        let line = format!("udp --to {client} --from {server} --timeout-ms 300");
        udp(self.server, &line).sent == 1
    }
}

#[test]
fn label_change_reevaluates_flow_in_its_direction() {
    let mesh = mesh();
    let (client, server, stranger) = (mesh.pod("client"), mesh.pod("server"), mesh.pod("stranger"));
    mesh.enforce(ONLY_CLIENT).expect("in force");
    let flows = [0, 1].map(|family| Lasting {
        client: &client,
        server: &server,
        family,
    });
    for flow in &flows {
        assert!(!flow.answers_from(7000), "nobody has asked");
        assert!(flow.asks());
        assert!(flow.answers_from(7000));
        assert!(!flow.answers_from(7001), "no part of the flow");
    }
    // What does not concern it: a label of somebody else, more than is used.
    mesh.relabel(&stranger, &[("app", "somebody")])
        .expect("relabel");
    let more = ONLY_CLIENT.replace(
        "app: client}}",
        "app: client}}}, {podSelector: {matchLabels: {app: x}}",
    );
    assert_ne!(more, ONLY_CLIENT);
    mesh.enforce(&more).expect("in force");
    for flow in &flows {
        assert!(flow.answers_from(7000), "an answer is none of egress");
        assert!(!flow.answers_from(7001));
        assert!(flow.asks());
    }
    mesh.relabel(&client, &[("app", "other")]).expect("relabel");
    mesh.enforce(&more).expect("in force");
    for flow in &flows {
        assert!(!flow.asks(), "the label that let it in is gone");
        assert!(!flow.answers_from(7000), "and with it the flow");
    }
}

#[test]
fn flow_ends_with_the_pod_that_owned_its_address() {
    let mut mesh = mesh();
    mesh.enforce(ONLY_CLIENT).expect("in force");
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    for family in [0, 1] {
        let (client, server) = (&*client, &*server);
        let flow = Lasting {
            client,
            server,
            family,
        };
        assert!(flow.asks());
    }
    let number = client.host_number();
    mesh.delete_pod("client").expect("delete");
    drop(client);
    let heir = PodSpec::new("heir", 1)
        .host_number(number)
        .label("app", "heir");
    let heir = mesh.add_pod(heir).expect("add");
    mesh.settled().expect("adopted");
    mesh.enforce(ONLY_CLIENT).expect("in force");
    for family in [0, 1] {
        let flow = Lasting {
            client: &heir,
            server: &server,
            family,
        };
        assert!(!flow.asks(), "the same address and port, another pod");
        assert!(!flow.answers_from(7000));
    }
    mesh.relabel(&heir, &[("app", "client")]).expect("relabel");
    mesh.enforce(ONLY_CLIENT).expect("in force");
    let flow = Lasting {
        client: &heir,
        server: &server,
        family: 0,
    };
    assert!(flow.asks(), "by its own right");
}

#[test]
fn strict_mode_ends_udp_flows() {
    let mesh = mesh();
    let (client, server) = (mesh.pod("client"), mesh.pod("server"));
    let flows = [0, 1].map(|family| Lasting {
        client: &client,
        server: &server,
        family,
    });
    mesh.enforce("").expect("in force");
    for flow in &flows {
        assert!(flow.asks());
    }
    mesh.enforce(
        "apiVersion: mesh.rs/v1alpha1
kind: MeshAuthentication
metadata: {name: udp, namespace: default}
spec: {udp: Deny}
",
    )
    .expect("in force");
    for flow in &flows {
        assert!(!flow.asks());
        assert!(!flow.answers_from(7000));
    }
}
