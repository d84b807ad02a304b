// SPDX-License-Identifier: Apache-2.0
//! Peers that may not have a tunnel, one by one: each connection is closed in time, is counted once
//! with its own reason, and no byte of it reaches an application. The peer is another implementation of
//! `mesh/1` with bad intentions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_common::Reason;
use mesh_test::authority::{authority, certificate, issue, revoke};
use mesh_test::mesh::{ENROLLED, TUNNEL_PORT, sum};
use mesh_test::{Agent, AgentConfig, Cmd, Lab, Pod, Proc, Topology, eventually};
use serde_json::{Value, json};

const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peer/hostile.py");
const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;
const HANDSHAKES: &str = "mesh_tls_handshakes_total";
const VERDICTS: &str = "mesh_policy_verdicts_total";
const FAILURES: &str = "mesh_tcp_connections_failed_total";
const VIOLATIONS: &str = "mesh_tunnel_violations_total";

/// Seconds that an attempt may take: one that is judged as soon as it is known, ...
const AT_ONCE: [f64; 2] = [0.0, 4.0];
/// ... one by who is not known, or not by this identity: that may change within 2 s, ...
const AFTER_A_WAIT: [f64; 2] = [1.5, 8.0];
const AFTER_TWO: [f64; 2] = [3.5, 12.0];
/// ... and one that ends with the deadline of handshakes, 5 s.
const AT_THE_DEADLINE: [f64; 2] = [4.5, 12.0];
/// The time within which a revocation must be enforced. Files are read every 2 s.
const REVOKED: Duration = Duration::from_secs(6);

/// The counters, by the names that this test uses.
type Counts = BTreeMap<String, f64>;

/// Returns the counters of an agent for incoming tunnels.
fn counts(agent: &Agent) -> Counts {
    let page = agent.metrics().expect("metrics");
    let families = [HANDSHAKES, VERDICTS, FAILURES, VIOLATIONS];
    let lines = page
        .lines()
        .filter(|line| families.iter().any(|name| line.starts_with(name)));
    let page: String = lines.flat_map(|line| [line, "\n"]).collect();
    let results = results(&page);
    let reasons = Reason::ALL.iter().map(|reason| reason.label());
    let handshakes = results.into_iter().map(|result| {
        let labels = [("role", "server"), ("result", result)];
        (
            format!("handshake {result}"),
            sum(&page, HANDSHAKES, &labels),
        )
    });
    let streams = reasons.flat_map(|reason| {
        let denied = [
            ("direction", "ingress"),
            ("verdict", "denied"),
            ("reason", reason),
        ];
        let failed = [("reporter", "destination"), ("reason", reason)];
        [
            (format!("denied {reason}"), sum(&page, VERDICTS, &denied)),
            (format!("failed {reason}"), sum(&page, FAILURES, &failed)),
        ]
    });
    let violations = sum(&page, VIOLATIONS, &[("role", "server")]);
    let violations = [("violation".to_owned(), violations)];
    handshakes.chain(streams).chain(violations).collect()
}

/// The values of the label `result` of all handshakes that the page counts.
fn results(page: &str) -> BTreeSet<&str> {
    let lines = page.lines().filter(|line| line.starts_with(HANDSHAKES));
    lines
        .filter_map(|line| line.split_once("result=\"")?.1.split('"').next())
        .collect()
}

/// The counters that have grown, and by how much. A counter appears on the page with its first event.
fn added(before: &Counts, now: &Counts) -> Counts {
    let more = |(name, now): (&String, &f64)| {
        let before = before.get(name).copied().unwrap_or_default();
        (name.clone(), now - before)
    };
    let all = now.iter().map(more);
    all.filter(|(_, more)| *more > 0.0).collect()
}

/// One attempt, and what is to come of it.
struct Row {
    name: &'static str,
    /// The arguments of `hostile.py` besides the addresses.
    how: Value,
    /// The pod that it comes from, or `outside`.
    from: &'static str,
    came: String,
    seconds: [f64; 2],
    counted: Counts,
    /// The bytes that the application receives, connection by connection.
    got: &'static [&'static str],
}

