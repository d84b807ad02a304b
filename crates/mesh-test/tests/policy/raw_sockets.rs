// SPDX-License-Identifier: Apache-2.0
//! Policy for packets without a socket hook: raw and packet sockets, and SCTP by its IP header, decided
//! by the tc programs of pods that are not in the mesh.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_test::capture::Scope;
use mesh_test::capture::frame::{Packet, Transport};
use mesh_test::pod::probe_cmd;
use mesh_test::{Capture, Cmd, Lab, Mesh, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);
const MARKER: &str = "RAW-AND-UNASKED";
const PORT: u16 = 8080;
const ALL: [&str; 3] = ["tcp", "udp", "sctp"];
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// Packets of one protocol: by a raw and a packet socket, in both families.
const OF_EACH: usize = 4;

/// Errors of a pod's own stack repeat what has come: they are not to be counted with it.
const QUIET: &str = "table inet quiet { chain out { type filter hook output priority 0;
   icmp type destination-unreachable drop
   icmpv6 type { destination-unreachable, parameter-problem } drop
   }
 }";

/// `a` and `near` on one node, `b` and `silent` on the other, none of them in the mesh; what
/// `silent` refuses, it refuses in silence.
fn mesh(topology: Topology) -> Mesh {
    let lab = Lab::builder(topology)
        .namespace("default", &[])
        .namespace("drop", &[("mesh.rs/deny", "drop")])
        .pod(PodSpec::new("a", 1))
        .pod(PodSpec::new("near", 1))
        .pod(PodSpec::new("b", 2))
        .pod(PodSpec::new("silent", 2).namespace("drop"))
        .build()
        .expect("lab");
    for name in ["near", "b", "silent"] {
        let quiet = Cmd::new("nft").args(["-f", "-"]).input(QUIET);
        let quiet = lab.pod(name).run(quiet, SOON).expect("nft");
        quiet.ok().expect("rules");
    }
    Mesh::start(lab).expect("mesh")
}

/// A first packet of each protocol, of both families, by a raw socket and by a packet socket.
fn packets(topology: Topology, a: &Pod, to: &Pod, round: u16) -> Vec<String> {
    let ends = [
        (a.v4().into(), to.v4().into()),
        (a.v6().into(), to.v6().into()),
    ];
    // On a bridge a neighbour is reached past the gateway.
    let neighbours = topology == Topology::Bridged && a.node().number() == to.node().number();
    let next = if neighbours {
        to.mac()
    } else {
        a.gateway_mac()
    };
    let mut lines = Vec::new();
    for (own, peer) in ends {
        for (protocol, port) in ALL.iter().zip(10_000..) {
            // Of its own each time: what was allowed is a flow.
            let src = SocketAddr::new(own, port + 100 * round);
            let dst = SocketAddr::new(peer, PORT);
            let what = format!("--src {src} --dst {dst} --proto {protocol} --payload {MARKER}");
            lines.push(format!("raw {what}"));
            let macs = format!("--src-mac {} --dst-mac {next}", a.mac());
            lines.push(format!("frame {what} --bypass {macs}"));
        }
    }
    lines
}

fn send(from: &Pod, lines: &[String]) {
    for line in lines {
        let cmd = probe_cmd(line).expect("probe").cap_net_raw_only();
        from.run(cmd, SOON).expect("run").ok().expect(line);
    }
}

fn within(pod: &Pod) -> Capture {
    let scope = Scope::Interface("eth0".to_owned());
    Capture::start(pod, &scope).expect("capture")
}

/// Waits until what was sent is in a capture, as often as expected.
fn arrives(capture: &Capture, expected: usize) {
    let hits = || {
        let found = capture.so_far().ok()?.find(MARKER.as_bytes()).ok()?;
        Some(found.len())
    };
    let all = eventually("what was sent", SOON, || {
        (hits() == Some(expected)).then_some(())
    });
    assert_eq!(hits(), Some(expected), "{all:?}");
}

/// Nothing of what was sent is in a capture that has missed nothing.
fn nothing_arrives(capture: Capture, what: &str) {
    let seen = capture.stop().expect("stop");
    seen.complete().expect("no frame lost");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), [], "{what}");
}

/// Returns the number of packets that isolation refused.
fn refused(mesh: &Mesh, direction: &str) -> f64 {
    let labels = [
        ("direction", direction),
        ("verdict", "denied"),
        ("reason", "default_deny"),
    ];
    mesh.metric("mesh_policy_verdicts_total", &labels)
        .expect("metrics")
}

/// Waits until so many more packets were refused, and no more than that.
fn counted(mesh: &Mesh, direction: &str, before: f64, packets: usize) {
    let expected = f64::from(u32::try_from(packets).expect("a handful"));
    let more = || refused(mesh, direction) - before;
    eventually("each to be counted", SOON, || {
        (more() >= expected).then_some(())
    })
    .map_err(|late| format!("{late}: {} of {expected}", more()))
    .expect("counted");
    assert_eq!(more().to_string(), expected.to_string(), "{direction}");
}

