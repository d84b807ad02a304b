// SPDX-License-Identifier: Apache-2.0
//! Tiers, priorities, Deny and audit.

use mesh_common::policy::{PolicySetId, Question, decide};
use mesh_common::{Addr, Direction, Evidence, Port, Protocol, Reason};
use mesh_plan::cluster::Tier;

use crate::support::*;

const ADMIN: &str = "ClusterNetworkPolicy";

fn shop() -> World {
    World::new()
        .namespace("shop", "team=a")
        .namespace("other", "team=b")
        .pod("shop/web", "10.1.1.1", "app=web")
        .pod("shop/db", "10.1.1.2", "app=db")
        .pod("other/web", "10.1.2.4", "app=web")
}

fn admin(priority: u32) -> PolicyText {
    wide(Tier::Admin(priority), "", "")
}

fn baseline(priority: u32) -> PolicyText {
    wide(Tier::Baseline(priority), "", "")
}

#[test]
fn admin_rules_match_by_priority_then_by_order() {
    let plan = shop()
        .policy(
            &format!("{ADMIN} late"),
            admin(20).ingress([deny("nss(team=b) : tcp/1-9"), allow("* : tcp/7")]),
        )
        .policy(
            &format!("{ADMIN} first"),
            admin(10).ingress([allow("nss(team=b) : tcp/3"), deny("nss(team=b) : tcp/3-4")]),
        )
        .on("n1")
        .clean();
    plan.table(
        "shop/db in 10.1.2.4 tcp/3 -> allow by ClusterNetworkPolicy first ingress[0]
         shop/db in 10.1.2.4 tcp/4 -> deny by ClusterNetworkPolicy first ingress[1]
         shop/db in 10.1.2.4 tcp/5 -> deny by ClusterNetworkPolicy late ingress[0]
         shop/db in 10.1.2.4 tcp/7 -> deny by ClusterNetworkPolicy late ingress[0]
         shop/db in 10.1.1.1 tcp/7 -> allow by ClusterNetworkPolicy late ingress[1]
         shop/db in 10.1.2.4 tcp/10 -> allow by nothing
         shop/db out 10.1.2.4 tcp/5 -> allow by nothing",
    );
}

#[test]
fn admin_subject_selects_namespaces_and_pods() {
    let plan = shop()
        .policy(
            &format!("{ADMIN} a"),
            wide(Tier::Admin(1), "team=a", "app=db").ingress([deny("*")]),
        )
        .policy(
            &format!("{ADMIN} b"),
            wide(Tier::Admin(1), "team=b", "").ingress([deny("*")]),
        );
    plan.on("n1").clean().table(
        "shop/db in 8.8.8.8 tcp/1 -> deny
         shop/web in 8.8.8.8 tcp/1 -> allow",
    );
    plan.on("n2")
        .clean()
        .table("other/web in 8.8.8.8 tcp/1 -> deny");
}

#[test]
fn deny_precedes_allow_at_equal_priority() {
    let plan = shop()
        .policy(
            &format!("{ADMIN} a"),
            admin(5).ingress([allow("* : tcp/1")]),
        )
        .policy(&format!("{ADMIN} b"), admin(5).ingress([deny("* : tcp/1")]))
        .policy(
            &format!("{ADMIN} c"),
            admin(5).ingress([pass("* : tcp/2"), deny("* : tcp/2-3")]),
        )
        .policy(
            &format!("{ADMIN} d"),
            admin(5).ingress([allow("* : tcp/2-3")]),
        )
        .on("n1")
        .clean();
    plan.table(
        "shop/db in 8.8.8.8 tcp/1 -> deny by ClusterNetworkPolicy b ingress[0]
         shop/db in 8.8.8.8 tcp/2 -> allow by nothing
         shop/db in 8.8.8.8 tcp/3 -> deny by ClusterNetworkPolicy c ingress[1]",
    );
}

#[test]
fn rules_of_a_policy_keep_their_order() {
    let rules = [allow("10.1.2.4/32"), deny("* : tcp/1")];
    let plan = shop()
        .policy(&format!("{ADMIN} a"), admin(5).ingress(rules))
        .on("n1")
        .clean();
    plan.table(
        "shop/db in 10.1.2.4 tcp/1 -> allow by ClusterNetworkPolicy a ingress[0]
         shop/db in 8.8.8.8 tcp/1 -> deny by ClusterNetworkPolicy a ingress[1]",
    );
}