impl Row {
    fn new(name: &'static str, how: Value, came: &str, counted: &[&str]) -> Self {
        let mut sum = Counts::new();
        for name in counted {
            *sum.entry((*name).to_owned()).or_default() += 1.0;
        }
        Self {
            name,
            how,
            from: "a",
            came: came.to_owned(),
            seconds: AT_ONCE,
            counted: sum,
            got: &[],
        }
    }

    /// One that gets no further than the handshake.
    fn handshake(name: &'static str, how: Value, result: &str) -> Self {
        let counted = format!("handshake {result}");
        Self::new(name, how, "ended", &[&counted])
    }

    /// One with a good handshake and an OPEN that is refused.
    fn stream(name: &'static str, how: Value, reason: Reason) -> Self {
        let [denied, failed] = ["denied", "failed"].map(|how| format!("{how} {}", reason.label()));
        let came = format!("refused {} 0", reason as u16);
        Self::new(name, how, &came, &["handshake ok", &denied, &failed])
    }

    /// One with a good handshake and a frame whose length is wrong.
    fn length(name: &'static str, how: Value) -> Self {
        if how["lie"][2] == json!(true) {
            let reset = format!("reset {}, ended", Reason::Protocol as u16);
            let counted = ["handshake ok", "failed protocol", "violation"];
            let row = Self::new(name, how, &reset, &counted);
            // The application was connected to before, and is told nothing.
            return row.got(&[""]);
        }
        Self::new(name, how, "ended", &["handshake ok", "violation"])
    }

    fn seconds(self, seconds: [f64; 2]) -> Self {
        Self { seconds, ..self }
    }

    fn got(self, got: &'static [&'static str]) -> Self {
        Self { got, ..self }
    }
}

/// Pods `a` and `c` on node 1, which has no agent; `b` and `d` on node 2, each with an application.
struct Fixture {
    lab: Lab,
    certs: PathBuf,
    agent: Agent,
    applications: [Proc; 2],
}

impl Fixture {
    fn new() -> Self {
        let lab = Lab::builder(Topology::Routed)
            .outside()
            .namespace("default", &[ENROLLED])
            .pods([("a", 1), ("c", 1), ("b", 2), ("d", 2)])
            .build()
            .expect("lab");
        let (own, certs) = (lab.dir().join("own"), lab.dir().join("certs"));
        write_certificates(&lab, &own, &certs);
        let list = lab.dir().join("revoked");
        let ca = lab.dir().join("authority");
        revoke(&ca, &[&certs.join("revoked")], &list);
        let config = AgentConfig::new(&format!("files:{}", own.display())).flag("--crl", &list);
        let agent = lab.node(2).start_agent(config).expect("agent");
        let applications = ["b", "d"].map(|name| application(&lab.pod(name), PORT));
        Self {
            lab,
            certs,
            agent,
            applications,
        }
    }

    fn given(&self, how: &Value) -> Value {
        let peer = self.lab.pod("b").v4().to_string();
        let mut given = json!({"peer": peer, "port": PORT});
        for (key, value) in how.as_object().expect("an object") {
            given[key] = value.clone();
        }
        for key in ["certs", "then"] {
            if let Some(name) = how[key].as_str() {
                given[key] = self.certs.join(name).display().to_string().into();
            }
        }
        given
    }

    /// Returns the result of an attempt, and its duration in seconds.
    fn attempt(&self, from: &str, how: &Value) -> (String, f64) {
        let given = self.given(how).to_string();
        let cmd = Cmd::new("python3").args(["-B", PEER, "try", &given]);
        let output = if from == "outside" {
            self.lab.outside().expect("outside").run(cmd, 3 * SOON)
        } else {
            self.lab.pod(from).run(cmd, 3 * SOON)
        };
        let text = output.expect("python3").ok().expect("python3").text();
        let (came, seconds) = text.trim_end().split_once('\n').expect("two lines");
        (came.to_owned(), seconds.parse().expect("seconds"))
    }

    /// A connection as it should be, from pod `a`.
    fn control(&self, text: &str) {
        self.talks("a", "a", text);
    }

