// SPDX-License-Identifier: Apache-2.0
//! The checks of the demo. None relies on the agent's own report where the agent is under test.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Demo, Evidence, Line, POSTGRES_PORT, REDIS_PORT, WEB_PORT, service};
use crate::agent::Agent;
use crate::apps::Request;
use crate::mesh::{TUNNEL_PORT, sum};
use crate::pod::Pod;
use crate::process::{Cmd, Output};
use crate::wait::eventually;

/// Deadline for programs that have nothing to wait for.
const SOON: Duration = Duration::from_secs(10);
/// Limit for "at once": far below any timeout and the retransmission of a lost SYN (1 s).
const AT_ONCE: Duration = Duration::from_millis(900);
/// First bytes of a TLS handshake record: its type, and the major version.
const TLS_HANDSHAKE: &[u8] = &[22, 3];
/// Number of requests that the metrics must count.
const COUNTED: u32 = 10;

/// All checks in the order of the demo.
pub const LINES: &[Line] = &[
    Line {
        title: "requests to Services cross nodes in mutual TLS tunnels",
        check: requests,
    },
    Line {
        title: "traffic between the nodes is encrypted",
        check: wire,
    },
    Line {
        title: "applications see their client's own address and port",
        check: addresses,
    },
    Line {
        title: "a denied client is refused at once; the flow record names the rule and the client",
        check: denied,
    },
    Line {
        title: "a client outside the mesh is refused where mutual TLS is required",
        check: plaintext,
    },
    Line {
        title: "connections on one node bypass the proxy, and policy is still enforced",
        check: same_node,
    },
    Line {
        title: "metrics count connections by workload and by security",
        check: scrape,
    },
];

/// Returns the IPv4 and IPv6 addresses of a pod with a port.
fn ends(pod: &Pod, port: u16) -> [SocketAddr; 2] {
    [(pod.v4(), port).into(), (pod.v6(), port).into()]
}

/// Summarizes how a program exited in a few words.
fn short(output: &Output) -> String {
    let said = if output.stdout.is_empty() {
        String::from_utf8_lossy(&output.stderr).into_owned()
    } else {
        output.text()
    };
    let line = said.lines().next().unwrap_or_default();
    let code = output
        .status
        .code()
        .map_or("signal".to_owned(), |code| code.to_string());
    format!("exit {code}: {line}")
}

/// Waits for a server's log line of the request with `word`; it is written after the answer.
fn logged(requests: impl Fn() -> Result<Vec<Request>>, word: &str) -> Result<Request> {
    eventually(&format!("a request with {word} in the log"), SOON, || {
        let requests = requests().ok()?;
        requests
            .into_iter()
            .find(|request| request.line.contains(word))
    })
}

fn requests(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let client = demo.pod("client");
    for web in service::WEB {
        let item = demo.word();
        let url = format!("http://{web}/order?item={item}");
        let output = client.curl(&url)?.ok().context("the client's curl")?;
        let answer: Value = output.json()?;
        ensure!(answer["item"] == item.as_str(), "{url} answered {answer}");
        let at_app = logged(|| demo.app.requests(), &item)?;
        ensure!(at_app.status == 200, "the application logged {at_app:?}");
        seen.add(format_args!("client$ curl {url}"));
        seen.add(format_args!("  {}", short(&output)));
    }
    let hops = [
        ("client", "web"),
        ("web", "app"),
        ("app", "redis"),
        ("app", "postgres"),
    ];
    for (from, to) in hops {
        let (from, to) = (demo.pod(from), demo.pod(to));
        let ends = ends(&to, TUNNEL_PORT);
        let sockets = from.tcp_sockets()?;
        let tunnel = sockets.iter().find(|socket| {
            let remote = socket.remote.is_some_and(|remote| ends.contains(&remote));
            socket.state == "ESTAB" && remote
        });
        let name = from.name();
        let tunnel = tunnel.and_then(|socket| Some((socket.local?, socket.remote?)));
        let (local, remote) =
            tunnel.with_context(|| format!("ss in {name} shows no tunnel to {}", to.name()))?;
        seen.add(format_args!(
            "{name} ({})$ ss: {local} -> {remote}, a tunnel to {} ({})",
            from.node().name(),
            to.name(),
            to.node().name()
        ));
    }
    Ok(seen)
}

