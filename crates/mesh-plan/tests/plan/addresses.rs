// SPDX-License-Identifier: Apache-2.0
//! Tests of the owners of addresses.

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::path::Peers;
use mesh_common::policy::PolicySetId;
use mesh_common::{Addr, Evidence};

use crate::support::*;

fn id(plan: &Compiled, address: &str) -> IdentityId {
    mesh_common::path::who(&plan.plan, &Addr::from(ip(address))).id
}

fn peer(plan: &Compiled, address: &str) -> Option<Peer> {
    plan.plan.peer(&Addr::from(ip(address)))
}

#[test]
fn addresses_get_the_identity_of_their_owner() {
    let mut world = World::new().pod("shop/web", "10.1.2.1,fd01::1", "app=web");
    world.0.api_servers = [ip("10.9.9.9"), ip("10.0.0.1")].into();
    world.0.pod_cidrs = [
        "10.200.0.0/16".parse().unwrap(),
        "fd01::/64".parse().unwrap(),
    ]
    .into();
    let plan = world.on("n1").clean();
    assert_eq!(id(&plan, "10.0.0.1"), IdentityId::HOST_API_SERVER);
    assert_eq!(id(&plan, "fd00::1"), IdentityId::HOST);
    assert_eq!(id(&plan, "fd00::2"), IdentityId::REMOTE_NODE);
    assert_eq!(id(&plan, "10.9.9.9"), IdentityId::KUBE_APISERVER);
    assert_eq!(id(&plan, "10.1.2.99"), IdentityId::UNKNOWN);
    assert_eq!(id(&plan, "10.200.3.4"), IdentityId::UNKNOWN);
    assert_eq!(id(&plan, "fd01::77"), IdentityId::UNKNOWN);
    assert_eq!(id(&plan, "10.201.3.4"), IdentityId::WORLD);
    assert_eq!(id(&plan, "::ffff:8.8.8.8"), IdentityId::WORLD);
    let web = id(&plan, "10.1.2.1");
    assert!(web.is_workload());
    assert_eq!(id(&plan, "fd01::1"), web);
    assert_eq!(peer(&plan, "10.1.2.1").unwrap().flags, Peer::POD);
    assert_eq!(peer(&plan, "10.0.0.2").unwrap().flags, 0);
    let from_there = world.on("n2").clean();
    assert_eq!(id(&from_there, "10.0.0.1"), IdentityId::REMOTE_NODE);
    assert_eq!(id(&from_there, "fd00::2"), IdentityId::HOST);
}

#[test]
fn host_network_pods_have_the_nodes_identity() {
    let world = World::new().pod_with("shop/agent", "10.0.0.1", "", |pod| {
        pod.host_network = true;
        pod.node = "n1".into();
    });
    let plan = world.on("n1").clean();
    assert_eq!(id(&plan, "10.0.0.1"), IdentityId::HOST);
    assert!(plan.plan.pods.is_empty() && plan.plan.names.workloads.is_empty());
}

#[test]
fn identities_differ_only_in_labels_that_policies_use() {
    let world = World::new()
        .namespace("shop", "team=a")
        .pod("shop/a", "10.1.2.1", "app=web,pod-hash=1")
        .pod("shop/b", "10.1.2.2", "app=web,pod-hash=2")
        .pod("shop/c", "10.1.2.3", "app=db,pod-hash=2")
        .pod_with("shop/d", "10.1.2.4", "app=db", |pod| {
            pod.service_account = "x".into()
        })
        .pod("other/a", "10.1.2.5", "app=web");
    let plan = world.on("n1").clean();
    assert_eq!(id(&plan, "10.1.2.1"), id(&plan, "10.1.2.3"));
    assert_ne!(id(&plan, "10.1.2.3"), id(&plan, "10.1.2.4"));
    assert_ne!(id(&plan, "10.1.2.1"), id(&plan, "10.1.2.5"));
    let p = policy("shop", "pod-hash=1").ingress([allow("pods(app=web)")]);
    let world = world.policy("NetworkPolicy shop/p", p);
    let plan = world.on("n1").clean();
    assert_eq!(id(&plan, "10.1.2.1"), id(&plan, "10.1.2.2"));
    assert_ne!(id(&plan, "10.1.2.1"), id(&plan, "10.1.2.3"));
    assert_eq!(
        world.on("n2").clean().plan.names.identities,
        plan.plan.names.identities
    );
}

