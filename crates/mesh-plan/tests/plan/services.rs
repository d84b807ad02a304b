// SPDX-License-Identifier: Apache-2.0
//! Tests of services, by the routes that `route` returns.

use std::collections::BTreeSet;

use mesh_common::service::{Route, route};
use mesh_common::{Endpoint, Protocol};
use mesh_plan::cluster::{Service, ServiceEndpoint, ServicePort, Transport};

use crate::support::*;

fn endpoint(address: &str, port: u16, node: &str) -> ServiceEndpoint {
    ServiceEndpoint {
        port_name: "http".into(),
        transport: Transport::Tcp,
        address: ip(address),
        port,
        node: Some(node.into()),
        ready: true,
        serving: true,
        terminating: false,
    }
}

fn service(endpoints: impl IntoIterator<Item = ServiceEndpoint>) -> Service {
    Service {
        cluster_ips: [ip("10.96.0.1"), ip("fd96::1")].into(),
        ports: vec![ServicePort {
            name: "http".into(),
            transport: Transport::Tcp,
            port: 80,
            node_port: None,
        }],
        endpoints: endpoints.into_iter().collect(),
        ..Service::default()
    }
}

fn at(text: &str) -> Endpoint {
    text.parse::<std::net::SocketAddr>().expect(text).into()
}

/// Everything that a destination may go to, in order, or the other outcome.
fn routes(plan: &Compiled, to: &str, protocol: Protocol) -> String {
    let mut found = BTreeSet::new();
    for random in 0..60 {
        found.insert(match route(&plan.plan, at(to), protocol, random) {
            Route::Backend(backend) => backend.to_string(),
            Route::Unchanged => "unchanged".into(),
            Route::NoEndpoints => "no endpoints".into(),
            Route::NoPort => "no port".into(),
        });
    }
    found.into_iter().collect::<Vec<_>>().join(" ")
}

fn tcp(plan: &Compiled, to: &str) -> String {
    routes(plan, to, Protocol::TCP)
}

#[test]
fn cluster_ips_route_within_their_family() {
    let service = service([
        endpoint("10.1.1.1", 8080, "n1"),
        endpoint("10.1.2.1", 8081, "n2"),
        endpoint("fd01::1", 8080, "n1"),
    ]);
    let plan = World::new().service("shop/web", service).on("n1").clean();
    assert_eq!(tcp(&plan, "10.96.0.1:80"), "10.1.1.1:8080 10.1.2.1:8081");
    assert_eq!(
        tcp(&plan, "[::ffff:10.96.0.1]:80"),
        "10.1.1.1:8080 10.1.2.1:8081"
    );
    assert_eq!(tcp(&plan, "[fd96::1]:80"), "[fd01::1]:8080");
    assert_eq!(tcp(&plan, "10.96.0.1:81"), "no port");
    assert_eq!(routes(&plan, "10.96.0.1:80", Protocol::UDP), "no port");
    assert_eq!(tcp(&plan, "10.96.0.2:80"), "unchanged");
}

#[test]
fn endpoint_conditions_select_backends() {
    let with = |ready, serving, terminating| ServiceEndpoint {
        ready,
        serving,
        terminating,
        ..endpoint("10.1.1.9", 9, "n1")
    };
    let alone = |e: ServiceEndpoint, publish| {
        let service = Service {
            publish_not_ready: publish,
            ..service([e])
        };
        tcp(
            &World::new().service("shop/web", service).on("n1").clean(),
            "10.96.0.1:80",
        )
    };
    assert_eq!(alone(with(true, true, false), false), "10.1.1.9:9");
    assert_eq!(alone(with(false, false, false), false), "no endpoints");
    assert_eq!(alone(with(false, true, true), false), "10.1.1.9:9");
    assert_eq!(alone(with(false, false, true), false), "no endpoints");
    assert_eq!(alone(with(false, true, false), false), "no endpoints");
    assert_eq!(alone(with(false, false, false), true), "10.1.1.9:9");
    let both = service([with(false, true, true), endpoint("10.1.1.1", 8080, "n1")]);
    let plan = World::new().service("shop/web", both).on("n1").clean();
    assert_eq!(tcp(&plan, "10.96.0.1:80"), "10.1.1.1:8080");
}

#[test]
fn service_ports_are_separate_per_transport() {
    let mut s = service([endpoint("10.1.1.1", 8080, "n1")]);
    s.ports.push(ServicePort {
        name: "dns".into(),
        transport: Transport::Udp,
        port: 80,
        node_port: None,
    });
    s.endpoints.push(ServiceEndpoint {
        port_name: "dns".into(),
        transport: Transport::Udp,
        ..endpoint("10.1.1.1", 5353, "n1")
    });
    let plan = World::new().service("shop/web", s).on("n1").clean();
    assert_eq!(tcp(&plan, "10.96.0.1:80"), "10.1.1.1:8080");
    assert_eq!(
        routes(&plan, "10.96.0.1:80", Protocol::UDP),
        "10.1.1.1:5353"
    );
}

