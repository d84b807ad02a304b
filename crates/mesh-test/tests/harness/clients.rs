// SPDX-License-Identifier: Apache-2.0
//! The small clients and servers without a mesh: their reports, and the errors that they detect.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::capture::frame::{ACK, PSH, Transport, UDP};
use mesh_test::capture::{Captured, Scope};
use mesh_test::pod::SOCKETS;
use mesh_test::pod::probe_cmd;
use mesh_test::reports::{Bulk, Held, RequestResponse, Served, Storm, Tcp, Udp};
use mesh_test::{Capture, Cmd, Lab, Topology, eventually};

const SOON: Duration = Duration::from_secs(5);

fn lab(topology: Topology) -> Lab {
    Lab::builder(topology)
        .pods([("a", 1), ("b", 1), ("c", 2)])
        .build()
        .expect("lab")
}

#[test]
fn tcp_client_supports_every_option() {
    let lab = lab(Topology::Routed);
    let (a, c) = (lab.pod("a"), lab.pod("c"));
    let _server = c.serve("--tcp [::]:7000 --name c").expect("server");
    let own = a.at(4711);
    for (to, own) in c.at(7000).into_iter().zip(own) {
        for option in SOCKETS {
            let from = if option.ends_with("--from") {
                own.to_string()
            } else {
                String::new()
            };
            let line = format!("tcp --to {to} --say hello {option} {from}");
            let output = a.probe(&line).expect("run").ok().expect(&line);
            let report: Tcp = output.json().expect("report");
            assert!(report.ok && report.ends_agree(), "{line}: {report:?}");
            assert_eq!(report.peer, Some(to), "{line}");
            assert_eq!(report.received.as_deref(), Some("hello"), "{line}");
            assert_eq!(report.local.expect("local").ip(), own.ip(), "{line}");
            if !from.is_empty() {
                assert_eq!(report.local, Some(own), "{line}");
            }
        }
        let refused = a.probe(&format!("tcp --to {}", SocketAddr::new(to.ip(), 7001)));
        let refused = refused.expect("run");
        assert_eq!(refused.status.code(), Some(1));
        assert_eq!(
            refused.json::<Tcp>().expect("report").errno,
            Some(libc::ECONNREFUSED)
        );
    }
}

#[test]
fn storm_verifies_every_answer() {
    let lab = lab(Topology::Bridged);
    let (a, b, c) = (lab.pod("a"), lab.pod("b"), lab.pod("c"));
    let _b = b
        .serve("--tcp [::]:0 --ports 7000-7015 --name b")
        .expect("server");
    let _c = c
        .serve("--tcp [::]:0 --ports 7000-7015 --name c")
        .expect("server");
    let [b4, b6] = b.at(0);
    let [c4, c6] = c.at(0);
    let to = format!("--to {b4} --to {b6} --to {c4} --to {c6} --ports 7000-7015");
    let output = a
        .probe(&format!("storm {to} --threads 2 --count 2000"))
        .expect("run");
    let report: Storm = output.ok().expect("success").json().expect("report");
    assert_eq!(
        (report.ok, report.wrong, report.failed),
        (2000, 0, 0),
        "{report:?}"
    );
    assert!(
        report.names["b"] > 500 && report.names["c"] > 500,
        "{report:?}"
    );

    // Nobody listens above 7015; a translated destination is not what was asked for.
    let output = a
        .probe(&format!("storm --to {c4} --ports 7015-7016 --count 100"))
        .expect("run");
    let report: Storm = output.json().expect("report");
    assert_eq!(report.ok + report.failed, 100, "{report:?}");
    assert!(
        report.ok > 20 && report.failed > 20 && !output.status.success(),
        "{report:?}"
    );
    let rules = format!(
        "add table t\nadd chain t c {{ type nat hook output priority -100; }}\n\
         add rule t c ip daddr 10.99.0.1 tcp dport 80 dnat to {}:7000\n",
        c.v4()
    );
    a.run(Cmd::new("nft").args(["-f", "-"]).input(rules), SOON)
        .expect("nft")
        .ok()
        .expect("rules");
    let line = "storm --to 10.99.0.1:80 --count 10";
    let report: Storm = a.probe(line).expect("run").json().expect("report");
    assert_eq!(
        (report.wrong, report.wrong_answers.len()),
        (10, 10),
        "{report:?}"
    );
    let line = format!("{line} --any-server");
    let report: Storm = a.probe(&line).expect("run").json().expect("report");
    assert_eq!(report.ok, 10, "{report:?}");
}

#[test]
fn storm_connects_to_random_destinations() {
    let lab = lab(Topology::Routed);
    let a = lab.pod("a");
    let _server = a.serve("--tcp [::]:0 --ports 7000-7031").expect("server");
    for net in ["10.99.0.0/16", "fd00:99::/64"] {
        // Every address of the network is the pod's own.
        let route = format!("ip route add local {net} dev lo");
        a.run(Cmd::line(&route), SOON)
            .expect("run")
            .ok()
            .expect("route");
    }
    let line =
        "storm --net 10.99.0.0/16 --net fd00:99::/64 --ports 7000-7031 --threads 2 --count 20000";
    let report: Storm = a.probe(line).expect("run").json().expect("report");
    assert_eq!(
        (report.ok, report.wrong, report.failed),
        (20_000, 0, 0),
        "{report:?}"
    );
}