#[test]
fn address_claimed_by_two_pods_is_unknown() {
    let world = World::new()
        .pod("shop/a", "10.1.1.1,fd01::1", "app=a")
        .pod("shop/b", "10.1.1.1", "app=b")
        .pod("shop/c", "10.1.1.3", "app=c");
    let plan = world.on("n1");
    plan.rejected(
        "Pod shop/a",
        "10.1.1.1 is claimed by Pod shop/a and Pod shop/b",
    );
    plan.rejected("Pod shop/b", "isolated");
    assert_eq!(peer(&plan, "10.1.1.1").unwrap().id, IdentityId::UNKNOWN);
    assert!(peer(&plan, "fd01::1").unwrap().id.is_workload());
    let view = |uid: &str| plan.plan.pods[uid].view;
    for uid in ["uid-shop/a", "uid-shop/b"] {
        assert_eq!(
            (view(uid).set, view(uid).id),
            (PolicySetId::ISOLATED, IdentityId::UNKNOWN)
        );
    }
    assert_eq!(view("uid-shop/c").set, PolicySetId::NONE);
    plan.table("shop/a in 10.1.1.3 tcp/1 -> deny isolated");
}

#[test]
fn terminating_pod_yields_its_address() {
    let world = World::new()
        .pod_with("shop/old", "10.1.1.1", "app=a", |pod| {
            pod.terminating = true
        })
        .pod("shop/new", "10.1.1.1", "app=b")
        .pod("shop/c", "10.1.1.3", "app=c")
        .policy(
            "NetworkPolicy shop/p",
            policy("shop", "app=c").ingress([allow("pods(app=b)")]),
        );
    let plan = world.on("n2");
    assert_eq!(plan.rejections, []);
    assert_eq!(
        plan.plan.names.workloads[&Addr::from(ip("10.1.1.1"))]
            .name
            .name,
        "new"
    );
    let plan = world.on("n1");
    assert_eq!(plan.plan.pods["uid-shop/new"].view.set, PolicySetId::NONE);
    assert_eq!(
        plan.plan.pods["uid-shop/old"].view.set,
        PolicySetId::ISOLATED
    );
}

#[test]
fn pod_cannot_take_a_nodes_address() {
    let world = World::new()
        .pod("shop/evil", "10.0.0.1", "")
        .pod("shop/bad", "10.0.0.2", "");
    let plan = world.on("n1");
    plan.rejected("Node n1", "claimed by");
    plan.rejected("Pod shop/evil", "claimed by");
    assert_eq!(id(&plan, "10.0.0.1"), IdentityId::HOST);
    assert_eq!(peer(&plan, "10.0.0.2").unwrap().id, IdentityId::UNKNOWN);
}

#[test]
fn api_server_pod_keeps_its_identity_and_matches_kube_apiserver() {
    let mut world = World::new()
        .pod("kube/api", "10.1.2.9", "app=api")
        .pod("shop/web", "10.1.1.1", "app=web")
        .policy(
            "MeshPolicy shop/p",
            policy("shop", "").egress([allow("@kube-apiserver")]),
        );
    world.0.api_servers.insert(ip("10.1.2.9"));
    let plan = world.on("n1").clean();
    plan.table("shop/web out 10.1.2.9 tcp/443 -> allow");
    let who = mesh_common::path::who(&plan.plan, &Addr::from(ip("10.1.2.9")));
    assert_eq!(who.evidence, Evidence::Address);
}

#[test]
fn own_addresses_in_pod_cidrs_belong_to_the_node() {
    let world = World::new().pod("shop/web", "10.1.2.9", "");
    let own = ["127.0.0.1", "10.96.0.1", "10.1.2.1", "10.1.1.7"].map(ip);
    let cluster = std::sync::Arc::new(world.0);
    let mut compiler = mesh_plan::Compiler::new("n2");
    let of = |plan: mesh_plan::Plan, address: &str| {
        mesh_plan::Index::new(plan).identity(&Addr::from(ip(address)))
    };
    let (plan, rejections) = compiler.compile(&cluster, &own.into());
    assert_eq!(rejections, []);
    assert_eq!(of(plan.clone(), "10.1.2.1"), IdentityId::HOST, "a gateway");
    assert_eq!(
        of(plan.clone(), "10.96.0.1"),
        IdentityId::WORLD,
        "a service"
    );
    assert_eq!(of(plan, "10.1.1.7"), IdentityId::UNKNOWN, "of another node");
    let (plan, _) = compiler.compile(&cluster, &[].into());
    assert_eq!(plan, mesh_plan::compile(&cluster, "n2").0);
    assert_eq!(of(plan, "10.1.2.1"), IdentityId::UNKNOWN);
}
