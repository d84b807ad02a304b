// SPDX-License-Identifier: Apache-2.0
//! NetworkPolicy v1, clause by clause: for each a case that passes and one that does not.

use std::sync::Arc;

use crate::support::*;

fn shop() -> World {
    World::new()
        .namespace("shop", "team=a")
        .namespace("other", "team=b")
        .pod("shop/web", "10.1.1.1,fd01::1", "app=web,tier=front")
        .pod("shop/db", "10.1.1.2,fd01::2", "app=db")
        .pod("shop/job", "10.1.2.3", "app=job")
        .pod("other/web", "10.1.2.4,fd02::4", "app=web")
}

#[test]
fn traffic_without_policy_is_allowed() {
    let plan = shop().on("n1").clean();
    plan.table(
        "shop/web in 10.1.2.4 tcp/80 -> allow by nothing
         shop/web out 8.8.8.8 udp/53 -> allow by nothing",
    );
    assert!(plan.plan.sets.is_empty() && plan.plan.ports.is_empty());
}

#[test]
fn policy_isolates_selected_pods_in_its_direction_only() {
    let plan = shop()
        .policy(
            "NetworkPolicy shop/p",
            policy("shop", "app=web").ingress([]),
        )
        .on("n1")
        .clean();
    plan.table(
        "shop/web in 10.1.1.2 tcp/80 -> deny by default of NetworkPolicy shop/p
         shop/web in 8.8.8.8 icmp -> deny by default of NetworkPolicy shop/p
         shop/web out 10.1.1.2 tcp/80 -> allow by nothing
         shop/db in 10.1.1.1 tcp/80 -> allow by nothing
         shop/web in 10.0.0.1 tcp/80 -> allow by node-local
         shop/web in fd00::1 tcp/80 -> allow by node-local
         shop/web in 10.0.0.2 tcp/80 -> deny",
    );
    let plan = shop()
        .policy("NetworkPolicy shop/p", policy("shop", "").egress([]))
        .on("n1")
        .clean();
    plan.table(
        "shop/web out 10.1.1.2 tcp/80 -> deny
         shop/web out 10.0.0.1 tcp/80 -> deny
         shop/web in 10.1.1.2 tcp/80 -> allow
         shop/db out 10.1.1.1 tcp/80 -> deny",
    );
}

#[test]
fn pod_and_namespace_selectors_are_combined() {
    let rules = |text: &str| {
        let p = policy("shop", "app=db").ingress([allow(text)]);
        shop().policy("NetworkPolicy shop/p", p).on("n1").clean()
    };
    rules("pods(app=web)").table(
        "shop/db in 10.1.1.1 tcp/80 -> allow by NetworkPolicy shop/p ingress[0]
         shop/db in fd01::1 tcp/80 -> allow
         shop/db in 10.1.2.4 tcp/80 -> deny
         shop/db in 10.1.2.3 tcp/80 -> deny",
    );
    rules("pods()").table(
        "shop/db in 10.1.2.3 tcp/80 -> allow
         shop/db in 10.1.2.4 tcp/80 -> deny",
    );
    rules("nss(team=b)").table(
        "shop/db in 10.1.2.4 tcp/80 -> allow
         shop/db in 10.1.1.1 tcp/80 -> deny",
    );
    rules("nss(;app=web)").table(
        "shop/db in 10.1.2.4 tcp/80 -> allow
         shop/db in 10.1.1.1 tcp/80 -> allow
         shop/db in 10.1.2.3 tcp/80 -> deny
         shop/db in 10.1.2.99 tcp/80 -> deny
         shop/db in 8.8.8.8 tcp/80 -> deny",
    );
    rules("nss(team=a;app=web)").table(
        "shop/db in 10.1.1.1 tcp/80 -> allow
         shop/db in 10.1.2.4 tcp/80 -> deny",
    );
    rules("nss(kubernetes.io/metadata.name=other)").table(
        "shop/db in 10.1.2.4 tcp/80 -> allow
         shop/db in 10.1.1.1 tcp/80 -> deny",
    );
    rules("nss(team!=b)").table(
        "shop/db in 10.1.1.1 tcp/80 -> allow
         shop/db in 10.1.2.4 tcp/80 -> deny",
    );
    rules("pods(tier)").table(
        "shop/db in 10.1.1.1 tcp/80 -> allow
         shop/db in 10.1.2.3 tcp/80 -> deny",
    );
    rules("pods(!tier,app=job|web)").table(
        "shop/db in 10.1.2.3 tcp/80 -> allow
         shop/db in 10.1.1.1 tcp/80 -> deny",
    );
}

