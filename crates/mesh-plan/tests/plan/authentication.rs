// SPDX-License-Identifier: Apache-2.0
//! Tests of enrollment and modes.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_common::identity::Peer;
use mesh_common::path::{Peers, strict};
use mesh_common::pod::PodState;
use mesh_common::{Addr, Port};
use mesh_plan::cluster::{Authentication, Mtls, OutboundMode, UdpMode};
use mesh_plan::plan::Deny;

use crate::support::*;

const ENROLL: &str = "mesh.rs/dataplane";

fn flags(world: &World) -> u32 {
    let plan = world.on("n1");
    plan.plan.pods["uid-shop/web"].view.flags
}

fn peer_flags(world: &World, address: &str) -> u32 {
    let plan = world.on("n2");
    plan.plan.peer(&Addr::from(ip(address))).unwrap().flags
}

#[test]
fn labels_enroll_pods() {
    let enrolled = |namespace: &str, of_namespace: &str, of_pod: &str| {
        let label = |value: &str| match value {
            "" => String::new(),
            value => format!("{ENROLL}={value}"),
        };
        let name = format!("{namespace}/web");
        let world = World::new().namespace(namespace, &label(of_namespace)).pod(
            &name,
            "10.1.1.1",
            &label(of_pod),
        );
        let local = world.on("n1").plan.pods[&format!("uid-{name}")].view.flags;
        let peer = peer_flags(&world, "10.1.1.1");
        assert_eq!(
            local == PodState::ENROLLED,
            peer == Peer::POD | Peer::ENROLLED | Peer::READY
        );
        assert!(local == PodState::ENROLLED || (local == 0 && peer == Peer::POD));
        local == PodState::ENROLLED
    };
    for (namespace, of_namespace, of_pod, expected) in [
        ("shop", "", "", false),
        ("shop", "enabled", "", true),
        ("shop", "disabled", "", false),
        ("shop", "required", "", true),
        ("shop", "", "enabled", true),
        ("shop", "disabled", "enabled", true),
        ("shop", "enabled", "disabled", false),
        ("shop", "required", "disabled", true),
        ("shop", "Enabled", "", false),
        ("shop", "enabled", "nonsense", true),
        ("mesh-system", "required", "enabled", false),
        ("kube-system", "enabled", "", false),
        ("kube-system", "required", "", false),
        ("kube-system", "", "enabled", true),
    ] {
        assert_eq!(
            enrolled(namespace, of_namespace, of_pod),
            expected,
            "{namespace} {of_namespace} {of_pod}"
        );
    }
    let world = World::new().namespace("shop", &format!("{ENROLL}=on"));
    world.on("n1").rejected(
        "Namespace shop",
        "invalid value \"on\": must be one of enabled, disabled, required",
    );
}

#[test]
fn readiness_follows_the_nodes_reports() {
    let mut world = World::new()
        .namespace("shop", &format!("{ENROLL}=enabled"))
        .namespace("solo", "")
        .pod("shop/web", "10.1.1.1", "")
        .pod("solo/web", "10.1.1.2", &format!("{ENROLL}=enabled"));
    let ready = |world: &World, address| peer_flags(world, address) & Peer::READY != 0;
    let reported = |uids: &[&str]| {
        Some(
            uids.iter()
                .map(|u| Arc::from(*u))
                .collect::<BTreeSet<Arc<str>>>(),
        )
    };
    for (uids, shop, solo) in [
        (reported(&[]), false, false),
        (reported(&["ns-shop", "ns-solo"]), true, false),
        (reported(&["uid-solo/web"]), false, true),
        (reported(&["uid-shop/web"]), true, false),
        (None, true, true),
    ] {
        world.0.ready = uids.map(Into::into);
        assert_eq!(
            (ready(&world, "10.1.1.1"), ready(&world, "10.1.1.2")),
            (shop, solo)
        );
    }
}

fn enrolled() -> World {
    World::new()
        .namespace("shop", &format!("{ENROLL}=enabled"))
        .pod("shop/web", "10.1.1.1", "app=web")
}

fn mtls(mode: Mtls) -> Authentication {
    Authentication {
        mtls: Some(mode),
        ..Authentication::default()
    }
}

fn of_pods(pods: &str, a: Authentication) -> Authentication {
    Authentication {
        pods: Some(selector(pods)),
        ..a
    }
}

