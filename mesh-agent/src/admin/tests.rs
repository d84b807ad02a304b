// SPDX-License-Identifier: Apache-2.0
//! The admin interface over real sockets.

use std::os::unix::fs::PermissionsExt as _;

use mesh_telemetry::flows::{Flows, Target};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use super::*;

struct Rig {
    dir: tempfile::TempDir,
    metrics: SocketAddr,
    admin: SocketAddr,
    views: Views,
    stop: watch::Sender<bool>,
    served: tokio::task::JoinHandle<()>,
    _flows: Flows,
}

/// A policy with a peer that the mesh does not support.
fn unsupported_policy() -> mesh_plan::ClusterSnapshot {
    use mesh_plan::cluster::{ObjectRef, PeerMatch, Policy, Rule, RuleAction, Subject, Tier};
    let rule = Rule {
        name: "egress[0]".to_owned(),
        action: RuleAction::Allow,
        peers: Some(vec![PeerMatch::Nothing {
            what: "spec.egress[0].to[0].domainNames".to_owned(),
        }]),
        ports: None,
    };
    let policy = Policy {
        tier: Tier::Namespaced,
        subject: Subject::WholeNamespace("shop".to_owned()),
        ingress: None,
        egress: Some(vec![rule]),
        audit: false,
    };
    let object = ObjectRef::new("ClusterNetworkPolicy", "", "names");
    mesh_plan::ClusterSnapshot {
        policies: [(object, policy.into())].into_iter().collect(),
        ..mesh_plan::ClusterSnapshot::default()
    }
}

fn views(flows: &Flows) -> Views {
    let metrics = Metrics::new();
    Views {
        node: "n1".to_owned(),
        metrics,
        snapshots: watch::channel(Arc::new(unsupported_policy())).1,
        in_force: watch::channel(Arc::default()).1,
        plan_text: |plan| format!("{} services\n", plan.services.len()),
        rejections: watch::channel(Arc::new(vec![Rejection {
            object: mesh_plan::cluster::ObjectRef::new("NetworkPolicy", "shop", "web"),
            field: "spec.ingress".to_owned(),
            why: "odd".to_owned(),
            consequence: "isolates".to_owned(),
        }]))
        .1,
        source: watch::channel(Arc::new(Report {
            warnings: vec![mesh_api::Warning {
                object: mesh_plan::cluster::ObjectRef::new("Service", "shop", "web"),
                field: String::new(),
                what: "odd".to_owned(),
            }],
            ..Report::default()
        }))
        .1,
        cni_conflicts: watch::channel(Arc::default()).1,
        datapath: None,
        flows: flows.sink(),
        level: None,
    }
}

/// A loopback port that is free now.
fn free() -> SocketAddr {
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    probe.local_addr().unwrap()
}