fn wire(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let (client, web) = (demo.pod("client"), demo.pod("web"));
    let mut words = Vec::new();
    for to in ends(&web, WEB_PORT) {
        let word = demo.word();
        // The order may fail; only the transmission of its bytes matters here.
        let _answer = client.curl(&format!("http://{to}/order?item={word}"))?;
        logged(|| demo.web.requests(), &word)?;
        words.push(word);
    }
    let captured = demo.capture.so_far()?;
    captured.complete()?;
    for word in &words {
        let hits = captured.find(word.as_bytes())?;
        if let Some(hit) = hits.first() {
            bail!("{word} crossed the wire in clear: {hit:?}");
        }
    }
    let frames = captured.frames().count();
    let searched = words.join(" or ");
    seen.add(format_args!(
        "{frames} frames between the nodes: none has {searched} in it"
    ));
    let members: BTreeSet<IpAddr> = demo
        .pods()
        .filter(|pod| pod.namespace() != "outside")
        .flat_map(|pod| pod.addresses().to_vec())
        .collect();
    let own: Vec<_> = captured
        .flows()
        .filter(|flow| members.contains(&flow.src.ip()) && members.contains(&flow.dst.ip()))
        .collect();
    let stray = own
        .iter()
        .find(|flow| flow.src.port() != TUNNEL_PORT && flow.dst.port() != TUNNEL_PORT);
    ensure!(stray.is_none(), "beside tunnels there was {stray:?}");
    let begun: Vec<_> = own.iter().filter(|flow| flow.syns > 0).collect();
    ensure!(!begun.is_empty(), "no tunnel was opened");
    for flow in &begun {
        let mut payloads = captured.packets().filter(|packet| {
            packet.endpoints() == Some((flow.src, flow.dst)) && !packet.payload.is_empty()
        });
        let first = payloads.next().context("a tunnel carried nothing")?;
        ensure!(
            first.payload.starts_with(TLS_HANDSHAKE),
            "{flow:?} does not begin with a TLS handshake: {:02x?}",
            first.payload.get(..8)
        );
    }
    seen.add(format_args!(
        "only TCP to port {TUNNEL_PORT}: {} connections, each begins with a TLS handshake",
        begun.len()
    ));
    Ok(seen)
}

fn addresses(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let (client, web) = (demo.pod("client"), demo.pod("web"));
    for service in service::WEB {
        let word = demo.word();
        let url = format!("http://{service}/order?item={word}");
        let format = "%{local_ip} %{local_port}";
        let cmd = Cmd::new("curl").args(["-sSg", "--max-time", "5", "-o", "/dev/null"]);
        let output = client.run(cmd.args(["-w", format, &url]), SOON)?.ok()?;
        let said = output.text();
        let (ip, port) = said.split_once(' ').context("curl's own address")?;
        let own = SocketAddr::new(ip.parse()?, port.parse()?);
        ensure!(
            client.addresses().contains(&own.ip()),
            "curl had the address {own}"
        );
        let at_web = logged(|| demo.web.requests(), &word)?;
        ensure!(at_web.client == own, "curl was {own}, nginx saw {at_web:?}");
        let captured = demo.capture.so_far()?;
        captured.complete()?;
        let direct = captured
            .flows()
            .find(|flow| flow.src == own || flow.dst == own);
        ensure!(
            direct.is_none(),
            "the connection itself crossed the wire: {direct:?}"
        );
        seen.add(format_args!(
            "curl was {own}, nginx logged {own}; on the wire nobody used that port"
        ));
        let at_app = logged(|| demo.app.requests(), &word)?;
        ensure!(
            web.addresses().contains(&at_app.client.ip()),
            "the application saw {at_app:?}"
        );
        seen.add(format_args!(
            "nginx is {}, the application logged {}",
            at_app.client.ip(),
            at_app.client
        ));
    }
    Ok(seen)
}

/// Returns the flow record in which `agent` explains why `server` refused `client`.
fn refusal(agent: &Agent, client: &Pod, server: &Pod) -> Result<Value> {
    eventually("a record of the refusal", SOON, || {
        let flows = agent.flows().ok()?;
        flows.into_iter().rev().find(|flow| {
            flow["verdict"] == "denied"
                && flow["source"]["pod"] == client.name()
                && flow["destination"]["pod"] == server.name()
        })
    })
}