#[test]
fn transfer_counts_bytes_at_both_endpoints() {
    let lab = lab(Topology::Routed);
    let (a, c) = (lab.pod("a"), lab.pod("c"));
    let _server = c.serve("--tcp [::]:7000").expect("server");
    let [to, to6] = c.at(7000);
    let capture = lab.capture_wire().expect("capture");
    for reverse in ["", "--reverse"] {
        let line = format!("bulk --to {to} --streams 2 --bytes 1000001 {reverse}");
        let report: Bulk = a
            .probe(&line)
            .expect("run")
            .ok()
            .expect("ok")
            .json()
            .expect("report");
        assert_eq!(
            (report.bytes, report.confirmed),
            (2_000_002, 2_000_002),
            "{line}"
        );
    }
    let seen = capture.stop().expect("stop");
    seen.complete().expect("no frame lost");
    let sent: u64 = seen.flows().map(|flow| flow.payload_bytes).sum();
    assert!(
        (4_000_004..4_100_000).contains(&sent),
        "{sent} bytes on the wire"
    );
    let line = format!("rr --to {to6} --connections 2 --count 50");
    let report: RequestResponse = a.probe(&line).expect("run").json().expect("report");
    assert_eq!(report.requests, 100);
    assert!(
        report.p50_us > 0.0 && report.p99_us >= report.p50_us,
        "{report:?}"
    );
}

#[test]
fn held_connection_reports_how_it_closes() {
    let lab = lab(Topology::Bridged);
    let (a, c) = (lab.pod("a"), lab.pod("c"));
    let next = |client: &mesh_test::Proc| -> Held {
        let line = client
            .line(SOON)
            .expect("line")
            .unwrap_or_else(|| panic!("{}", client.log_tail()));
        serde_json::from_str(&line).expect("report")
    };
    for (stop, expected) in [(libc::SIGKILL, "reset"), (libc::SIGSTOP, "timeout")] {
        let mut server = c.serve("--tcp [::]:7000").expect("server");
        let to = c.at(7000)[1];
        let line = format!("hold --to {to} --count 2 --pulse-ms 5 --timeout-ms 300");
        let client = a.start_probe(&line).expect("client");
        let Held::Open(local) = next(&client) else {
            panic!("not open")
        };
        assert_eq!(local.len(), 2);
        eventually("both ends in ss", SOON, || {
            let sockets = c.tcp_sockets().expect("ss");
            let open = sockets
                .iter()
                .filter(|s| s.remote.is_some_and(|r| local.contains(&r)));
            (open.count() == 2).then_some(())
        })
        .expect("established");
        server.signal(stop).expect("signal");
        for _ in 0..2 {
            let Held::Closed { how, .. } = next(&client) else {
                panic!("not closed")
            };
            // What was sent meanwhile decides between an end and a reset.
            assert!(
                how == expected || (how == "eof" && stop == libc::SIGKILL),
                "{how}"
            );
        }
        assert_eq!(next(&client), Held::End { open: 0 });
        server.kill().expect("kill");
    }
}

#[test]
fn udp_client_receives_answers() {
    let lab = lab(Topology::Routed);
    let (a, c) = (lab.pod("a"), lab.pod("c"));
    let server = c
        .serve("--udp 0.0.0.0:7000 --udp [::]:7001 --name c --report")
        .expect("server");
    for (to, option) in [
        (SocketAddr::from((c.v4(), 7000)), ""),
        (SocketAddr::from((c.v4(), 7000)), "--connected"),
        (SocketAddr::from((c.v4(), 7000)), "--mapped"),
        (SocketAddr::from((c.v6(), 7001)), ""),
        (SocketAddr::from((c.v6(), 7001)), "--connected"),
    ] {
        let line = format!("udp --to {to} --count 3 {option}");
        let report: Udp = a
            .probe(&line)
            .expect("run")
            .ok()
            .expect("ok")
            .json()
            .expect("report");
        assert_eq!(
            (report.sent, report.received, report.from[&to]),
            (3, 3, 3),
            "{line}"
        );
        let identity = report.identity.expect("identity");
        assert_eq!(identity.name, "c");
        assert!(
            a.addresses().contains(&identity.client.ip()),
            "{line}: {identity}"
        );
        for _ in 0..3 {
            let line = server.line(SOON).expect("line").expect("not the end");
            assert_eq!(
                serde_json::from_str::<Served>(&line).expect("report"),
                Served::Datagram(identity.clone())
            );
        }
    }
    let to = SocketAddr::from((c.v4(), 9));
    let line = format!("udp --to {to} --connected --timeout-ms 500");
    let report: Udp = a.probe(&line).expect("run").json().expect("report");
    assert_eq!(
        (report.sent, report.received, report.errors.len()),
        (1, 0, 1),
        "{report:?}"
    );
}