/// Waits until a node has a record of every packet that was dropped on its way to a pod: two of
/// each protocol and family, with the rule.
fn recorded(mesh: &Mesh, node: u8, to: &Pod, protocols: &[&str], rule: &str) {
    let each = |address: &IpAddr| {
        let address = address.to_string();
        let key = move |protocol: &&str| ((address.clone(), (*protocol).to_owned()), 2);
        protocols.iter().map(key)
    };
    let expected: BTreeMap<_, u32> = to.addresses().iter().flat_map(each).collect();
    let found = || {
        let mut found: BTreeMap<_, u32> = BTreeMap::new();
        for record in mesh.agent(node).flows().expect("flows") {
            let end = &record["destination"];
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            let is_it = record["kind"] == "dropped"
                && record["source"]["pod"] == "a"
                && end["pod"] == to.name()
                && end["port"] == PORT
                && record["reason"] == "default_deny"
                && record["rule"] == rule;
            if is_it {
                let key = (text(&end["address"]), text(&record["protocol"]));
                *found.entry(key).or_default() += 1;
            }
        }
        found
    };
    let all = eventually("each to be recorded", SOON, || {
        (found() == expected).then_some(())
    });
    let what = || mesh.agent(node).flows();
    assert_eq!(found(), expected, "{all:?}: {:?}", what());
}

/// A policy of a pod in one direction; `rules` are JSON.
fn policy(pod: &Pod, direction: &str, rules: &str) -> String {
    let field = direction.to_lowercase();
    let (name, namespace) = (pod.name(), pod.namespace());
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {name}}}}}, policyTypes: [{direction}], \
         {field}: {rules}}}\n"
    )
}

const ALLOWED: &str = "[{ports: [{port: 8080, protocol: TCP}, {port: 8080, protocol: UDP}, \
                       {port: 8080, protocol: SCTP}]}]";
/// Rules, and whether they let it pass; `None` = no policy.
const ROUNDS: [(Option<&str>, bool); 3] =
    [(None, true), (Some("[]"), false), (Some(ALLOWED), true)];

#[test]
fn egress_policy_applies_to_raw_and_packet_sockets() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let mesh = mesh(topology);
        let a = mesh.pod("a");
        let receivers = ["near", "b"].map(|name| mesh.pod(name));
        for ((rules, passes), round) in ROUNDS.into_iter().zip(0..) {
            let text = rules.map(|rules| policy(&a, "Egress", rules));
            mesh.enforce(&text.unwrap_or_default()).expect("in force");
            let before = refused(&mesh, "egress");
            let captures = [&receivers[0], &receivers[1]].map(|pod| within(pod));
            let lines = [&receivers[0], &receivers[1]].map(|to| packets(topology, &a, to, round));
            lines.iter().for_each(|lines| send(&a, lines));
            if passes {
                for (capture, lines) in captures.iter().zip(&lines) {
                    arrives(capture, lines.len());
                }
                continue;
            }
            counted(&mesh, "egress", before, lines.concat().len());
            for (capture, to) in captures.into_iter().zip(&receivers) {
                nothing_arrives(capture, to.name());
                recorded(&mesh, 1, to, &ALL, "NetworkPolicy default/a");
            }
        }
    }
}

/// A SYN enters a pod that refuses at once, where sk_lookup gives it no socket: it is reset.
#[test]
fn ingress_policy_drops_or_resets_raw_packets() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let mesh = mesh(topology);
        let a = mesh.pod("a");
        let receivers = ["near", "b", "silent"].map(|name| mesh.pod(name));
        let listen = format!("--tcp [::]:{PORT}");
        let _servers = [0, 1, 2].map(|pod| receivers[pod].serve(&listen).expect("server"));
        for ((rules, passes), round) in ROUNDS.into_iter().zip(0..) {
            let all = |rules| {
                let of = receivers.iter().map(|pod| policy(pod, "Ingress", rules));
                of.collect::<Vec<_>>().join("---\n")
            };
            let text = rules.map(all).unwrap_or_default();
            mesh.enforce(&text).expect("in force");
            for to in &receivers {
                let before = refused(&mesh, "ingress");
                let lines = packets(topology, &a, to, round);
                let capture = within(to);
                send(&a, &lines);
                if passes {
                    arrives(&capture, lines.len());
                    answers(&capture, to, SYN | ACK);
                    continue;
                }
                counted(&mesh, "ingress", before, lines.len());
                let node = to.node().number();
                let rule = format!("NetworkPolicy {}/{}", to.namespace(), to.name());
                if to.name() == "silent" {
                    nothing_arrives(capture, to.name());
                    recorded(&mesh, node, to, &ALL, &rule);
                    continue;
                }
                arrives(&capture, OF_EACH);
                answers(&capture, to, RST);
                assert_eq!(flagged(&capture, to, SYN | ACK), 0, "{}", to.name());
                recorded(&mesh, node, to, &ALL[1..], &rule);
            }
        }
    }
}

/// Waits until a pod has sent segments with all of these flags in answer to each SYN.
fn answers(capture: &Capture, pod: &Pod, flags: u8) {
    let enough = || (flagged(capture, pod, flags) >= OF_EACH).then_some(());
    let all = eventually("answers", SOON, enough);
    all.map_err(|late| format!("{}: {late}", pod.name()))
        .expect("answered");
}

fn flagged(capture: &Capture, pod: &Pod, flags: u8) -> usize {
    let seen = capture.so_far().expect("the capture");
    let is_it = |packet: &Packet<'_>| {
        let Transport::Tcp { flags: set, .. } = packet.transport else {
            return false;
        };
        pod.addresses().contains(&packet.src) && set & flags == flags
    };
    seen.packets().filter(is_it).count()
}
