// SPDX-License-Identifier: Apache-2.0
//! The agent on its node: what it creates in pods, hands over, releases and removes.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mesh_test::reports::{Storm, Tcp};
use mesh_test::{Agent, AgentConfig, Host, Lab, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(10);
const MESH: (&str, &str) = ("mesh.rs/dataplane", "enabled");

struct Mesh {
    lab: Lab,
    agents: Vec<Agent>,
}

impl Mesh {
    /// Two nodes with an agent each, pod `a` on the first and `b` on the second.
    fn new() -> Self {
        let lab = Lab::builder(Topology::Routed)
            .nodes(2)
            .namespace("shop", &[MESH])
            .pod(PodSpec::new("a", 1).namespace("shop"))
            .pod(PodSpec::new("b", 2).namespace("shop"))
            .build()
            .expect("lab");
        let agents = (1..=2)
            .map(|n| lab.node(n).start_agent(config(&lab)).expect("agent"))
            .collect();
        Self { lab, agents }
    }

    fn explain(&self, what: &str) -> String {
        let mut text = what.to_owned();
        for agent in &self.agents {
            text += &format!("\n---- {agent:?}\n{}", agent.log_tail());
        }
        text
    }

    /// Waits until a client gets through.
    fn reach(&self, from: &Pod, to: SocketAddr) -> Tcp {
        let report = eventually("a connection", SOON, || tcp(from, to).filter(|r| r.ok));
        match report {
            Ok(report) => report,
            Err(error) => unreachable!("{}", self.explain(&format!("{error:#}"))),
        }
    }
}

fn config(lab: &Lab) -> AgentConfig {
    AgentConfig::new(&format!("self:{}", lab.dir().join("ca").display())).flag("--drain", "1s")
}

fn tcp(from: &Host, to: SocketAddr) -> Option<Tcp> {
    let output = from
        .probe(&format!("tcp --timeout-ms 2000 --to {to}"))
        .ok()?;
    output.json().ok()
}

/// Rules, routes and the sysctl of a pod.
fn routing(pod: &Pod) -> String {
    [
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "cat /proc/sys/net/ipv4/tcp_fwmark_accept",
    ]
    .map(|line| pod.output(line).expect("output"))
    .concat()
}

fn manifest(pod: &Pod, labels: &[(&str, &str)]) -> serde_json::Value {
    let mut object = mesh_test::manifests::Manifests::pod_object(pod);
    for (key, value) in labels {
        object["metadata"]["labels"][*key] = (*value).into();
    }
    object
}

fn apply(lab: &Lab, pod: &Pod, labels: &[(&str, &str)]) {
    let file = mesh_test::manifests::Manifests::pod_file(pod);
    lab.apply(&file, &manifest(pod, labels)).expect("applied");
}

#[test]
fn unenrollment_removes_every_rule() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    let enrolled = routing(&a);
    assert!(enrolled.contains("19781"), "{enrolled}");
    for to in b.all_at(7000) {
        assert!(mesh.reach(&a, to).ends_agree());
    }
    apply(&mesh.lab, &a, &[("mesh.rs/dataplane", "disabled")]);
    apply(&mesh.lab, &b, &[("mesh.rs/dataplane", "disabled")]);
    eventually("the rules to go", SOON, || {
        (!routing(&a).contains("1978")).then_some(())
    })
    .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
    assert!(routing(&a).ends_with("0\n"));
    let capture = mesh.lab.capture_wire().expect("capture");
    for to in b.all_at(7000) {
        assert!(mesh.reach(&a, to).ends_agree());
    }
    let ports = capture.stop().expect("capture").tcp_service_ports();
    assert_eq!(ports, [7000], "a pod outside the mesh is not tunnelled");
    apply(&mesh.lab, &a, &[]);
    apply(&mesh.lab, &b, &[]);
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    eventually("the rules to come back", SOON, || {
        (sorted(&routing(&a)) == sorted(&enrolled)).then_some(())
    })
    .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
}

#[test]
fn deleted_pod_with_tunnels_releases_netns_within_a_second() {
    let mut mesh = Mesh::new();
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    for to in b.all_at(7000) {
        mesh.reach(&a, to);
    }
    let hold = b.addresses().iter().map(|ip| {
        let to = SocketAddr::new(*ip, 7000);
        a.start_probe(&format!("hold --count 20 --to {to}"))
            .expect("holder")
    });
    let _holders: Vec<_> = hold.collect();
    for name in ["a", "b"] {
        let gone = mesh.lab.delete_pod(name).expect("deleted");
        let deleted = Instant::now();
        eventually("the namespace to go", SOON, || {
            (!gone.node().has_link(gone.host_if()).expect("node")).then_some(())
        })
        .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
        let took = deleted.elapsed();
        assert!(took < Duration::from_secs(1), "{name}: {took:?}");
    }
}