fn denied(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let redis = demo.pod("redis");
    for name in ["intruder", "insider"] {
        let intruder = demo.pod(name);
        for to in ends(&redis, REDIS_PORT) {
            let (host, port) = (to.ip().to_string(), to.port().to_string());
            let cmd = Cmd::new("redis-cli").args(["-h", &host, "-p", &port, "PING"]);
            let begun = Instant::now();
            let output = intruder.run(cmd, SOON)?;
            let took = begun.elapsed();
            // redis-cli exits with 0 for some errors.
            ensure!(
                !output.text().contains("PONG"),
                "{name} was served: {output}"
            );
            ensure!(took < AT_ONCE, "{name} was refused only after {took:?}");
            let node = intruder.node().name();
            seen.add(format_args!("{name} ({node})$ redis-cli -h {host} PING"));
            seen.add(format_args!(
                "  {} ({} ms)",
                short(&output),
                took.as_millis()
            ));
        }
        let record = refusal(demo.agent_of(&redis), &intruder, &redis)?;
        let (reason, rule) = (&record["reason"], &record["rule"]);
        let named = rule.as_str().is_some_and(|rule| rule.contains("redis"));
        ensure!(named, "the record names no rule for Redis: {record}");
        // The identity is proven by more than an address: a certificate, or a pod of the same node.
        let (evidence, proof) = (
            &record["evidence"],
            if name == "insider" { "node" } else { "tls" },
        );
        ensure!(
            evidence == proof,
            "the record has no proof of who it was: {record}"
        );
        let who = record["peer_identity"]
            .as_str()
            .unwrap_or("a pod of this node");
        seen.add(format_args!(
            "  record: reason {reason}, rule {rule}, peer {who} ({proof})"
        ));
    }
    Ok(seen)
}

fn plaintext(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let (postgres, plain, client) = (demo.pod("postgres"), demo.pod("plain"), demo.pod("client"));
    for to in ends(&postgres, POSTGRES_PORT) {
        let select = |from: &Pod| {
            let (host, port) = (to.ip().to_string(), to.port().to_string());
            let cmd = Cmd::new("psql").args(["-h", &host, "-p", &port, "-U", "postgres"]);
            from.run(cmd.args(["-tAc", "SELECT 4711"]), SOON)
        };
        let begun = Instant::now();
        let output = select(&plain)?;
        let took = begun.elapsed();
        ensure!(!output.status.success(), "plain was served: {output}");
        ensure!(took < AT_ONCE, "plain was refused only after {took:?}");
        seen.add(format_args!(
            "plain$ psql -h {} ...: {}",
            to.ip(),
            short(&output)
        ));
        let output = select(&client)?.ok().context("the member of the mesh")?;
        seen.add(format_args!(
            "client$ psql -h {} ...: {}",
            to.ip(),
            short(&output)
        ));
    }
    let record = refusal(demo.agent_of(&postgres), &plain, &postgres)?;
    seen.add(format_args!(
        "both are `app: client`, whom policy allows; record: reason {}",
        record["reason"]
    ));
    Ok(seen)
}

/// Opens a long-lived connection from `from` to the front end; returns it and the client's address.
fn hold(from: &Pod, to: SocketAddr) -> Result<(crate::process::Proc, SocketAddr)> {
    let probe = from.start_probe(&format!("tcp --to {to} --no-id --stay-ms 20000"))?;
    let own = eventually("an open connection", SOON, || {
        let sockets = from.tcp_sockets().ok()?;
        let open = |state: &str| state == "ESTAB";
        sockets
            .into_iter()
            .find(|socket| open(&socket.state) && socket.remote == Some(to))?
            .local
    })?;
    Ok((probe, own))
}

/// Counts the sockets in a pod whose local address is `end`: the application's, and those of an
/// agent that proxies for it.
fn own_ends(pod: &Pod, end: SocketAddr) -> Result<usize> {
    let sockets = pod.tcp_sockets()?;
    Ok(sockets
        .iter()
        .filter(|socket| socket.local == Some(end) && socket.remote.is_some())
        .count())
}