#[test]
fn peers_of_a_rule_and_rules_of_a_policy_are_alternatives() {
    let p = policy("shop", "app=db").ingress([
        allow("pods(app=web) 8.8.0.0/16 : tcp/80 udp/53"),
        allow("pods(app=job) : tcp/443"),
    ]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table(
        "shop/db in 10.1.1.1 tcp/80 -> allow
         shop/db in 10.1.1.1 udp/53 -> allow
         shop/db in 10.1.1.1 tcp/53 -> deny
         shop/db in 8.8.8.8 tcp/80 -> allow
         shop/db in 8.9.8.8 tcp/80 -> deny
         shop/db in 10.1.1.1 tcp/443 -> deny
         shop/db in 10.1.2.3 tcp/443 -> allow by NetworkPolicy shop/p ingress[1]
         shop/db in 10.1.2.3 tcp/80 -> deny",
    );
}

#[test]
fn policies_are_additive() {
    let plan = shop()
        .policy("NetworkPolicy shop/a", policy("shop", "").ingress([]))
        .policy(
            "NetworkPolicy shop/b",
            policy("shop", "app=db").ingress([allow("pods(app=web) : tcp/5432")]),
        )
        .policy(
            "NetworkPolicy shop/c",
            policy("shop", "app=db").ingress([allow("8.0.0.0/8")]),
        )
        .on("n1")
        .clean();
    plan.table(
        "shop/db in 10.1.1.1 tcp/5432 -> allow by NetworkPolicy shop/b ingress[0]
         shop/db in 10.1.1.1 tcp/80 -> deny by default of NetworkPolicy shop/a
         shop/db in 8.8.8.8 tcp/1 -> allow by NetworkPolicy shop/c ingress[0]
         shop/web in 10.1.1.2 tcp/5432 -> deny",
    );
}

#[test]
fn omitted_peers_and_ports_match_everything() {
    let plan = shop()
        .policy(
            "NetworkPolicy shop/p",
            policy("shop", "app=db").ingress([allow("* : tcp/80")]),
        )
        .policy(
            "NetworkPolicy shop/q",
            policy("shop", "app=web").ingress([allow("pods(app=db)")]),
        )
        .on("n1")
        .clean();
    plan.table(
        "shop/db in 10.1.1.1 tcp/80 -> allow
         shop/db in 10.1.2.99 tcp/80 -> allow
         shop/db in 8.8.8.8 tcp/80 -> allow
         shop/db in 2001:db8::1 tcp/80 -> allow
         shop/db in 8.8.8.8 tcp/81 -> deny
         shop/db in 8.8.8.8 udp/80 -> deny
         shop/db in 8.8.8.8 icmp -> deny
         shop/web in 10.1.1.2 icmp -> allow
         shop/web in 10.1.1.2 sctp/9 -> allow
         shop/web in 10.1.2.3 icmp -> deny",
    );
}

#[test]
fn port_ranges_match_per_transport() {
    let p = policy("shop", "app=db").ingress([allow("* : tcp/8000-8010 udp sctp/5 tcp/1")]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table(
        "shop/db in 8.8.8.8 tcp/7999 -> deny
         shop/db in 8.8.8.8 tcp/8000 -> allow
         shop/db in 8.8.8.8 tcp/8010 -> allow
         shop/db in 8.8.8.8 tcp/8011 -> deny
         shop/db in 8.8.8.8 udp/7 -> allow
         shop/db in 8.8.8.8 udp/65535 -> allow
         shop/db in 8.8.8.8 sctp/5 -> allow
         shop/db in 8.8.8.8 sctp/6 -> deny
         shop/db in 8.8.8.8 tcp/1 -> allow
         shop/db in 8.8.8.8 tcp/2 -> deny
         shop/db in 8.8.8.8 tcp/0 -> deny",
    );
}

#[test]
fn cidrs_with_exceptions_match_pods_and_nest() {
    let p = policy("shop", "app=web").egress([
        allow("10.0.0.0/8-10.1.0.0/16 : tcp/80"),
        allow("10.1.2.0/24-10.1.2.4/32 : tcp/81"),
        allow("fd02::/16-fd02::4/128"),
    ]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table(
        "shop/web out 10.7.0.1 tcp/80 -> allow by NetworkPolicy shop/p egress[0]
         shop/web out 10.7.0.1 tcp/81 -> deny
         shop/web out 10.1.1.2 tcp/80 -> deny
         shop/web out 10.1.2.3 tcp/80 -> deny
         shop/web out 10.1.2.3 tcp/81 -> allow by NetworkPolicy shop/p egress[1]
         shop/web out 10.1.2.4 tcp/81 -> deny
         shop/web out fd02::5 udp/1 -> allow
         shop/web out fd02::4 udp/1 -> deny
         shop/web out fd03::4 udp/1 -> deny
         shop/web out 11.0.0.1 tcp/80 -> deny",
    );
}

#[test]
fn ipv6_any_cidr_does_not_match_ipv4() {
    let p = policy("shop", "app=web").egress([allow("::/0 : tcp/80"), allow("0.0.0.0/0 : tcp/81")]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table(
        "shop/web out 2001:db8::1 tcp/80 -> allow
         shop/web out 2001:db8::1 tcp/81 -> deny
         shop/web out 8.8.8.8 tcp/80 -> deny
         shop/web out 8.8.8.8 tcp/81 -> allow",
    );
    let p = policy("shop", "app=web").egress([allow("::/0 : tcp/80")]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table(
        "shop/web out 2001:db8::1 tcp/80 -> allow
         shop/web out 8.8.8.8 tcp/80 -> deny",
    );
}

#[test]
fn pod_and_cidr_rules_apply_to_the_same_peer() {
    let p = policy("shop", "app=web")
        .egress([allow("pods(app=db) : tcp/1"), allow("10.1.1.0/24 : tcp/2")]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table(
        "shop/web out 10.1.1.2 tcp/1 -> allow by NetworkPolicy shop/p egress[0]
         shop/web out 10.1.1.2 tcp/2 -> allow by NetworkPolicy shop/p egress[1]
         shop/web out 10.1.1.2 tcp/3 -> deny
         shop/web out 10.1.1.9 tcp/1 -> deny
         shop/web out 10.1.1.9 tcp/2 -> allow",
    );
}

#[test]
fn named_ports_resolve_at_the_destination_pod() {
    use mesh_plan::cluster::Transport::{Tcp, Udp};
    let world = shop()
        .pod_with("shop/a", "10.1.1.11", "app=a", |pod| {
            Arc::make_mut(&mut pod.named_ports).insert(("http".into(), Tcp), 8080);
        })
        .pod_with("shop/b", "10.1.1.12", "app=a", |pod| {
            Arc::make_mut(&mut pod.named_ports).insert(("http".into(), Tcp), 9090);
            Arc::make_mut(&mut pod.named_ports).insert(("http".into(), Udp), 53);
        });
    let ingress = world.clone().policy(
        "NetworkPolicy shop/p",
        policy("shop", "app=a").ingress([allow("* : tcp/http")]),
    );
    ingress.on("n1").clean().table(
        "shop/a in 10.1.1.1 tcp/8080 -> allow
         shop/a in 8.8.8.8 tcp/8080 -> allow
         shop/a in 10.1.1.1 tcp/9090 -> deny
         shop/b in 10.1.1.1 tcp/9090 -> allow
         shop/b in 10.1.1.1 tcp/8080 -> deny
         shop/b in 10.1.1.1 udp/53 -> deny",
    );
    for peers in ["*", "pods(app=a) pods(app=db)"] {
        let rule = allow(&format!("{peers} : tcp/http udp/http"));
        let p = policy("shop", "app=web").egress([rule]);
        let egress = world.clone().policy("NetworkPolicy shop/p", p);
        egress.on("n1").clean().table(
            "shop/web out 10.1.1.11 tcp/8080 -> allow
             shop/web out 10.1.1.11 tcp/9090 -> deny
             shop/web out 10.1.1.12 tcp/9090 -> allow
             shop/web out 10.1.1.12 udp/53 -> allow
             shop/web out 10.1.1.2 tcp/8080 -> deny
             shop/web out 8.8.8.8 tcp/8080 -> deny",
        );
    }
    let rules = [
        allow("10.1.0.0/16-10.1.1.12/32 : tcp/http tcp/7"),
        deny("10.1.1.11/32 : tcp/http"),
    ];
    let [allowed, denied] = rules;
    let by_block = world.clone().policy(
        "NetworkPolicy shop/p",
        policy("shop", "app=web").egress([allowed]),
    );
    by_block.on("n1").clean().table(
        "shop/web out 10.1.1.11 tcp/8080 -> allow
         shop/web out 10.1.1.11 tcp/7 -> allow
         shop/web out 10.1.1.11 tcp/9090 -> deny
         shop/web out 10.1.1.12 tcp/9090 -> deny
         shop/web out 10.1.1.2 tcp/8080 -> deny
         shop/web out 10.1.1.2 tcp/7 -> allow",
    );
    let denies = world.policy(
        "MeshPolicy shop/p",
        policy("shop", "app=web").egress([denied]),
    );
    let plan = denies.on("n1");
    plan.rejected("MeshPolicy shop/p", "named port");
    plan.table(
        "shop/web out 10.1.1.11 tcp/8080 -> deny
         shop/web out 10.1.1.11 tcp/8081 -> deny
         shop/web out 10.1.1.11 udp/8081 -> allow
         shop/web out 10.1.1.12 tcp/9090 -> allow",
    );
}

#[test]
fn rule_with_invalid_peers_allows_nothing() {
    let p = policy("shop", "app=web").ingress([allow(" : tcp/80")]);
    let plan = shop().policy("NetworkPolicy shop/p", p).on("n1").clean();
    plan.table("shop/web in 10.1.1.2 tcp/80 -> deny");
}

#[test]
fn verdict_for_a_peer_is_independent_of_other_peers() {
    let p = || policy("shop", "app=db").ingress([allow("pods(app=web,tier!=x)")]);
    let before = shop()
        .policy("NetworkPolicy shop/p", p())
        .on("n1")
        .clean()
        .plan;
    let more = shop()
        .policy("NetworkPolicy shop/p", p())
        .pod("shop/new", "10.1.2.9", "app=web");
    let after = more.on("n1").clean().plan;
    assert_eq!(before.sets, after.sets);
    assert!(
        before
            .selects
            .iter()
            .all(|(key, lists)| after.selects.get(key) == Some(lists))
    );
    assert_eq!(after.selects.len(), before.selects.len() + 1);
}

#[test]
fn empty_cluster_has_an_empty_plan() {
    let empty = mesh_plan::ClusterSnapshot::default();
    assert_eq!(
        mesh_plan::compile(&empty, "n1"),
        (mesh_plan::Plan::default(), vec![])
    );
}
