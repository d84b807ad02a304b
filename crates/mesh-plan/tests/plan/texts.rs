// SPDX-License-Identifier: Apache-2.0
//! A plan as text: what golden tests and `meshctl dump` show.

use mesh_plan::Plan;
use mesh_plan::cluster::{Authentication, Mtls, Service, ServicePort, Transport};
use mesh_plan::text::render;

use crate::support::*;

const EXPECTED: &str = include_str!("texts.txt");

#[test]
fn plan_text_shows_every_map_with_object_names() {
    let web = Service {
        cluster_ips: [ip("10.96.0.1")].into(),
        ports: vec![ServicePort {
            name: String::new(),
            transport: Transport::Udp,
            port: 53,
            node_port: None,
        }],
        ..Service::default()
    };
    let strict = Authentication {
        mtls: Some(Mtls::Strict),
        ports: [(80, Mtls::Permissive)].into(),
        ..Authentication::default()
    };
    let plan = World::new()
        .namespace("shop", "team=a,mesh.rs/dataplane=enabled")
        .pod("shop/web", "10.1.1.1,fd01::1", "app=web,hash=1")
        .pod("shop/db", "10.1.2.2", "app=db")
        .authentication("shop/all", strict)
        .service("shop/dns", web)
        .policy(
            "MeshPolicy shop/p",
            policy("shop", "app=web").ingress([
                allow("pods(app=db) 8.0.0.0/8 : tcp/80-90 udp"),
                deny("* : tcp/85"),
            ]),
        )
        .policy(
            "ClusterNetworkPolicy c",
            wide(mesh_plan::cluster::Tier::Admin(1), "", "").egress([pass("@world : tcp/1")]),
        )
        .policy(
            "NetworkPolicy shop/q",
            policy("shop", "").egress([]).audit(),
        )
        .on("n1")
        .clean()
        .plan;
    assert_eq!(render(&plan), EXPECTED, "{}", render(&plan));
    assert_eq!(render(&Plan::default()), "");
}