    /// A connection as it should be, from a pod with a certificate.
    fn talks(&self, from: &str, certs: &str, text: &str) {
        let how = json!({"how": "talk", "certs": certs, "text": text});
        let (came, _) = self.attempt(from, &how);
        assert_eq!(came, text, "control\n{}", self.agent.log_tail());
        self.got(text);
    }

    /// The next connection that the application of `b` says to have had.
    fn got(&self, text: &str) {
        let said = self.applications[0]
            .next_line(SOON)
            .expect("a line in time");
        assert_eq!(said, format!("got '{text}'"));
    }
}

fn application(pod: &Pod, port: u16) -> Proc {
    let cmd = Cmd::new("python3").args(["-B", PEER, "serve", &port.to_string()]);
    let server = pod.spawn_lines(cmd).expect("python3");
    assert_eq!(server.next_line(SOON).expect("a line in time"), "up");
    server
}

/// `own`, of the agent that is asked, and `certs`, of those who ask.
fn write_certificates(lab: &Lab, own: &Path, certs: &Path) {
    let [ca, foreign] = ["authority", "foreign"].map(|name| lab.dir().join(name));
    authority(&ca);
    authority(&foreign);
    for name in ["b", "d"] {
        certificate(own, &ca, name, name);
    }
    let of = |domain: &str, account: &str| format!("URI:spiffe://{domain}/ns/default/sa/{account}");
    let (a, c) = (of("cluster.local", "a"), of("cluster.local", "c"));
    let past = Some(["20200101000000Z", "20200102000000Z"]);
    let future = Some(["20990101000000Z", "20990102000000Z"]);
    let all = [
        ("a", &ca, a.clone(), None),
        ("c", &ca, c.clone(), None),
        ("other-domain", &ca, of("cluster.example", "a"), None),
        ("two-names", &ca, format!("{a},{c}"), None),
        ("no-workload", &ca, "DNS:a.default".to_owned(), None),
        ("revoked", &ca, a.clone(), None),
        ("renewed", &ca, a.clone(), None),
        ("expired", &ca, a.clone(), past),
        ("not-yet-valid", &ca, a.clone(), future),
        ("foreign", &foreign, a, None),
    ];
    for (name, ca, names, dates) in all {
        issue(&certs.join(name), ca, &names, dates);
    }
}

/// Returns the rows of peers that the handshake refuses.
fn handshakes() -> Vec<Row> {
    let ask = |certs: &str| json!({"how": "ask", "certs": certs});
    let say = |bytes: &[u8]| {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({"how": "say", "bytes": hex})
    };
    let old = json!({"how": "ask", "certs": "a", "version": "1.2"});
    let plain = json!({"how": "ask", "certs": "a", "alpn": false});
    let record = [0x16, 3, 1, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9];
    let leave = json!({"how": "leave", "certs": "a"});
    let row = Row::handshake;
    vec![
        row("no certificate", json!({"how": "ask"}), "no_certificate"),
        row("another domain", ask("other-domain"), "wrong_trust_domain"),
        row("two URI names", ask("two-names"), "several_names"),
        row("no SPIFFE ID", ask("no-workload"), "no_spiffe_id"),
        row("expired", ask("expired"), "expired"),
        row("revoked", ask("revoked"), "revoked"),
        row("not yet valid", ask("not-yet-valid"), "not_yet_valid"),
        row("a CA of the same name", ask("foreign"), "unknown_ca"),
        row("TLS 1.2", old, "tls_version"),
        row("TLS without a protocol in it", plain, "protocol"),
        row("HTTP", say(b"GET / HTTP/1.1\r\n\r\n"), "not_tls"),
        row("a record of TLS that is none", say(&record), "not_tls"),
        row("silence", say(b""), "timeout").seconds(AT_THE_DEADLINE),
        row("begun and left", leave, "timeout").seconds(AT_THE_DEADLINE),
    ]
}

