// SPDX-License-Identifier: Apache-2.0
//! Long-lived connections during changes of the mesh, and how each of them ends.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Installed;
use crate::process::Proc;

/// Number of connections that are held open.
pub(super) const COUNT: usize = 10;

/// Script that holds connections open with a request on each every 50 ms and reports how they
/// ended.
const PROGRAM: &str = r#"
import json, os, socket, sys, threading, time
host, count = sys.argv[1], int(sys.argv[2])
ask = b"GET /front HTTP/1.1\r\nHost: web\r\n\r\n"
result = {"open": 0, "reset": 0, "closed": 0, "silent": 0, "requests": 0, "shortest_s": 1e9}
lock = threading.Lock()
begun = time.monotonic()
def hold(connection):
    requests, how = 0, "open"
    try:
        while not os.path.exists("/tmp/stop-open"):
            connection.sendall(ask)
            if not connection.recv(4096):
                how = "closed"
                break
            requests += 1
            time.sleep(0.05)
    except TimeoutError:
        how = "silent"
    except OSError:
        how = "reset"
    with lock:
        result[how] += 1
        result["requests"] += requests
        if how != "open":
            result["shortest_s"] = min(result["shortest_s"], time.monotonic() - begun)
connections = [socket.create_connection((host, 80), timeout=5) for _ in range(count)]
threads = [threading.Thread(target=hold, args=(one,)) for one in connections]
[thread.start() for thread in threads]
print("open", flush=True)
[thread.join() for thread in threads]
os.remove("/tmp/stop-open") if os.path.exists("/tmp/stop-open") else None
print(json.dumps(result), flush=True)
"#;

/// The outcome of the connections.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Fared {
    /// Number of connections that were reset.
    pub(super) reset: usize,
    /// Number of connections on which a request got no answer for 5 s.
    pub(super) silent: usize,
    /// Number of requests that were answered, over all connections.
    pub(super) requests: u64,
    /// Lifetime of the connection that ended first, in seconds.
    pub(super) shortest_s: f64,
}

/// Connections that a container holds open.
#[derive(Debug)]
pub(super) struct Held {
    process: Proc,
    namespace: String,
    target: String,
}

impl Held {
    /// Opens the connections from a container of a Deployment, and waits until all are open.
    pub(super) fn start(on: &Installed, from: (&str, &str), url: &str) -> Result<Self> {
        let (namespace, deployment) = from;
        let target = format!("deploy/{deployment}");
        let host = url.trim_start_matches("http://");
        let count = COUNT.to_string();
        let kube = on.cluster().kube();
        let exec = ["exec", "--namespace", namespace, &target, "--"];
        let program = ["python3", "-c", PROGRAM, host, &count];
        let cmd = kube.kubectl_cmd(exec.into_iter().chain(program))?;
        let process = kube.host().spawn_lines(cmd)?;
        let opened = process.line(Duration::from_secs(30))?;
        opened.context("the connections cannot be opened")?;
        Ok(Self {
            process,
            namespace: namespace.to_owned(),
            target,
        })
    }

    /// Closes the connections that are still open and returns the outcome of all.
    pub(super) fn end(self, on: &Installed) -> Result<Fared> {
        let stop = ["touch", "/tmp/stop-open"];
        let exec = ["exec", "--namespace", &self.namespace, &self.target, "--"];
        on.cluster().kube().kubectl(exec.into_iter().chain(stop))?;
        let said = self.process.line(Duration::from_secs(30))?;
        let said = said.context("the client program exited without a report")?;
        serde_json::from_str(&said).with_context(|| said.clone())
    }
}