fn tunnels(pod: &Pod) -> Result<usize> {
    let port = |end: Option<SocketAddr>| end.is_some_and(|end| end.port() == TUNNEL_PORT);
    let sockets = pod.tcp_sockets()?;
    Ok(sockets
        .iter()
        .filter(|socket| port(socket.local) || port(socket.remote))
        .filter(|socket| socket.state == "ESTAB")
        .count())
}

fn same_node(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let (near, far, web) = (demo.pod("neighbour"), demo.pod("client"), demo.pod("web"));
    for to in ends(&web, WEB_PORT) {
        let before = tunnels(&near)?;
        let (_held, own) = hold(&near, to)?;
        let at_web = |end: SocketAddr| {
            eventually("the server's end", SOON, || {
                let sockets = web.tcp_sockets().ok()?;
                let server = |socket: &crate::sockets::TcpSocket| {
                    socket.remote == Some(end) && socket.state == "ESTAB"
                };
                sockets.iter().any(server).then_some(())
            })
        };
        at_web(own)?;
        let (in_the_middle, after) = (own_ends(&web, own)?, tunnels(&near)?);
        ensure!(
            in_the_middle == 0 && after == before,
            "an agent stands between: {in_the_middle} sockets, {before} then {after} tunnels"
        );
        seen.add(format_args!(
            "web$ ss: {own} -> {to}, nobody in between; tunnels of neighbour: {after}"
        ));
        // For comparison: a proxied connection, for which ss shows the agent's socket.
        let (_held, own) = hold(&far, to)?;
        at_web(own)?;
        ensure!(
            own_ends(&web, own)? == 1,
            "of the connection from the other node ss shows no agent's end"
        );
        seen.add(format_args!(
            "  (of {own}, on the other node, ss shows the agent's end, too)"
        ));
    }
    let insider = demo.pod("insider");
    let output = insider.curl(&format!("http://{}/", ends(&web, WEB_PORT)[0]))?;
    ensure!(
        output.status.code() == Some(7),
        "insider was not refused: {output}"
    );
    seen.add(format_args!("insider$ curl web: {}", short(&output)));
    Ok(seen)
}

/// Fetches the metrics page with curl on the agent's node.
fn page(agent: &Agent) -> Result<String> {
    let cmd = Cmd::line("curl -sSf --max-time 5 http://127.0.0.1:15020/metrics");
    Ok(agent.node().run(cmd, SOON)?.ok()?.text())
}

fn scrape(demo: &Demo) -> Result<Evidence> {
    let mut seen = Evidence::default();
    let (client, web) = (demo.pod("client"), demo.pod("web"));
    let count = |reporter: &str| -> Result<f64> {
        let pod = if reporter == "source" { &client } else { &web };
        Ok(sum(
            &page(demo.agent_of(pod))?,
            "mesh_tcp_connections_closed_total",
            &[
                ("reporter", reporter),
                ("source_namespace", "clients"),
                ("source_workload", "client"),
                ("destination_namespace", "shop"),
                ("destination_workload", "web"),
                ("security", "mutual_tls"),
            ],
        ))
    };
    for reporter in ["source", "destination"] {
        let before = count(reporter)?;
        for _ in 0..COUNTED {
            client.curl(&format!("http://{}/", service::WEB[0]))?.ok()?;
        }
        let expected = before + f64::from(COUNTED);
        let mut last = before;
        eventually("the metrics to follow", SOON, || {
            last = count(reporter).ok()?;
            (last >= expected).then_some(())
        })
        .with_context(|| format!("{before} before, then {last}"))?;
        ensure!(
            last <= expected,
            "{before} before {COUNTED} requests, then {last}"
        );
        seen.add(format_args!(
            "{COUNTED} requests; {reporter}'s node: {COUNTED} more of \
             mesh_tcp_connections_closed_total{{clients/client -> shop/web, mutual_tls}}"
        ));
    }
    let text = page(demo.agent_of(&web))?;
    let denied = sum(
        &text,
        "mesh_policy_verdicts_total",
        &[("verdict", "denied")],
    );
    let left = text
        .lines()
        .filter(|line| line.starts_with("mesh_certificate_expiry_timestamp_seconds{"))
        .count();
    ensure!(left > 0, "no certificate is counted");
    seen.add(format_args!(
        "node 2: {denied} refusals, {left} certificates, {} samples in all",
        text.lines().filter(|line| !line.starts_with('#')).count()
    ));
    Ok(seen)
}