#[test]
fn pass_continues_in_the_namespaced_tier_and_then_baseline() {
    let world = shop()
        .policy(
            &format!("{ADMIN} a"),
            admin(5).ingress([
                pass("nss(team=b)"),
                deny("nss(team=b)"),
                allow("pods(app=web)"),
            ]),
        )
        .policy(
            &format!("{ADMIN} z"),
            baseline(0).ingress([deny("nss(team=b)"), allow("*")]),
        );
    let isolated = policy("shop", "app=db").ingress([allow("nss(team=b) : tcp/1")]);
    world
        .clone()
        .policy("NetworkPolicy shop/p", isolated)
        .on("n1")
        .clean()
        .table(
            "shop/db in 10.1.2.4 tcp/1 -> allow by NetworkPolicy shop/p ingress[0]
         shop/db in 10.1.2.4 tcp/2 -> deny by default of NetworkPolicy shop/p
         shop/db in 10.1.1.1 tcp/2 -> allow by ClusterNetworkPolicy a ingress[2]
         shop/db in 8.8.8.8 tcp/2 -> deny by default of NetworkPolicy shop/p
         shop/web in 10.1.2.4 tcp/1 -> deny by ClusterNetworkPolicy z ingress[0]
         shop/web in 8.8.8.8 tcp/1 -> allow by ClusterNetworkPolicy z ingress[1]",
        );
}

#[test]
fn baseline_applies_by_priority_to_non_isolated_pods_only() {
    let plan = shop()
        .policy(
            &format!("{ADMIN} y"),
            baseline(2).egress([allow("8.0.0.0/8")]),
        )
        .policy(
            &format!("{ADMIN} z"),
            baseline(1).egress([deny("8.8.0.0/16 : udp/53")]),
        )
        .policy("NetworkPolicy shop/p", policy("shop", "app=db").ingress([]))
        .on("n1")
        .clean();
    plan.table(
        "shop/db out 8.8.8.8 udp/53 -> deny by ClusterNetworkPolicy z egress[0]
         shop/db out 8.8.8.8 udp/54 -> allow by ClusterNetworkPolicy y egress[0]
         shop/db out 9.8.8.8 udp/53 -> allow by nothing",
    );
}

#[test]
fn only_the_admin_tier_can_deny_the_local_node() {
    let world = shop()
        .policy(
            "MeshPolicy shop/p",
            policy("shop", "").ingress([deny("@host"), deny("10.0.0.1/32")]),
        )
        .policy(&format!("{ADMIN} z"), baseline(1).ingress([deny("@host")]));
    world
        .on("n1")
        .clean()
        .table("shop/db in 10.0.0.1 tcp/1 -> allow by node-local");
    let world = world.policy(
        &format!("{ADMIN} a"),
        admin(1).ingress([deny("@host : tcp/1")]),
    );
    world.on("n1").clean().table(
        "shop/db in 10.0.0.1 tcp/1 -> deny by ClusterNetworkPolicy a ingress[0]
         shop/db in 10.0.0.1 tcp/2 -> allow by node-local
         shop/db in 10.0.0.2 tcp/1 -> allow by nothing",
    );
}

#[test]
fn namespaced_deny_overrides_allow_without_isolating() {
    let world = shop().policy(
        "MeshPolicy shop/deny",
        policy("shop", "app=db").ingress([deny("* : tcp/22")]),
    );
    world.on("n1").clean().table(
        "shop/db in 8.8.8.8 tcp/22 -> deny by MeshPolicy shop/deny ingress[0]
         shop/db in 8.8.8.8 tcp/80 -> allow by nothing",
    );
    let allow = policy("shop", "app=db").ingress([allow("pods() : tcp"), allow("10.1.1.1/32")]);
    world
        .policy("NetworkPolicy shop/allow", allow)
        .on("n1")
        .clean()
        .table(
            "shop/db in 10.1.1.1 tcp/22 -> deny by MeshPolicy shop/deny ingress[0]
         shop/db in 10.1.1.1 tcp/80 -> allow by NetworkPolicy shop/allow ingress[0]
         shop/db in 8.8.8.8 tcp/80 -> deny by default of NetworkPolicy shop/allow",
        );
}

#[test]
fn namespaced_deny_wins_between_cidr_and_pod_rules() {
    let world = shop()
        .policy(
            "MeshPolicy shop/a",
            policy("shop", "app=db").ingress([allow("pods(app=web)"), deny("10.1.1.1/32 : tcp/1")]),
        )
        .policy(
            "MeshPolicy shop/b",
            policy("shop", "app=db").ingress([allow("10.1.1.0/24"), deny("pods(app=web) : tcp/2")]),
        );
    world.on("n1").clean().table(
        "shop/db in 10.1.1.1 tcp/1 -> deny by MeshPolicy shop/a ingress[1]
         shop/db in 10.1.1.1 tcp/2 -> deny by MeshPolicy shop/b ingress[1]
         shop/db in 10.1.1.1 tcp/3 -> allow",
    );
}

