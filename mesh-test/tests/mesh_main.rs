// SPDX-License-Identifier: Apache-2.0
//! The main job: a connection from pod to pod across nodes, as both applications and the wire see
//! it.

use std::net::{IpAddr, SocketAddr};

use mesh_test::apps::{Content, Nginx};
use mesh_test::mesh::{ENROLLED, TUNNEL_PORT};
use mesh_test::{Lab, Mesh, PodSpec, Topology};

const MARKER: &str = "the-marker-that-must-not-be-seen";

fn lab(topology: Topology) -> Lab {
    [PodSpec::new("a", 1), PodSpec::new("b", 2)]
        .into_iter()
        .fold(
            Lab::builder(topology)
                .outside()
                .namespace("default", &[ENROLLED]),
            |lab, pod| lab.pod(pod),
        )
        .build()
        .expect("lab")
}

fn url(to: IpAddr, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(to, port))
}

#[test]
fn curl_across_nodes_is_tunnelled_and_transparent() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let mesh = Mesh::start(lab(topology)).expect("mesh");
        let (a, b) = (mesh.pod("a"), mesh.pod("b"));
        let page = format!("{MARKER}\n");
        let nginx = Nginx::start(&b, 80, Content::Files(&[("index.html", page.as_bytes())]))
            .expect("nginx");
        let capture = mesh.capture_wire().expect("capture");
        for (to, own) in [
            (IpAddr::from(b.v4()), IpAddr::from(a.v4())),
            (b.v6().into(), a.v6().into()),
        ] {
            let output = a.curl(&url(to, 80)).expect("run").ok().expect("curl");
            assert_eq!(output.text(), page);
            let seen = nginx.requests().expect("log").pop().expect("a request");
            assert_eq!(seen.client.ip(), own, "{topology:?}");
        }
        let seen = capture.stop().expect("stop");
        seen.complete().expect("no frame lost");
        assert_eq!(
            seen.find(MARKER.as_bytes()).expect("search"),
            [],
            "{topology:?}"
        );
        assert_eq!(seen.tcp_service_ports(), [TUNNEL_PORT], "{topology:?}");
    }
}