#[test]
fn forged_packets_arrive_unchanged() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let lab = lab(topology);
        let (a, c) = (lab.pod("a"), lab.pod("c"));
        let strangers = [
            SocketAddr::from(([10, 244, 1, 99], 5)),
            "[fd00:244:1::99]:5".parse().unwrap(),
        ];
        for (src, dst) in strangers.into_iter().zip(c.at(7000)) {
            let capture =
                Capture::start(&c, &Scope::Interface("eth0".to_owned())).expect("capture");
            let raw = format!("raw --src {src} --dst {dst} --flags PA --payload raw-{topology:?}");
            let frame = format!(
                "frame --src {src} --dst {dst} --proto udp --payload frame-{topology:?} --bypass \
                 --src-mac {} --dst-mac {}",
                a.mac(),
                a.gateway_mac()
            );
            for line in [raw, frame] {
                let cmd = probe_cmd(&line).expect("probe").cap_net_raw_only();
                a.run(cmd, SOON).expect("run").ok().expect(&line);
            }
            let seen: Captured = eventually("both", SOON, || {
                let seen = capture.so_far().ok()?;
                (seen.packets().filter(|p| p.src == src.ip()).count() == 2).then_some(seen)
            })
            .expect("arrived");
            let packets: Vec<_> = seen.packets().filter(|p| p.src == src.ip()).collect();
            let tcp = Transport::Tcp {
                src: 5,
                dst: 7000,
                seq: 1,
                flags: PSH | ACK,
            };
            assert_eq!(packets[0].transport, tcp);
            assert_eq!(packets[0].payload, format!("raw-{topology:?}").as_bytes());
            assert_eq!(packets[1].protocol, UDP);
            assert_eq!(packets[1].payload, format!("frame-{topology:?}").as_bytes());
        }
    }
}

#[test]
fn forged_arp_and_neighbor_advertisements_are_accepted() {
    let lab = lab(Topology::Bridged);
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    // Only known neighbours are changed by an unasked reply, and not within a second of the last
    // change.
    let gateway = [
        lab.node(1).pod_cidrs()[0].replace(".0/24", ".1"),
        "fd00:244:1::1".to_owned(),
    ];
    for address in &gateway {
        let ping = Cmd::new("ping").args(["-c1", "-W2", address]);
        b.run(ping, SOON).expect("ping").ok().expect("answer");
    }
    let arp = format!(
        "arp --reply --count 30 --interval-ms 100 --src-mac {} --dst-mac {} --sender-ip {} --target-ip {}",
        a.mac(),
        b.mac(),
        gateway[0],
        b.v4()
    );
    let advertise = format!(
        "advertise --src-mac {} --dst-mac {} --src {} --dst {} --target {}",
        a.mac(),
        b.mac(),
        a.v6(),
        b.v6(),
        gateway[1]
    );
    for (line, address) in [arp, advertise].iter().zip(&gateway) {
        a.probe(line).expect("run").ok().expect(line);
        eventually("the neighbour to believe it", SOON, || {
            let show = Cmd::new("ip").args(["neigh", "show", address, "dev", "eth0"]);
            b.run(show, SOON)
                .ok()
                .filter(|output| output.text().contains(&a.mac()))
        })
        .expect(line);
    }
}

#[test]
fn process_capabilities_are_as_requested() {
    let lab = lab(Topology::Routed);
    let a = lab.pod("a");
    let of = |cmd: Cmd| {
        let text = a.run(cmd, SOON).expect("run").ok().expect("ok").text();
        let find = |key: &str| {
            let line = text
                .lines()
                .find(|line| line.starts_with(key))
                .expect("key");
            line.split_ascii_whitespace()
                .nth(1)
                .expect("value")
                .to_owned()
        };
        (find("Uid:"), find("CapEff:"), find("CapBnd:"))
    };
    let status = || Cmd::line("cat /proc/self/status");
    let (root, none, raw) = ("0", "0000000000000000", "0000000000002000");
    assert_eq!(of(status()).0, root);
    let (uid, effective, _) = of(status().no_root());
    assert_eq!((uid.as_str(), effective.as_str()), ("65534", none));
    let (uid, effective, bounding) = of(status().cap_net_raw_only());
    assert_eq!(
        (uid.as_str(), effective.as_str(), bounding.as_str()),
        (root, raw, raw)
    );

    // And where: the pod's cgroup, not the harness's.
    let cgroup = a
        .run(Cmd::line("cat /proc/self/cgroup"), SOON)
        .expect("run")
        .text();
    assert!(
        cgroup.contains(&format!("/kubepods/pod{}/", a.uid())),
        "{cgroup}"
    );
    let late = a
        .run(Cmd::line("sleep 100"), Duration::from_millis(50))
        .expect_err("deadline");
    assert!(late.to_string().contains("has not exited"), "{late}");
}