#[test]
fn flushed_pod_rules_are_restored() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    for to in b.all_at(7000) {
        mesh.reach(&a, to);
    }
    let whole = routing(&a);
    for family in ["-4", "-6"] {
        a.output(&format!("ip {family} rule del table 19781"))
            .expect("output");
        a.output(&format!("ip {family} route flush table 19782"))
            .expect("output");
    }
    eventually("the repair", Duration::from_secs(2), || {
        (routing(&a).len() == whole.len()).then_some(())
    })
    .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
    assert!(
        mesh.agents[0]
            .log_tail()
            .contains("restored network configuration")
    );
    for to in b.all_at(7000) {
        mesh.reach(&a, to);
    }
}

#[test]
fn pod_without_agent_is_refused_and_sends_no_plaintext() {
    let mut mesh = Mesh::new();
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    for to in b.all_at(7000) {
        mesh.reach(&a, to);
    }
    mesh.agents[0].kill_9().expect("killed");
    let capture = mesh.lab.capture_wire().expect("capture");
    for to in b.all_at(7000) {
        let began = Instant::now();
        let report = tcp(&a, to).expect("report");
        assert!(!report.ok, "{report:?}");
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "{to}: {:?}: {report:?}",
            began.elapsed()
        );
    }
    let ports = capture.stop().expect("capture").tcp_service_ports();
    assert!(ports.iter().all(|port| *port == 15008), "{ports:?}");
    mesh.agents[0].start_again().expect("started");
    for to in b.all_at(7000) {
        assert!(mesh.reach(&a, to).ends_agree());
    }
}

#[test]
fn cleanup_removes_everything_from_node() {
    let mut mesh = Mesh::new();
    let pods: Vec<Arc<Pod>> = ["a", "b"].map(|name| mesh.lab.pod(name)).into();
    for agent in &mut mesh.agents {
        agent.terminate(SOON).expect("ended");
    }
    assert!(
        pods.iter().all(|pod| routing(pod).contains("19781")),
        "the end removes nothing"
    );
    let kept = |agent: &Agent| agent.state_dir().join("last-good.json").exists();
    assert!(mesh.agents.iter().all(kept), "nothing was kept");
    for number in 1..=2 {
        let node = mesh.lab.node(number);
        for _twice in 0..2 {
            let output = Agent::run_subcommand(node, &config(&mesh.lab), "cleanup", SOON);
            output.expect("run").ok().expect("cleaned");
        }
        assert!(!node.bpffs().join("mesh").exists());
    }
    assert!(!mesh.agents.iter().any(kept), "something is kept");
    for pod in &pods {
        assert!(!routing(pod).contains("1978"), "{}", routing(pod));
        assert!(routing(pod).ends_with("0\n"));
    }
    let _server = pods[1].serve("--tcp [::]:7000").expect("server");
    let capture = mesh.lab.capture_wire().expect("capture");
    for to in pods[1].all_at(7000) {
        let report = tcp(&pods[0], to).expect("report");
        assert!(report.ok && report.ends_agree(), "{report:?}");
    }
    assert_eq!(capture.stop().expect("capture").tcp_service_ports(), [7000]);
}

#[test]
fn pod_listening_on_tunnel_port_is_reported_and_not_attached() {
    let mut mesh = Mesh::new();
    let spec = PodSpec::new("odd", 1).namespace("other");
    let odd = mesh.lab.add_pod(spec).expect("pod");
    let server = odd.serve("--tcp [::]:15008").expect("server");
    apply(&mesh.lab, &odd, &[MESH]);
    eventually("the complaint", SOON, || {
        mesh.agents[0].log_tail().contains("15008").then_some(())
    })
    .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
    assert!(!routing(&odd).contains("1978"));
    drop(server);
    eventually("the enrolment", SOON, || {
        routing(&odd).contains("19781").then_some(())
    })
    .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
}

#[test]
fn open_connection_is_closed_when_policy_denies_it() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    let addresses: Vec<IpAddr> = b.addresses().to_vec();
    let mut holders = Vec::new();
    for ip in addresses {
        mesh.reach(&a, SocketAddr::new(ip, 7000));
        let line = format!("hold --count 2 --to {}", SocketAddr::new(ip, 7000));
        holders.push(a.start_probe(&line).expect("holder"));
    }
    for holder in &mut holders {
        assert!(holder.ended().expect("look").is_none());
    }
    let policy = serde_json::json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "nothing-out", "namespace": "shop", "uid": "p1"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"]},
    });
    mesh.lab.apply("policy", &policy).expect("applied");
    for holder in &mut holders {
        holder
            .wait(SOON)
            .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
    }
}