#[test]
fn most_specific_authentication_wins_per_field() {
    assert_eq!(flags(&enrolled()), PodState::ENROLLED);
    let mesh = Authentication {
        mtls: Some(Mtls::Strict),
        outbound: Some(OutboundMode::Required),
        udp: Some(UdpMode::SameNode),
        ..Authentication::default()
    };
    let world = enrolled().authentication("mesh-system/default", mesh);
    let all = PodState::ENROLLED | PodState::STRICT | PodState::REQUIRED | PodState::UDP_SAME_NODE;
    assert_eq!(flags(&world), all);
    let world = world.authentication("shop/ns", mtls(Mtls::Permissive));
    assert_eq!(flags(&world), all & !PodState::STRICT);
    let world = world.authentication("shop/web", of_pods("app=web", mtls(Mtls::Strict)));
    assert_eq!(flags(&world), all);
    let world = world.authentication("shop/db", of_pods("app=db", mtls(Mtls::Permissive)));
    assert_eq!(flags(&world), all);
    let elsewhere = enrolled()
        .authentication("other/ns", mtls(Mtls::Strict))
        .authentication("mesh-system/other", mtls(Mtls::Strict))
        .authentication("mesh-system/default", of_pods("", mtls(Mtls::Strict)));
    assert_eq!(flags(&elsewhere), PodState::ENROLLED);
}

#[test]
fn conflicting_authentications_use_the_stricter_and_are_both_rejected() {
    let udp = |mode| Authentication {
        udp: Some(mode),
        ..Authentication::default()
    };
    let world = enrolled()
        .authentication("shop/a", mtls(Mtls::Strict))
        .authentication("shop/b", mtls(Mtls::Permissive))
        .authentication("shop/c", udp(UdpMode::Deny));
    assert_eq!(
        flags(&world),
        PodState::ENROLLED | PodState::STRICT | PodState::UDP_DENY
    );
    let plan = world.on("n1");
    plan.rejected("MeshAuthentication shop/a", "spec.mtls");
    plan.rejected("MeshAuthentication shop/b", "spec.mtls");
    assert!(!plan.rejections.iter().any(|r| r.field == "spec.udp"));
}

#[test]
fn port_modes_override_the_general_mode() {
    let with = |a: Authentication, ports: &[(u16, Mtls)]| Authentication {
        ports: ports.iter().copied().collect(),
        ..a
    };
    let strict_ports = |world: &World, ports: &[u16]| -> Vec<bool> {
        let plan = world.on("n1").clean();
        let view = plan.plan.pods["uid-shop/web"].view;
        ports
            .iter()
            .map(|p| strict(&plan.plan, &view, Port::new(*p)))
            .collect()
    };
    let ns = with(
        mtls(Mtls::Strict),
        &[(80, Mtls::Permissive), (81, Mtls::Strict)],
    );
    let world = enrolled().authentication("shop/ns", ns);
    assert_eq!(strict_ports(&world, &[80, 81, 82]), [false, true, true]);
    let world = world.authentication("shop/web", of_pods("app=web", mtls(Mtls::Strict)));
    assert_eq!(strict_ports(&world, &[80]), [true]);
    let only = with(Authentication::default(), &[(443, Mtls::Strict)]);
    let world = enrolled().authentication("shop/web", of_pods("", only));
    assert_eq!(strict_ports(&world, &[443, 80]), [true, false]);
    assert_eq!(peer_flags(&world, "10.1.1.1") & Peer::STRICT, Peer::STRICT);
    assert_eq!(peer_flags(&enrolled(), "10.1.1.1") & Peer::STRICT, 0);
    assert!(enrolled().on("n1").plan.port_modes.is_empty());
}

#[test]
fn unenrolled_pods_have_no_modes() {
    let world = World::new()
        .namespace("shop", "")
        .pod("shop/web", "10.1.1.1", "")
        .authentication("mesh-system/default", mtls(Mtls::Strict));
    assert_eq!(flags(&world), 0);
    assert_eq!(peer_flags(&world, "10.1.1.1"), Peer::POD);
}

#[test]
fn deny_label_of_the_namespace_selects_reject_or_drop() {
    let look = |text: &str| {
        let world = World::new()
            .namespace("shop", text)
            .pod("shop/web", "10.1.1.1", "");
        world.on("n1").plan.pods["uid-shop/web"].deny
    };
    assert_eq!(look(""), None);
    assert_eq!(look("mesh.rs/deny=reject"), Some(Deny::Reject));
    assert_eq!(look("mesh.rs/deny=drop"), Some(Deny::Drop));
    assert_eq!(look("mesh.rs/deny=maybe"), None);
    World::new()
        .namespace("shop", "mesh.rs/deny=maybe")
        .on("n1")
        .rejected("Namespace shop", "must be one of reject, drop");
}
