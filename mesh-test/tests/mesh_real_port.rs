// SPDX-License-Identifier: Apache-2.0
//! Tunnels on the application's own port: what packet filters between two nodes see, and what
//! happens where a network takes the mark of tunnels away.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::apps::{Content, Nginx};
use mesh_test::mesh::{ENROLLED, TUNNEL_PORT};
use mesh_test::{AgentConfig, Cmd, Lab, Mesh, Output, Pod, PodSpec, Topology};

const MARKER: &str = "the-marker-that-must-not-be-seen";
const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;

fn lab(topology: Topology) -> Lab {
    Lab::builder(topology)
        .namespace("default", &[ENROLLED])
        .pod(PodSpec::new("a", 1))
        .pod(PodSpec::new("b", 2))
        .build()
        .expect("lab")
}

fn mesh(topology: Topology, port: &str) -> Mesh {
    let lab = lab(topology);
    let config = AgentConfig::new(&Mesh::own_ca(&lab)).flag("--tunnel-port", port);
    Mesh::start_with(lab, &config).expect("mesh")
}

fn nginx(pod: &Pod) -> Nginx {
    let page = format!("{MARKER}\n");
    Nginx::start(
        pod,
        PORT,
        Content::Files(&[("index.html", page.as_bytes())]),
    )
    .expect("nginx")
}

fn get(from: &Pod, to: SocketAddr) -> Output {
    let curl = Cmd::new("curl").args(["-sSg", "--max-time", "9", &format!("http://{to}/")]);
    from.run(curl, SOON).expect("run")
}

/// Rules of the CNI, or of something between the nodes.
fn filter(mesh: &Mesh, node: u8, rules: &str) {
    mesh.node(node)
        .run(Cmd::new("nft").args(["-f", "-"]).input(rules), SOON)
        .expect("nft")
        .ok()
        .expect("rules");
}

#[test]
fn the_wire_shows_the_applications_port_and_no_byte_of_it() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let mesh = mesh(topology, "real");
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let server = nginx(&b);
        let capture = mesh.capture_wire().expect("capture");
        for to in b.addresses().iter().map(|ip| SocketAddr::new(*ip, PORT)) {
            for _ in 0..3 {
                assert!(get(&a, to).text().contains(MARKER), "{topology:?} {to}");
            }
        }
        let seen = capture.stop().expect("stop");
        seen.complete().expect("no frame lost");
        assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
        assert_eq!(seen.tcp_service_ports(), [PORT], "{topology:?}");
        let own = |client: SocketAddr| a.addresses().contains(&client.ip());
        assert!(
            server
                .requests()
                .expect("log")
                .iter()
                .all(|r| own(r.client))
        );
        let lost = mesh.metric("mesh_tunnel_marks_lost_total", &[]);
        assert_eq!(lost.expect("metrics").to_string(), "0");
    }
}

/// Only the policy's port between the two pods, as a CNI that filters packets would have it.
fn only_the_port(a: &Pod, b: &Pod) -> String {
    let (a, b) = (a.v4(), b.v4());
    format!(
        "table inet cni {{ chain forward {{ type filter hook forward priority 0;
           ip saddr {a} ip daddr {b} tcp dport {PORT} accept
           ip saddr {b} ip daddr {a} tcp sport {PORT} accept
           ip saddr {a} drop
           ip daddr {a} drop
         }}
         }}"
    )
}

#[test]
fn a_packet_filter_that_allows_the_applications_port_lets_the_mesh_pass() {
    for (port, passes) in [("real", true), ("15008", false)] {
        let mesh = mesh(Topology::Routed, port);
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let _server = nginx(&b);
        filter(&mesh, 2, &only_the_port(&a, &b));
        let output = get(&a, SocketAddr::new(b.v4().into(), PORT));
        assert_eq!(output.text().contains(MARKER), passes, "{port}");
    }
}

#[test]
fn where_the_mark_is_taken_away_the_tunnel_port_is_used_and_that_is_counted() {
    let mesh = mesh(Topology::Routed, "real");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let _server = nginx(&b);
    filter(
        &mesh,
        2,
        "table inet middlebox { chain pre { type filter hook prerouting priority -300;
           tcp flags syn reset tcp option 254
         }
         }",
    );
    let capture = mesh.capture_wire().expect("capture");
    let to = SocketAddr::new(b.v4().into(), PORT);
    for _ in 0..3 {
        assert!(get(&a, to).text().contains(MARKER));
    }
    let seen = capture.stop().expect("stop");
    assert_eq!(seen.find(MARKER.as_bytes()).expect("search"), []);
    assert!(seen.tcp_service_ports().contains(&TUNNEL_PORT));
    let lost = mesh.metric("mesh_tunnel_marks_lost_total", &[]);
    assert!(lost.expect("metrics") >= 1.0);
}

#[test]
fn agents_of_both_kinds_reach_each_other() {
    let lab = lab(Topology::Routed);
    let config = AgentConfig::new(&Mesh::own_ca(&lab));
    let mut mesh = Mesh::start_with(lab, &config).expect("mesh");
    let (a, b) = (mesh.pod("a"), mesh.pod("b"));
    let (first, second) = (nginx(&a), nginx(&b));
    let old = mesh.agents.remove(0);
    drop(old);
    let real = config.flag("--tunnel-port", "real");
    let agent = mesh.node(1).start_agent(real).expect("agent");
    mesh.agents.insert(0, agent);
    mesh.settled().expect("settled");
    for (from, to) in [(&a, &b), (&b, &a)] {
        let to = SocketAddr::new(to.v4().into(), PORT);
        assert!(get(from, to).text().contains(MARKER), "{to}");
    }
    drop((first, second));
}