#[test]
fn internal_traffic_policy_local_uses_endpoints_of_the_node() {
    let local = || Service {
        internal_local: true,
        ..service([endpoint("10.1.1.1", 1, "n1"), endpoint("10.1.2.1", 2, "n2")])
    };
    let world = World::new().service("shop/web", local());
    assert_eq!(tcp(&world.on("n1").clean(), "10.96.0.1:80"), "10.1.1.1:1");
    assert_eq!(tcp(&world.on("n2").clean(), "10.96.0.1:80"), "10.1.2.1:2");
    assert_eq!(tcp(&world.on("n3").clean(), "10.96.0.1:80"), "no endpoints");
}

#[test]
fn node_ports_and_external_ips_are_routed() {
    let mut s = service([endpoint("10.1.1.1", 1, "n1"), endpoint("10.1.2.1", 2, "n2")]);
    s.ports[0].node_port = Some(30080);
    s.external_ips = [ip("192.0.2.7")].into();
    let plan = World::new().service("shop/web", s.clone()).on("n1").clean();
    for to in ["10.0.0.1:30080", "10.0.0.2:30080", "192.0.2.7:80"] {
        assert_eq!(tcp(&plan, to), "10.1.1.1:1 10.1.2.1:2", "{to}");
    }
    assert_eq!(tcp(&plan, "[fd00::1]:30080"), "no endpoints");
    assert_eq!(tcp(&plan, "10.0.0.1:80"), "unchanged");
    assert_eq!(tcp(&plan, "10.0.0.2:22"), "unchanged");
    // Other ports of an external address are not the service's.
    assert_eq!(tcp(&plan, "192.0.2.7:22"), "unchanged");
    s.external_local = true;
    let plan = World::new().service("shop/web", s).on("n1").clean();
    assert_eq!(tcp(&plan, "10.0.0.2:30080"), "10.1.2.1:2");
    assert_eq!(tcp(&plan, "10.0.0.1:30080"), "10.1.1.1:1 10.1.2.1:2");
    assert_eq!(tcp(&plan, "192.0.2.7:80"), "10.1.1.1:1 10.1.2.1:2");
}

#[test]
fn service_cannot_take_an_address_already_in_use() {
    let mut thief = service([endpoint("10.1.2.66", 66, "n2")]);
    thief.cluster_ips = [ip("10.96.0.66")].into();
    thief.external_ips = [ip("10.96.0.1"), ip("10.1.1.1")].into();
    let plan = World::new()
        .pod("shop/pod", "10.1.1.1", "")
        .service("shop/web", service([endpoint("10.1.1.1", 1, "n1")]))
        .service("a/thief", thief)
        .on("n1");
    assert_eq!(tcp(&plan, "10.96.0.1:80"), "10.1.1.1:1");
    assert_eq!(tcp(&plan, "10.1.1.1:80"), "unchanged");
    plan.rejected(
        "Service a/thief",
        "10.96.0.1 port 80 is already used by Service shop/web",
    );
    plan.rejected("Service a/thief", "10.1.1.1 is the address of Pod shop/pod");
    let two = World::new()
        .service("shop/b", service([]))
        .service("shop/a", service([endpoint("10.1.1.1", 1, "n1")]))
        .on("n1");
    assert_eq!(tcp(&two, "10.96.0.1:80"), "10.1.1.1:1");
    two.rejected("Service shop/b", "connections to it go to Service shop/a");
}

#[test]
fn headless_service_only_names_its_endpoints() {
    let s = Service {
        cluster_ips: [].into(),
        headless: true,
        ..service([endpoint("10.1.1.1", 8080, "n1")])
    };
    let plan = World::new().service("shop/web", s).on("n1").clean();
    assert!(plan.plan.services.is_empty());
    let key = mesh_common::service::ServiceKey::new(at("10.1.1.1:8080"), Protocol::TCP);
    assert_eq!(plan.plan.names.services[&key].to_string(), "shop/web");
    assert_eq!(tcp(&plan, "10.1.1.1:8080"), "unchanged");
}

#[test]
fn external_ip_cannot_be_a_special_address_or_one_of_a_node_or_the_api_server() {
    let mut s = service([endpoint("10.1.1.1", 1, "n1")]);
    let refused = [
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "::1",
        "fe80::1",
        "ff02::1",
        "10.0.0.9",
        "10.0.0.1",
        "10.0.0.2",
    ];
    s.external_ips = refused
        .iter()
        .chain(&["192.0.2.7"])
        .map(|it| ip(it))
        .collect();
    let mut world = World::new().service("shop/web", s);
    // One of the API servers runs on a node.
    world.0.api_servers.extend([ip("10.0.0.9"), ip("10.0.0.2")]);
    let plan = world.on("n1");
    for address in refused.iter().filter(|it| !it.contains(':')) {
        assert_eq!(
            tcp(&plan, &format!("{address}:80")),
            "unchanged",
            "{address}"
        );
    }
    assert_eq!(tcp(&plan, "192.0.2.7:80"), "10.1.1.1:1");
    plan.rejected(
        "Service shop/web",
        "and 10 more of its addresses and ports are in use or not allowed",
    );
}
