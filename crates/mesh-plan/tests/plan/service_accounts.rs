// SPDX-License-Identifier: Apache-2.0
//! Rules that name service accounts: Allow needs proof, Deny does not.

use crate::support::*;

fn shop() -> World {
    World::new()
        .namespace("shop", "")
        .namespace("other", "")
        .pod_with("shop/web", "10.1.2.1", "", |pod| {
            pod.service_account = "web".into()
        })
        .pod_with("other/web", "10.1.2.2", "", |pod| {
            pod.service_account = "web".into()
        })
        .pod_with("shop/here", "10.1.1.3", "", |pod| {
            pod.service_account = "web".into()
        })
        .pod("shop/plain", "10.1.2.4", "")
        .pod("shop/db", "10.1.1.2", "app=db")
}

fn db(rules: impl IntoIterator<Item = mesh_plan::cluster::Rule>) -> Compiled {
    let p = policy("shop", "app=db").ingress(rules);
    shop().policy("MeshPolicy shop/p", p).on("n1").clean()
}

#[test]
fn allow_by_service_account_requires_a_proven_identity() {
    db([allow("sa(shop/web) : tcp/1")]).table(
        "shop/db in 10.1.2.1 tcp/1 proven -> allow by MeshPolicy shop/p ingress[0]
         shop/db in 10.1.2.1 tcp/1 -> deny by default of MeshPolicy shop/p
         shop/db in 10.1.1.3 tcp/1 -> allow by MeshPolicy shop/p ingress[0]
         shop/db in 10.1.2.2 tcp/1 proven -> deny
         shop/db in 10.1.2.4 tcp/1 proven -> deny
         shop/db in 10.1.2.1 tcp/2 proven -> deny",
    );
}

#[test]
fn deny_by_service_account_matches_unproven_identities() {
    db([deny("sa(shop/web) : tcp/1")]).table(
        "shop/db in 10.1.2.1 tcp/1 -> deny by MeshPolicy shop/p ingress[0]
         shop/db in 10.1.2.1 tcp/1 proven -> deny
         shop/db in 10.1.2.4 tcp/1 -> allow",
    );
}

#[test]
fn service_account_name_or_namespace_may_be_a_wildcard() {
    db([allow("sa(*/web)")]).table(
        "shop/db in 10.1.2.1 tcp/1 proven -> allow
         shop/db in 10.1.2.2 tcp/1 proven -> allow
         shop/db in 10.1.2.4 tcp/1 proven -> deny",
    );
    db([allow("sa(shop/*)")]).table(
        "shop/db in 10.1.2.4 tcp/1 proven -> allow
         shop/db in 10.1.2.2 tcp/1 proven -> deny
         shop/db in 8.8.8.8 tcp/1 -> deny",
    );
}

#[test]
fn peer_without_service_accounts_requires_no_proof() {
    db([allow("sa(shop/web) pods() : tcp/1")]).table(
        "shop/db in 10.1.2.1 tcp/1 -> allow
         shop/db in 10.1.2.2 tcp/1 -> deny",
    );
}