#[test]
fn admin_cidr_and_pod_rules_keep_their_order() {
    for (first, second, expected) in [
        (allow("10.1.1.1/32"), deny("pods(app=web)"), "allow"),
        (deny("pods(app=web)"), allow("10.1.1.1/32"), "deny"),
        (deny("10.1.1.1/32"), allow("pods(app=web)"), "deny"),
        (allow("pods(app=web)"), deny("10.1.1.1/32"), "allow"),
        (pass("pods(app=web)"), deny("10.1.1.1/32"), "allow"),
    ] {
        let policy = admin(5).ingress([first, second]);
        let plan = shop()
            .policy(&format!("{ADMIN} a"), policy)
            .on("n1")
            .clean();
        plan.table(&format!("shop/db in 10.1.1.1 tcp/1 -> {expected}"));
    }
}

#[test]
fn audit_policy_never_isolates_and_reports_would_be_verdicts() {
    let audited = || {
        policy("shop", "app=db")
            .ingress([allow("pods(app=web) : tcp/1")])
            .audit()
    };
    let plan = shop()
        .policy("MeshPolicy shop/p", audited())
        .policy(
            &format!("{ADMIN} a"),
            admin(3).ingress([deny("* : tcp/9")]).audit(),
        )
        .policy(
            &format!("{ADMIN} b"),
            admin(4).ingress([allow("* : tcp/8-9")]),
        )
        .on("n1")
        .clean();
    plan.table(
        "shop/db in 8.8.8.8 tcp/2 -> allow by nothing
         shop/db in 8.8.8.8 tcp/9 -> allow by ClusterNetworkPolicy b ingress[0]
         shop/web in 8.8.8.8 tcp/9 -> allow by ClusterNetworkPolicy b ingress[0]",
    );
    let shadow = |name: &str| {
        let mut pods = plan.plan.pods.values();
        let pod = pods.find(|pod| pod.name.name == name).unwrap();
        plan.plan.sets[&pod.view.set].shadow
    };
    let would = |set, port| {
        let question = Question {
            set,
            direction: Direction::Ingress,
            peer: mesh_common::IdentityId::WORLD,
            addr: Addr::from(ip("8.8.8.8")),
            evidence: Evidence::None,
            protocol: Protocol::TCP,
            port: Port::new(port),
        };
        let verdict = decide(&plan.plan, &question);
        (verdict.allowed, verdict.reason)
    };
    assert_eq!(would(shadow("db"), 2), (false, Reason::DefaultDeny));
    assert_eq!(would(shadow("db"), 9), (false, Reason::Policy));
    assert_eq!(would(shadow("db"), 8), (true, Reason::Policy));
    assert_eq!(would(shadow("web"), 2), (true, Reason::NoPolicy));
    assert_eq!(plan.plan.sets[&shadow("db")].shadow, PolicySetId::NONE);

    let plan = shop()
        .policy("MeshPolicy shop/p", audited().egress([]))
        .on("n1")
        .clean();
    plan.table("shop/db in 8.8.8.8 tcp/2 -> allow by nothing");
    let none = shop()
        .policy("NetworkPolicy shop/p", policy("shop", "").ingress([]))
        .on("n1");
    assert!(
        none.plan
            .sets
            .values()
            .all(|head| head.shadow == PolicySetId::NONE)
    );
}

#[test]
fn entities_match_their_addresses() {
    let mut world = shop();
    world.0.api_servers.insert(ip("10.9.9.9"));
    world.0.api_servers.insert(ip("10.0.0.2"));
    let only = |text: &str| {
        let p = policy("shop", "app=web").egress([allow(&format!("@{text}"))]);
        world
            .clone()
            .policy("MeshPolicy shop/p", p)
            .on("n1")
            .clean()
    };
    let peers = [
        ("host", "10.0.0.1"),
        ("remote-node", "10.0.0.2"),
        ("kube-apiserver", "10.9.9.9"),
        ("pod", "10.1.2.4"),
        ("unknown", "10.1.2.99"),
        ("world", "8.8.8.8"),
    ];
    for (entity, reached) in [
        ("host", vec!["host"]),
        ("remote-node", vec!["remote-node"]),
        // This API server is on the other node.
        ("kube-apiserver", vec!["kube-apiserver", "remote-node"]),
        (
            "cluster",
            vec!["host", "remote-node", "kube-apiserver", "pod", "unknown"],
        ),
        ("world", vec!["world"]),
    ] {
        let plan = only(entity);
        for (name, address) in peers {
            let expected = if reached.contains(&name) {
                "allow"
            } else {
                "deny"
            };
            plan.table(&format!("shop/web out {address} tcp/443 -> {expected}"));
        }
    }
}

#[test]
fn node_selector_matches_node_addresses() {
    let p = admin(1).egress([deny("nodes(zone=z2) : tcp/10250")]);
    let plan = shop().policy(&format!("{ADMIN} a"), p).on("n1").clean();
    plan.table(
        "shop/web out 10.0.0.2 tcp/10250 -> deny by ClusterNetworkPolicy a egress[0]
         shop/web out fd00::2 tcp/10250 -> deny
         shop/web out 10.0.0.2 tcp/80 -> allow
         shop/web out 10.0.0.1 tcp/10250 -> allow",
    );
}