/// Returns the rows of peers with a valid certificate whose requests are refused.
fn streams(fixture: &Fixture) -> Vec<Row> {
    let lab = &fixture.lab;
    let [b, c, d] = ["b", "c", "d"].map(|name| lab.pod(name).v4().to_string());
    let node = lab.node(2).v4().to_string();
    let ask = |certs: &str| json!({"how": "ask", "certs": certs});
    let to = |to: &str, port: u16| json!({"how": "ask", "certs": "a", "to": [to, port]});
    let from = |source: &str, certs: &str| json!({"how": "ask", "certs": certs, "source": source});
    let row = Row::stream;
    use Reason as R;
    let mut rows = vec![
        row("another's identity", ask("c"), R::IdentityRefused).seconds(AFTER_A_WAIT),
        Row {
            from: "outside",
            ..row("an address of no pod", ask("a"), R::UnknownPeer).seconds(AFTER_A_WAIT)
        },
        row("another's source", from(&c, "a"), R::Spoofed),
        row("another's source and identity", from(&c, "c"), R::Spoofed),
        row("another pod of the node", to(&d, PORT), R::NotTunnelled),
        row(
            "the pod by another name",
            to("127.0.0.1", PORT),
            R::NotTunnelled,
        ),
        row("the agent's metrics", to(&node, 15020), R::NotTunnelled),
        row("the port of tunnels", to(&b, TUNNEL_PORT), R::TunnelPort),
        row("no port", to(&b, 0), R::TunnelPort),
    ];
    // The agent's own listeners inside the pod.
    let sockets = lab.pod("b").tcp_sockets().expect("ss");
    let own = sockets.iter().filter_map(|socket| socket.local);
    let own: Vec<_> = own.filter(|local| local.ip().is_loopback()).collect();
    assert!(own.len() >= 4, "the agent's listeners: {own:?}");
    rows.extend(own.iter().map(|at| {
        let to = to(&at.ip().to_string(), at.port());
        row("a listener of the agent", to, R::NotTunnelled)
    }));
    rows
}

/// Frames of these types with these lengths, before a stream is open or within one.
fn lengths() -> Vec<Row> {
    let lie = |kind: u8, length: u32, within: bool| json!({"how": "lie", "certs": "a", "lie": [kind, length, within]});
    let row = Row::length;
    vec![
        row("an OPEN of 16 MiB", lie(1, 0xff_ffff, false)),
        row("an empty OPEN", lie(1, 0, false)),
        row("an OPEN that is too short", lie(1, 37, false)),
        row("an optional frame too long", lie(0x80, 1025, false)),
        row("data of 16 MiB", lie(4, 0xff_ffff, true)),
        row("data one byte too long", lie(4, 262_145, true)),
        row("empty data", lie(4, 0, true)),
        row("a FIN that is too long", lie(5, 1025, true)),
        row("a RESET that is too short", lie(7, 11, true)),
    ]
}

/// Returns the rows of peers that present the session ticket of another one.
fn tickets(fixture: &Fixture) -> Vec<Row> {
    let refused = format!("refused {} 0", Reason::IdentityRefused as u16);
    let twice = format!("{refused}, resumed True, {refused}");
    let counted = [
        "handshake ok",
        "denied identity_refused",
        "failed identity_refused",
    ];
    let d = fixture.lab.pod("d").v4().to_string();
    vec![
        Row::new(
            "a ticket of another identity",
            json!({"how": "ticket", "certs": "c", "then": "a"}),
            &twice,
            &[counted, counted].concat(),
        )
        .seconds(AFTER_TWO),
        Row::new(
            "a ticket without its secret",
            json!({"how": "stolen", "certs": "a"}),
            "ended",
            &["handshake ok", "handshake misbehaved"],
        )
        .got(&["stolen"]),
        Row::new(
            "a ticket of another pod",
            json!({"how": "elsewhere", "certs": "a", "then": "expired", "other": d}),
            "resumed True, ended",
            &["handshake ok", "handshake ok", "handshake expired"],
        )
        .got(&["elsewhere"]),
    ]
}

