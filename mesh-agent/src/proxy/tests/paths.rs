// SPDX-License-Identifier: Apache-2.0
//! Connections between applications of two nodes, and the reasons for refusals.

use mesh_common::policy::{PolicySetId, RuleId, SetHead};
use mesh_common::{Peer, PodState, Reason};
use mesh_plan::Plan;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use super::super::*;
use super::rig::*;

const RULE: RuleId = RuleId(77);

/// A policy under which the server's pod accepts nothing.
fn isolate(plan: &mut Plan) {
    let set = PolicySetId(5);
    let head = SetHead {
        ingress_rule: RULE,
        flags: SetHead::ISOLATED_INGRESS,
        ..SetHead::default()
    };
    plan.sets.insert(set, head);
    plan.pods.get_mut("server").unwrap().view.set = set;
}

/// One request and one answer over a connection that the client closes.
async fn exchange(rig: &Rig, route: &Route) -> SocketPair {
    let (mut client, mut server) = rig.pair(route).await;
    client.write_all(b"question").await.unwrap();
    let mut question = [0; 8];
    server.read_exact(&mut question).await.unwrap();
    server.write_all(b"the answer").await.unwrap();
    let mut answer = [0; 10];
    client.read_exact(&mut answer).await.unwrap();
    let at = client.local_addr().unwrap();
    drop(client);
    assert_eq!(server.read(&mut [0; 9]).await.unwrap(), 0);
    SocketPair { client: at }
}

