// SPDX-License-Identifier: Apache-2.0
//! Open connections while policy, pods or the agent change.

use mesh_common::policy::{PolicySetId, SetHead};
use mesh_plan::Plan;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::super::*;
use super::rig::*;

/// A policy that refuses everything in one direction.
fn isolate(pod: &'static str, flags: u32) -> impl FnOnce(&mut Plan) {
    move |plan| {
        let set = PolicySetId(9);
        let head = SetHead {
            flags,
            ..SetHead::default()
        };
        plan.sets.insert(set, head);
        plan.pods.get_mut(pod).unwrap().view.set = set;
    }
}

async fn closes(rig: &Rig) -> [String; 2] {
    labels(rig, "close")
        .await
        .map(|label| label.expect("close"))
}

/// Returns a field of the records of both ends.
async fn labels(rig: &Rig, field: &str) -> [Option<String>; 2] {
    let label = |record: &serde_json::Value| record[field].as_str().map(str::to_owned);
    let near = rig.near.records(1).await;
    let far = rig.far.records(1).await;
    [label(&near[0]), label(&far[0])]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn policy_change_ends_denied_connections_from_either_end() {
    for outgoing in [true, false] {
        let (rig, route) = Rig::new().await;
        let (mut client, mut server) = rig.pair(&route).await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        // An unrelated change leaves the connection open.
        rig.near.change(|plan| plan.pod_cidrs.clear());
        server.write_all(b"y").await.unwrap();
        client.read_u8().await.unwrap();
        if outgoing {
            rig.near.change(isolate("client", SetHead::ISOLATED_EGRESS));
        } else {
            rig.far.change(isolate("server", SetHead::ISOLATED_INGRESS));
        }
        assert!(is_reset(&mut client).await);
        assert!(is_reset(&mut server).await);
        assert_eq!(closes(&rig).await, ["policy_changed", "policy_changed"]);
        // The deciding end records its rule; the other end cannot know it.
        let decided = Some("default_deny".to_owned());
        let by = if outgoing {
            [decided, None]
        } else {
            [None, decided]
        };
        assert_eq!(labels(&rig, "ended_by").await, by);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn deleted_pod_ends_its_connections() {
    for near in [true, false] {
        let (rig, route) = Rig::new().await;
        let (mut client, mut server) = rig.pair(&route).await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        let node = if near { &rig.near } else { &rig.far };
        let pod = Arc::downgrade(node.in_force.borrow().pods.values().next().unwrap());
        node.in_force
            .send_modify(|now| Arc::make_mut(now).pods = Arc::default());
        assert!(is_reset(&mut client).await);
        assert!(is_reset(&mut server).await);
        assert_eq!(closes(&rig).await, ["pod_deleted", "pod_deleted"]);
        // A handle keeps the namespace alive.
        let until = std::time::Instant::now() + Duration::from_secs(1);
        while pod.strong_count() > 0 {
            assert!(std::time::Instant::now() < until, "the pod is held");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn draining_agent_waits_for_connections_and_then_resets_them() {
    let (rig, route) = Rig::new().await;
    let (mut client, mut server) = rig.pair(&route).await;
    let (mut kept, mut kept_far) = rig.pair(&route).await;
    rig.near.proxy.drain();
    client.write_all(b"still here").await.unwrap();
    client.shutdown().await.unwrap();
    let mut heard = String::new();
    server.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "still here");
    drop(server);
    rig.near.records(1).await;
    let proxy = rig.near.proxy;
    let still_open = tokio::time::timeout(Duration::from_millis(100), proxy.drained()).await;
    assert!(still_open.is_err());
    proxy.finish().await;
    assert!(is_reset(&mut kept).await);
    assert!(is_reset(&mut kept_far).await);
    let closes: Vec<_> = rig.far.records(2).await;
    assert_eq!(closes[0]["close"], "finished");
    assert_eq!(closes[1]["close"], "agent_shutdown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn reset_is_recorded_with_its_side() {
    let (rig, route) = Rig::new().await;
    let (mut client, mut server) = rig.pair(&route).await;
    client.write_all(b"x").await.unwrap();
    server.read_u8().await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    assert!(is_reset(&mut server).await);
    for (node, by) in [(&rig.near, "local"), (&rig.far, "remote")] {
        let record = &node.records(1).await[0];
        assert_eq!(
            (&record["close"], &record["closed_by"]),
            (&"reset".into(), &by.into())
        );
    }
}