#[test]
fn agent_restarts_under_load_lose_no_connection() {
    let mut mesh = Mesh::new();
    let c = mesh
        .lab
        .add_pod(PodSpec::new("c", 1).namespace("shop"))
        .expect("pod");
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _servers = [&b, &c].map(|pod| pod.serve("--tcp [::]:7000").expect("server"));
    let there = SocketAddr::new(b.v4().into(), 7000);
    let here = SocketAddr::new(c.v6().into(), 7000);
    mesh.reach(&a, there);
    mesh.reach(&a, here);
    let storm = |to| {
        let line = format!("storm --threads 2 --seconds 12 --pause-us 500 --to {to}");
        a.start_probe(&line).expect("storm")
    };
    let storms = [storm(here), storm(there)];
    for _ in 0..3 {
        let socket = mesh.agents[0].admin();
        let inode = || std::fs::metadata(&socket).map(|data| data.ino()).ok();
        let before = inode();
        let mut old = mesh.agents[0].succeed().expect("successor");
        // Both answer on the port of probes; the admin socket is the successor's once it serves.
        eventually("the successor to serve", SOON, || {
            (inode() != before).then_some(())
        })
        .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
        old.signal(libc::SIGTERM).expect("asked");
        assert!(old.wait(SOON).expect("ended").success());
    }
    for (name, storm) in ["same node", "across"].into_iter().zip(storms) {
        let report = Storm::of(&storm).expect("report");
        assert!(report.ok > 2000, "{name}: {report:?}");
        assert_eq!((report.failed, report.wrong), (0, 0), "{name}: {report:?}");
    }
}

#[test]
fn replaced_agent_does_not_write_over_its_successor() {
    let mut mesh = Mesh::new();
    let (a, b) = (mesh.lab.pod("a"), mesh.lab.pod("b"));
    let _server = b.serve("--tcp [::]:7000").expect("server");
    let to = SocketAddr::new(b.v4().into(), 7000);
    mesh.reach(&a, to);
    // The agent does not find out by its admin socket that it was replaced.
    let admin = mesh.lab.dir().join("successor.sock");
    let mut old = mesh.agents[0].succeed_at(admin.clone()).expect("successor");
    eventually("the successor to serve", SOON, || {
        admin.exists().then_some(())
    })
    .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
    let line = format!("storm --threads 2 --seconds 5 --pause-us 500 --to {to}");
    let storm = a.start_probe(&line).expect("storm");
    let successor = mesh.agents[0].process();
    successor.signal(libc::SIGSTOP).expect("stopped");
    // Longer than the interval at which an agent writes its listeners again: if the old one still
    // wrote, the listeners would be its own when it ends.
    std::thread::sleep(Duration::from_millis(1500));
    old.kill().expect("killed");
    std::thread::sleep(Duration::from_millis(300));
    successor.signal(libc::SIGCONT).expect("continued");
    let report = Storm::of(&storm).expect("report");
    assert!(report.ok > 200, "{report:?}");
    assert_eq!((report.failed, report.wrong), (0, 0), "{report:?}");
}

#[test]
fn idle_connections_of_a_pod_keep_nobody_from_probes_and_metrics() {
    const HELD: usize = 300;
    let mesh = Mesh::new();
    let (a, agent) = (mesh.lab.pod("a"), &mesh.agents[0]);
    let metrics = SocketAddr::new(agent.node().v4().into(), 15020);
    let stop = AtomicBool::new(false);
    let opened = AtomicUsize::new(0);
    let flood = || {
        a.in_ns(|| {
            let mut held = VecDeque::new();
            while !stop.load(Ordering::Relaxed) {
                held.push_back(TcpStream::connect_timeout(&metrics, SOON)?);
                if held.len() > HELD {
                    held.pop_front();
                }
                opened.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    std::thread::scope(|scope| {
        let flood = scope.spawn(flood);
        let full = eventually("the connections", SOON, || {
            (opened.load(Ordering::Relaxed) > HELD).then_some(())
        });
        let answers: Vec<_> = (0..10)
            .map(|_| (agent.probe("/livez").ok(), agent.get("/metrics").ok()))
            .collect();
        stop.store(true, Ordering::Relaxed);
        let flooded = flood.join().expect("no panic");
        full.and(flooded)
            .unwrap_or_else(|e| panic!("{}", mesh.explain(&format!("{e:#}"))));
        for (probe, metrics) in answers {
            assert_eq!(probe, Some(200), "the kubelet's probe");
            assert_eq!(metrics.map(|(code, _)| code), Some(200), "a scrape");
        }
    });
}