struct SocketPair {
    client: std::net::SocketAddr,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn connection_is_relayed_and_recorded_on_both_nodes() {
    let (rig, route) = Rig::new().await;
    let pair = exchange(&rig, &route).await;
    let client = format!("{CLIENT}:{}", pair.client.port());
    assert_eq!(rig.net.client.get().unwrap().to_string(), client);
    let id = |name: &str| format!("spiffe://cluster.local/ns/shop/sa/{name}-sa");
    for (node, reporter, peer, first) in [
        (&rig.near, "source", "server", "local"),
        (&rig.far, "destination", "client", "remote"),
    ] {
        let [record] = &node.records(1).await[..] else {
            panic!("one record")
        };
        for (field, value) in [
            ("reporter", json!(reporter)),
            ("bytes_sent", json!(8)),
            ("bytes_received", json!(10)),
            ("verdict", json!("allowed")),
            ("security", json!("mutual_tls")),
            ("evidence", json!("tls")),
            ("peer_identity", json!(id(peer))),
            ("close", json!("finished")),
            ("closed_by", json!(first)),
            ("service_address", json!("10.96.0.1:80")),
        ] {
            assert_eq!(record[field], value, "{reporter} {field}");
        }
        assert!(record["source"].to_string().contains("client"));
        assert!(record["destination"].to_string().contains("server"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn successive_connections_share_one_tunnel() {
    let (rig, route) = Rig::new().await;
    for round in 1..=50 {
        exchange(&rig, &route).await;
        rig.near.records(round).await;
    }
    // One for each worker at most.
    assert!(rig.net.dialled.load(Relaxed) <= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn thousand_concurrent_connections_are_relayed() {
    let (rig, route) = Rig::new().await;
    let mut pairs = Vec::new();
    for _ in 0..1000 {
        pairs.push(rig.pair(&route).await);
    }
    // The first bytes identify the client of each server.
    let mut tasks = JoinSet::new();
    let mut clients = Vec::new();
    for (number, (mut client, mut server)) in pairs.into_iter().enumerate() {
        tasks.spawn(async move {
            let mut seen = [0; 8];
            server.read_exact(&mut seen).await.unwrap();
            let mut reply = seen.to_vec();
            reply.reverse();
            server.write_all(&reply).await.unwrap();
            server.read(&mut seen).await.unwrap()
        });
        client.write_all(&number.to_be_bytes()).await.unwrap();
        clients.push(client);
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let mut reply = [0; 8];
        client.read_exact(&mut reply).await.unwrap();
        assert_eq!(usize::from_le_bytes(reply), number);
    }
    drop(clients);
    while let Some(ended) = tasks.join_next().await {
        assert_eq!(ended.unwrap(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn denied_connection_is_reset_and_the_tunnel_goes_on() {
    let (rig, route) = Rig::new().await;
    rig.far.change(isolate);
    let mut client = rig.connect(&route).await;
    client.write_all(b"let me in").await.unwrap();
    assert!(is_reset(&mut client).await);
    for node in [&rig.near, &rig.far] {
        let record = &node.records(1).await[0];
        assert_eq!(record["verdict"], "denied");
        assert_eq!(record["close"], "default_deny");
    }
    rig.far
        .change(|plan| plan.pods.get_mut("server").unwrap().view.set = PolicySetId::NONE);
    exchange(&rig, &route).await;
    rig.near.records(2).await;
    assert!(rig.net.dialled.load(Relaxed) <= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn connection_waits_for_a_peer_that_is_not_known_yet() {
    let (rig, route) = Rig::new().await;
    let mut known = None;
    rig.far.change(|plan| {
        known = plan.names.workloads.remove(&addr(CLIENT));
    });
    let mut client = rig.connect(&route).await;
    assert!(is_reset(&mut client).await);
    assert_eq!(rig.near.records(1).await[0]["close"], "unknown_peer");

    let (_client, ()) = tokio::join!(rig.connect(&route), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        rig.far.change(|plan| {
            plan.names
                .workloads
                .insert(addr(CLIENT), known.take().unwrap());
        });
        route.application.accept().await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unexpected_identity_is_refused_on_either_node() {
    for at_source in [true, false] {
        let (rig, route) = Rig::new().await;
        let (node, ip) = if at_source {
            (&rig.near, SERVER)
        } else {
            (&rig.far, CLIENT)
        };
        node.change(|plan| {
            let workload = plan.names.workloads.get_mut(&addr(ip)).unwrap();
            std::sync::Arc::make_mut(workload).service_account = "other-sa".to_owned();
        });
        let mut client = rig.connect(&route).await;
        assert!(is_reset(&mut client).await);
        assert_eq!(rig.near.records(1).await[0]["close"], "identity_refused");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn connection_to_a_peer_without_tunnels_is_refused() {
    let (rig, route) = Rig::new().await;
    rig.near.change(|plan| {
        plan.peers.get_mut(&addr(SERVER)).unwrap().flags = Peer::POD;
    });
    let mut client = rig.connect(&route).await;
    assert!(is_reset(&mut client).await);
    assert_eq!(rig.near.records(1).await[0]["close"], "not_tunnelled");
    assert_eq!(rig.net.dialled.load(Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn refusing_application_is_a_reset_with_its_cause() {
    let (rig, Route { to, application }) = Rig::new().await;
    drop(application);
    let application = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = rig.connect(&Route { to, application }).await;
    assert!(is_reset(&mut client).await);
    for node in [&rig.near, &rig.far] {
        let record = &node.records(1).await[0];
        assert_eq!(
            (&record["close"], &record["cause"]),
            (&"connect_failed".into(), &"refused".into())
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn missing_certificate_has_its_own_reason() {
    let (rig, route) = Rig::with(Timing {
        certificate: Duration::from_millis(50),
        ..timing()
    })
    .await;
    rig.near.change(|plan| {
        plan.pods.get_mut("client").unwrap().service_account = "unissued".to_owned();
    });
    let mut client = rig.connect(&route).await;
    assert!(is_reset(&mut client).await);
    let reason = Reason::NoCertificate.label();
    assert_eq!(rig.near.records(1).await[0]["close"], reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn captured_connections_are_bounded_per_pod() {
    let (rig, route) = Rig::with(Timing {
        captured_per_pod: 3,
        ..timing()
    })
    .await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(rig.pair(&route).await);
    }
    let mut one_more = rig.connect(&route).await;
    assert!(is_reset(&mut one_more).await);
    open.pop();
    rig.near.records(1).await;
    open.push(rig.pair(&route).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn agent_restart_costs_idle_tunnels_only() {
    let (mut rig, route) = Rig::new().await;
    for round in 1..=4 {
        exchange(&rig, &route).await;
        rig.near.records(round).await;
        rig.restart_far().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn refused_tcp_connect_is_retried() {
    let (rig, route) = Rig::new().await;
    rig.net.refuse.store(4, Relaxed);
    exchange(&rig, &route).await;
    assert_eq!(rig.net.dialled.load(Relaxed), 5);

    let (rig, route) = Rig::new().await;
    rig.net.refuse.store(1000, Relaxed);
    let begun = std::time::Instant::now();
    let mut client = rig.connect(&route).await;
    assert!(is_reset(&mut client).await);
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert_eq!(rig.near.records(1).await[0]["close"], "peer_unreachable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn silent_refusals_are_held_open_within_a_bound() {
    let (rig, route) = Rig::with(Timing {
        silence: Duration::from_secs(5),
        silent_per_pod: 1,
        ..timing()
    })
    .await;
    rig.far.change(|plan| {
        isolate(plan);
        plan.pods.get_mut("server").unwrap().view.flags |= PodState::SILENT;
    });
    let mut held = rig.connect(&route).await;
    held.write_all(b"hello").await.unwrap();
    // The record and the metrics are written at once; only the client sees silence.
    let refused = Reason::DefaultDeny.label();
    assert_eq!(rig.near.records(1).await[0]["close"], refused);
    assert_eq!(rig.far.records(1).await[0]["close"], refused);
    let mut one_more = rig.connect(&route).await;
    assert!(is_reset(&mut one_more).await);
    let nothing = tokio::time::timeout(Duration::from_millis(300), held.read(&mut [0])).await;
    assert!(nothing.is_err(), "{nothing:?}");
    assert!(is_reset(&mut held).await);
    for result in ["held", "limit"] {
        let series = format!("mesh_policy_silent_refusals_total{{result=\"{result}\"}}");
        assert_eq!(rig.near.counted(&series, 1).await, 1, "{result}");
    }
    // The slot is free again.
    let mut again = rig.connect(&route).await;
    let nothing = tokio::time::timeout(Duration::from_millis(300), again.read(&mut [0])).await;
    assert!(nothing.is_err(), "{nothing:?}");
    // Without silence the same refusal is a reset.
    rig.far.change(|plan| {
        plan.pods.get_mut("server").unwrap().view.flags &= !PodState::SILENT;
    });
    let mut told = rig.connect(&route).await;
    assert!(is_reset(&mut told).await);
}

/// A missing policy is a failure and not a refusal by policy: the client gets a reset at once, even from
/// a pod that refuses silently.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn refusal_without_policy_is_not_silent() {
    let (rig, route) = Rig::with(Timing {
        silence: Duration::from_secs(60),
        ..timing()
    })
    .await;
    rig.far.change(|plan| {
        let view = &mut plan.pods.get_mut("server").unwrap().view;
        view.set = PolicySetId::ISOLATED;
        view.flags |= PodState::SILENT;
    });
    let mut client = rig.connect(&route).await;
    client.write_all(b"hello").await.unwrap();
    assert!(is_reset(&mut client).await);
    let missing = Reason::PolicyMissing.label();
    assert_eq!(rig.near.records(1).await[0]["close"], missing);
    assert_eq!(rig.far.records(1).await[0]["close"], missing);
}
