// SPDX-License-Identifier: Apache-2.0
//! An unreachable endpoint is replaced by another one of the service, and a tunnel is reused only for the
//! same pods under the same policy.

use std::net::SocketAddr;

use mesh_common::policy::{PolicySetId, SetHead};
use mesh_common::service::{BackendKey, BackendListId, Service, ServiceKey};
use mesh_common::{Endpoint, Protocol};
use mesh_plan::Plan;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::super::*;
use super::rig::*;

const LIST: BackendListId = BackendListId(7);

/// Makes these endpoints the service of every captured connection.
fn serve(rig: &Rig, endpoints: &[SocketAddr]) {
    let service = Service {
        backends: LIST,
        count: u32::try_from(endpoints.len()).unwrap(),
        flags: 0,
    };
    let backends = (0..).zip(endpoints).map(|(index, at)| {
        let key = BackendKey {
            list: LIST,
            index,
            pad: 0,
        };
        (key, Endpoint::from(*at))
    });
    let backends: Vec<_> = backends.collect();
    rig.near.change(|plan| {
        plan.services
            .insert(ServiceKey::new(at("10.96.0.1:80"), Protocol::TCP), service);
        plan.backends.extend(backends);
    });
}

/// Another port of the server's pod, and the application that listens there.
async fn application(rig: &Rig) -> (SocketAddr, TcpListener) {
    let any: SocketAddr = format!("{SERVER}:0").parse().unwrap();
    let listener = TcpListener::bind(rig.net.application(any)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (SocketAddr::new(any.ip(), port), listener)
}

/// Ports of the server's pod without a listener.
async fn closed(rig: &Rig, count: usize) -> Vec<SocketAddr> {
    let mut ports = Vec::new();
    for _ in 0..count {
        ports.push(application(rig).await);
    }
    ports.into_iter().map(|(at, _listener)| at).collect()
}

async fn question_and_answer(client: &mut tokio::net::TcpStream, listener: &TcpListener) {
    client.write_all(b"question").await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    let mut question = [0; 8];
    server.read_exact(&mut question).await.unwrap();
    assert_eq!(&question, b"question");
    server.write_all(b"answer").await.unwrap();
    let mut answer = [0; 6];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"answer");
}

fn port(record: &Value) -> u64 {
    record["destination"]["port"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unreachable_application_is_replaced_by_another_endpoint() {
    let (rig, mut route) = Rig::new().await;
    let (second, listener) = application(&rig).await;
    serve(&rig, &[route.to, second]);
    drop(std::mem::replace(
        &mut route.application,
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
    ));
    let mut client = rig.connect(&route).await;
    question_and_answer(&mut client, &listener).await;
    drop(client);
    let near = &rig.near.records(1).await[0];
    assert_eq!(near["close"], "finished");
    assert_eq!(near["bytes_sent"], 8);
    assert_eq!(port(near), u64::from(second.port()));
    let far = rig.far.records(2).await;
    let closes: Vec<_> = far.iter().map(|r| r["close"].as_str().unwrap()).collect();
    assert_eq!(closes, ["connect_failed", "finished"]);
    let retried = "mesh_tcp_connections_retried_total{reason=\"connect_failed\"}";
    assert_eq!(rig.near.counted(retried, 1).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unreachable_agent_is_not_awaited_if_another_endpoint_exists() {
    let (rig, route) = Rig::new().await;
    let (second, listener) = application(&rig).await;
    serve(&rig, &[route.to, second]);
    rig.net.refuse.store(1, Relaxed);
    let mut client = rig.connect(&route).await;
    question_and_answer(&mut client, &listener).await;
    assert_eq!(rig.net.dialled.load(Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn at_most_two_other_endpoints_are_tried() {
    let (rig, mut route) = Rig::new().await;
    let others = closed(&rig, 6).await;
    serve(&rig, &[&[route.to][..], &others].concat());
    drop(std::mem::replace(
        &mut route.application,
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
    ));
    let mut client = rig.connect(&route).await;
    client.write_all(b"question").await.unwrap();
    assert!(is_reset(&mut client).await);
    let near = &rig.near.records(1).await[0];
    assert_eq!(near["close"], "connect_failed");
    let far = rig.far.records(3).await;
    let mut ports: Vec<_> = far.iter().map(port).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 3, "{far:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn policy_denial_is_not_retried_elsewhere() {
    let (rig, route) = Rig::new().await;
    let (second, _listener) = application(&rig).await;
    serve(&rig, &[route.to, second]);
    rig.far.change(|plan| {
        let head = SetHead {
            flags: SetHead::ISOLATED_INGRESS,
            ..SetHead::default()
        };
        plan.sets.insert(PolicySetId(5), head);
        plan.pods.get_mut("server").unwrap().view.set = PolicySetId(5);
    });
    let mut client = rig.connect(&route).await;
    assert!(is_reset(&mut client).await);
    assert_eq!(rig.near.records(1).await[0]["close"], "default_deny");
    rig.far.records(1).await;
}

/// A change between two connections.
type Change = fn(&mut Plan);

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn tunnel_is_reused_by_the_same_pods_under_the_same_policy_only() {
    let (rig, route) = Rig::new().await;
    let changes: [(&str, Change, usize); 5] = [
        ("the first", |_| {}, 1),
        ("nothing", |_| {}, 1),
        (
            "the policy",
            |plan| {
                plan.sets.insert(PolicySetId(5), SetHead::default());
                plan.pods.get_mut("client").unwrap().view.set = PolicySetId(5);
            },
            2,
        ),
        (
            "the pod",
            |plan| {
                let workload = plan.names.workloads.get_mut(&addr(SERVER)).unwrap();
                std::sync::Arc::make_mut(workload).uid = "another".into();
            },
            3,
        ),
        (
            "what the pod is to policy",
            |plan| {
                let peer = plan.peers.get_mut(&addr(SERVER)).unwrap();
                peer.id = mesh_common::IdentityId(2000);
            },
            4,
        ),
    ];
    for (round, (what, change, dialled)) in (1..).zip(changes) {
        rig.near.change(change);
        let mut client = rig.connect(&route).await;
        question_and_answer(&mut client, &route.application).await;
        drop(client);
        rig.near.records(round).await;
        assert_eq!(rig.net.dialled.load(Relaxed), dialled, "{what}");
    }
}