impl Rig {
    fn new() -> Self {
        let flows = Flows::start(&Target::Off, &Metrics::new()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let views = views(&flows);
        let admin = free();
        let addresses = [
            AdminAddr::Unix(dir.path().join("agent.sock")),
            AdminAddr::Tcp(admin),
        ];
        let bound = Admin::bind(
            ["127.0.0.1:0".parse().unwrap(); 2],
            &addresses,
            views.clone(),
        )
        .unwrap();
        let (stop, stopped) = watch::channel(false);
        Self {
            dir,
            metrics: bound.metrics_addr(),
            admin,
            views,
            served: tokio::spawn(bound.serve(stopped)),
            stop,
            _flows: flows,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    async fn public(&self, request: &str) -> String {
        ask(TcpStream::connect(self.metrics).await.unwrap(), request).await
    }

    async fn local(&self, request: &str) -> String {
        ask(TcpStream::connect(self.admin).await.unwrap(), request).await
    }

    async fn root(&self, request: &str) -> String {
        ask(UnixStream::connect(self.socket()).await.unwrap(), request).await
    }
}

/// Sends `METHOD PATH` (and a body behind a blank), and returns status line and body.
async fn ask<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, request: &str) -> String {
    let mut parts = request.splitn(3, ' ');
    let (method, path) = (parts.next().unwrap(), parts.next().unwrap());
    let body = parts.next().unwrap_or("");
    let text = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    format!("{}\n{body}", head.lines().next().unwrap())
}

#[tokio::test]
async fn public_listener_serves_only_metrics_and_probes() {
    let rig = Rig::new();
    assert!(
        rig.public("GET /metrics")
            .await
            .contains("mesh_build_info{")
    );
    assert!(rig.public("GET /livez").await.starts_with("HTTP/1.1 200"));
    for page in [
        "/status",
        "/plan",
        "/pods",
        "/facts",
        "/connections",
        "/flows",
        "/log-level",
        "/",
    ] {
        let answer = rig.public(&format!("GET {page}")).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{page}: {answer}");
    }
    let answer = rig.public("POST /metrics").await;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
}

#[tokio::test]
async fn admin_socket_is_restricted_to_root() {
    let rig = Rig::new();
    let mode = std::fs::metadata(rig.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let status = rig.root("GET /status").await;
    assert!(
        status.contains("spec.egress[0].to[0].domainNames"),
        "{status}"
    );
    assert!(status.contains("\"warnings\""), "{status}");
    for part in [
        "\"node\": \"n1\"",
        "NetworkPolicy shop/web",
        "\"field\": \"spec.ingress\"",
    ] {
        assert!(status.contains(part), "{part}: {status}");
    }
    assert!(rig.root("GET /plan").await.ends_with("0 services\n"));
    assert!(rig.root("GET /pods").await.ends_with("[]\n"));
    assert!(rig.root("GET /flows").await.starts_with("HTTP/1.1 200"));
    assert!(rig.local("GET /status").await.starts_with("HTTP/1.1 200"));
    assert!(rig.root("GET /nothing").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn successor_takes_over_the_listeners() {
    let old = Rig::new();
    let flows = Flows::start(&Target::Off, &Metrics::new()).unwrap();
    let mut views = views(&flows);
    views.node = "successor".to_owned();
    let addresses = [AdminAddr::Unix(old.socket())];
    let bound = Admin::bind(
        [old.metrics, "127.0.0.1:0".parse().unwrap()],
        &addresses,
        views,
    )
    .unwrap();
    let (stop, stopped) = watch::channel(false);
    let served = tokio::spawn(bound.serve(stopped));
    assert!(old.root("GET /status").await.contains("successor"));
    old.stop.send_replace(true);
    old.served.await.unwrap();
    let answer = ask(
        UnixStream::connect(old.dir.path().join("agent.sock"))
            .await
            .unwrap(),
        "GET /status",
    )
    .await;
    assert!(
        answer.contains("successor"),
        "the old one must not remove the new one's socket"
    );
    let answer = ask(TcpStream::connect(old.metrics).await.unwrap(), "GET /livez").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    stop.send_replace(true);
    served.await.unwrap();
    let left = std::fs::read_dir(old.dir.path()).unwrap().count();
    assert_eq!(left, 0, "the socket file is left behind");
}

#[tokio::test]
async fn only_root_changes_the_log_level() {
    let mut rig = Rig::new();
    // The process has one set of logs; no other test makes it.
    let level = mesh_log::init(&mesh_config::LogConfig {
        format: mesh_config::LogFormat::Text,
        level: "warn".to_owned(),
    })
    .unwrap();
    rig.stop.send_replace(true);
    let (stop, stopped) = watch::channel(false);
    let mut views = rig.views.clone();
    views.level = Some(level);
    let addresses = [AdminAddr::Unix(rig.socket()), AdminAddr::Tcp(rig.admin)];
    let bound = Admin::bind(["127.0.0.1:0".parse().unwrap(); 2], &addresses, views).unwrap();
    (&mut rig.served).await.unwrap();
    rig.stop = stop;
    rig.served = tokio::spawn(bound.serve(stopped));
    assert!(rig.root("GET /log-level").await.ends_with("\nwarn\n"));
    assert!(
        rig.root("PUT /log-level error,mesh_agent::admin=warn")
            .await
            .starts_with("HTTP/1.1 200")
    );
    let level = rig.local("GET /log-level").await;
    assert!(level.contains("mesh_agent::admin=warn"), "{level}");
    assert!(
        rig.root("PUT /log-level mesh=loud")
            .await
            .starts_with("HTTP/1.1 400")
    );
    assert!(
        rig.local("PUT /log-level info")
            .await
            .starts_with("HTTP/1.1 403")
    );
    let long = format!("PUT /log-level {}", "x".repeat(5000));
    assert!(rig.root(&long).await.starts_with("HTTP/1.1 400"));
    assert!(
        rig.root("DELETE /log-level")
            .await
            .starts_with("HTTP/1.1 405")
    );
}