#[test]
fn hostile_peer_is_refused_with_its_reason() {
    let fixture = Fixture::new();
    fixture.control("the first");
    let rows = [
        handshakes(),
        streams(&fixture),
        lengths(),
        tickets(&fixture),
    ];
    for (number, row) in rows.into_iter().flatten().enumerate() {
        let before = counts(&fixture.agent);
        let (came, seconds) = fixture.attempt(row.from, &row.how);
        println!("{}: {came}, after {seconds} s", row.name);
        let log = || fixture.agent.log_tail();
        assert_eq!(came, row.came, "{}\n{}", row.name, log());
        let [least, most] = row.seconds;
        assert!(
            (least..=most).contains(&seconds),
            "{}: {seconds} s",
            row.name
        );
        // Behind it a connection as it should be: whatever an application was to get of the row came
        // before, and so did what is counted.
        row.got.iter().for_each(|text| fixture.got(text));
        fixture.control(&format!("after row {number}"));
        let mut expected = row.counted;
        *expected.entry("handshake ok".to_owned()).or_default() += 1.0;
        let now = || added(&before, &counts(&fixture.agent));
        let counted = eventually("the row to be counted", SOON, || {
            (now() == expected).then_some(())
        });
        assert!(
            counted.is_ok(),
            "{}: {:?}, not {expected:?}",
            row.name,
            now()
        );
    }
    // The other pod's application has been asked by nobody but this.
    let script =
        format!("import socket; socket.create_connection(('127.0.0.1', {PORT})).sendall(b'last')");
    let cmd = Cmd::new("python3").args(["-c", &script]);
    let asked = fixture.lab.pod("d").run(cmd, SOON);
    asked.expect("run").ok().expect("python3");
    let said = fixture.applications[1]
        .next_line(SOON)
        .expect("a line in time");
    assert_eq!(said, "got 'last'");
}

#[test]
fn revocation_closes_only_connections_of_that_certificate() {
    let fixture = Fixture::new();
    let _second = application(&fixture.lab.pod("b"), PORT + 1);
    fixture.control("the first");
    let hold = |name: &str, how: &str, port: u16| {
        let mut given = fixture.given(&json!({"how": how, "certs": name}));
        given["port"] = port.into();
        let cmd = Cmd::new("python3").args(["-B", PEER, "hold", &given.to_string()]);
        let held = fixture.lab.pod(name).spawn_lines(cmd).expect("python3");
        assert_eq!(held.next_line(SOON).expect("a line in time"), "held");
        held
    };
    let (a, c) = (hold("a", "until", PORT), hold("c", "on", PORT + 1));
    let goes_on = || {
        c.signal(libc::SIGUSR1).expect("signal");
        assert_eq!(c.next_line(SOON).expect("a line in time"), "still");
    };
    goes_on();
    let before = counts(&fixture.agent);
    let begun = Instant::now();
    let [ca, list] = ["authority", "revoked"].map(|name| fixture.lab.dir().join(name));
    revoke(&ca, &[&fixture.certs.join("a")], &list);
    let reset = format!("reset {}, ended", Reason::IdentityRefused as u16);
    assert_eq!(a.next_line(SOON).expect("a line in time"), reset);
    let took = begun.elapsed();
    println!("closed after {took:.1?}");
    assert!(took < REVOKED, "{took:?}");
    goes_on();
    // Its ticket does not bring it back, nor does it begin anew.
    assert_eq!(a.next_line(SOON).expect("a line in time"), "ended");
    let (came, _) = fixture.attempt("a", &json!({"how": "ask", "certs": "a"}));
    assert_eq!(came, "ended");
    fixture.got("");
    // Another identity, and another certificate of the same one, are served as before.
    fixture.talks("c", "c", "another");
    fixture.talks("a", "renewed", "the same");
    goes_on();
    let counted = [
        ("failed identity_refused", 1.0),
        ("handshake revoked", 2.0),
        ("handshake ok", 2.0),
    ];
    let expected: Counts = counted.map(|(name, count)| (name.to_owned(), count)).into();
    let now = || added(&before, &counts(&fixture.agent));
    let counted = eventually("it to be counted", SOON, || {
        (now() == expected).then_some(())
    });
    assert!(counted.is_ok(), "{:?}, not {expected:?}", now());
}
