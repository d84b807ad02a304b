// SPDX-License-Identifier: Apache-2.0
//! The server over real sockets.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::metrics::Metrics;

struct Server {
    addr: SocketAddr,
    metrics: Metrics,
    _stop: watch::Sender<bool>,
}

impl Server {
    fn start() -> Self {
        let metrics = Metrics::new();
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let counted = metrics.clone();
        let page = move |format| counted.page(format);
        let probes = Probes::new(page, metrics.readiness().clone());
        tokio::spawn(serve(listener, probes, stopped));
        Self {
            addr,
            metrics,
            _stop: stop,
        }
    }

    async fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        let text = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        format!("{}\n{body}", head.lines().next().unwrap())
    }
}

#[tokio::test]
async fn readyz_lists_the_conditions() {
    let server = Server::start();
    let readiness = server.metrics.readiness().clone();
    let (plan, listeners) = (readiness.task("plan"), readiness.task("listeners"));
    plan.done();
    let answer = server.ask("GET /readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("[-] listeners: not yet\n[+] plan: ok\nnot ready"),
        "{answer}"
    );
    listeners.done();
    readiness.wait().await;
    assert!(server.ask("GET /readyz").await.starts_with("HTTP/1.1 200"));
    readiness.set("running", false);
    assert!(server.ask("GET /readyz").await.starts_with("HTTP/1.1 503"));
    let page = server.ask("GET /metrics").await;
    assert!(
        page.contains("mesh_ready{condition=\"running\"} 0"),
        "{page}"
    );
    // A task that dies never counts as done.
    drop(readiness.task("plan"));
    assert!(!readiness.is_ready());
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = Server::start();
    assert!(server.ask("GET /livez").await.starts_with("HTTP/1.1 200"));
    assert!(server.ask("GET /").await.starts_with("HTTP/1.1 404"));
    for path in ["/metrics", "/", "/log-level"] {
        let answer = server.ask(&format!("POST {path}")).await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{path}: {answer}");
    }
}

#[tokio::test]
async fn large_headers_and_idle_connections_are_bounded() {
    let server = Server::start();
    let large = format!("GET /livez?{}", "x".repeat(MAX_HEADER_BYTES));
    let answer = server.ask(&large).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    // The connections beyond the bound are served when the idle ones time out.
    tokio::time::pause();
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        idle.push(TcpStream::connect(server.addr).await.unwrap());
    }
    let answer = server.ask("GET /livez").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
