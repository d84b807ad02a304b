// SPDX-License-Identifier: Apache-2.0
//! Pods that are added and deleted, outside hosts, and the handle of an agent.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_test::reports::Tcp;
use mesh_test::{
    Agent, AgentConfig, Cmd, Families, Host, Lab, Pod, PodSpec, Topology, cgroup, eventually,
};

const SOON: Duration = Duration::from_secs(5);

/// Connects and gives what the client reports; the ends must agree.
fn connect(from: &Host, to: IpAddr) -> Tcp {
    let to = SocketAddr::new(to, 7000);
    let output = from
        .probe(&format!("tcp --to {to}"))
        .expect("run")
        .ok()
        .expect("connected");
    let report: Tcp = output.json().expect("report");
    assert!(report.ends_agree(), "{report:?}");
    report
}

#[test]
fn lab_adds_and_deletes_pods() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let mut lab = Lab::builder(topology)
            .pod(PodSpec::new("a", 1))
            .build()
            .expect("lab");
        let a = lab.pod("a");
        let spec = || PodSpec::new("new", 2).host_number(77).namespace("other");
        let manifest = lab.manifest_dir().join("pod-other-new.yaml");
        let mut cookies = Vec::new();
        for round in 0..2 {
            let pod = lab.add_pod(spec()).expect("pod");
            assert!(manifest.exists());
            let server = pod
                .serve(&format!("--tcp [::]:7000 --name round{round}"))
                .expect("server");
            for address in pod.addresses() {
                let report = connect(&a, *address);
                assert_eq!(
                    report.identity.expect("identity").name,
                    format!("round{round}")
                );
                assert!(a.addresses().contains(&report.local.expect("local").ip()));
            }
            cookies.push(pod.cookie());
            let pids = cgroup::all_processes(pod.cgroup()).expect("processes");
            assert_eq!(pids, [server.id()]);
            // Address and name are used again at once, while the old namespace may still go away.
            let gone = lab.delete_pod("new").expect("delete");
            assert!(!manifest.exists() && !gone.path().exists() && !gone.cgroup().exists());
            if round == 1 {
                eventually("the namespace to go", SOON, || {
                    (!gone.node().has_link(gone.host_if()).expect("node")).then_some(())
                })
                .expect("gone");
            }
            drop(server);
        }
        assert_ne!(cookies[0], cookies[1]);
    }
}

#[test]
fn lab_supports_single_stack_pods_and_outside_hosts() {
    for topology in [Topology::Routed, Topology::Bridged] {
        let lab = Lab::builder(topology)
            .outside()
            .nodes(3)
            .pod(PodSpec::new("four", 1).families(Families::V4))
            .pod(PodSpec::new("six", 2).families(Families::V6))
            .pod(PodSpec::new("both", 3))
            .build()
            .expect("lab");
        let [four, six, both] = ["four", "six", "both"].map(|name| lab.pod(name));
        assert_eq!(four.addresses(), [IpAddr::from(four.v4())]);
        assert_eq!(six.addresses(), [IpAddr::from(six.v6())]);
        let servers = [&four, &six, &both].map(|pod| pod.serve("--tcp [::]:7000").expect("server"));
        let outside = lab.outside().expect("outside");
        let local = |place: &Host, to: IpAddr| connect(place, to).local.expect("local").ip();
        for pod in [&four, &six, &both] {
            for to in pod.addresses() {
                let (node, peer) = (pod.node(), lab.node(1));
                assert_eq!(local(pod, *to), *to, "to itself");
                let on_wire = if to.is_ipv4() {
                    [
                        IpAddr::from(node.v4()),
                        peer.v4().into(),
                        [192, 168, 50, 100].into(),
                    ]
                } else {
                    let outside = "fd00:50::64".parse().expect("address");
                    [IpAddr::from(node.v6()), peer.v6().into(), outside]
                };
                assert_eq!(local(peer, *to).is_ipv4(), to.is_ipv4());
                if topology == Topology::Routed {
                    assert_eq!(local(node, *to), on_wire[0], "{topology:?} kubelet");
                }
                if node.number() != 1 {
                    assert_eq!(local(peer, *to), on_wire[1], "{topology:?} other node");
                }
                assert_eq!(local(outside, *to), on_wire[2], "{topology:?} outside");
            }
        }
        let sources = |from: &Pod| {
            both.addresses()
                .iter()
                .filter(|to| {
                    from.probe(&format!("tcp --to {}", SocketAddr::new(**to, 7000)))
                        .expect("run")
                        .status
                        .success()
                })
                .count()
        };
        assert_eq!((sources(&four), sources(&six)), (1, 1));
        let control = four.run(
            Cmd::line("cat /proc/sys/net/ipv4/tcp_congestion_control"),
            SOON,
        );
        assert_eq!(control.expect("run").text().trim(), "cubic");
        drop(servers);
    }
}

/// Stands in for the agent: takes its flags, answers its probes, ends as told.
const STAND_IN: &str = r#"#!/usr/bin/python3
import http.server, signal, socket, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
print("flags", sys.argv[1], sorted(flags.items()), flush=True)
if sys.argv[1] != "run":
    sys.exit(0)
if flags.get("--fail"):
    sys.exit("cannot go on: " + flags["--fail"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"mesh_build_info 1\n")
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()
host, port = flags["--metrics"].rsplit(":", 1)
Server((host.strip("[]"), int(port)), Handler).serve_forever()
"#;

/// Written by another process: were the file open here while another test's thread forks, the
/// kernel would refuse to run it.
fn stand_in(lab: &Lab) -> PathBuf {
    let path = lab.dir().join("stand-in");
    let write = format!("cat > {0} && chmod 755 {0}", path.display());
    lab.wire()
        .run(Cmd::shell(&write).input(STAND_IN), SOON)
        .expect("run")
        .ok()
        .expect("write");
    path
}

#[test]
fn agent_process_is_started_replaced_killed_and_stopped() {
    let lab = Lab::builder(Topology::Routed).build().expect("lab");
    let config = AgentConfig::new("self:/nowhere").binary(stand_in(&lab));
    // Two at a time, each in its own node.
    let mut agents: Vec<_> = lab
        .nodes()
        .iter()
        .map(|node| {
            node.start_agent(config.clone().flag("--drain", "1s"))
                .expect("agent")
        })
        .collect();
    for (agent, node) in agents.iter().zip(lab.nodes()) {
        assert_eq!(agent.metrics().expect("metrics"), "mesh_build_info 1\n");
        let log = agent.log_tail();
        for flag in [
            format!("'--node', '{}'", node.name()),
            format!("'--source', 'dir:{}'", lab.manifest_dir().display()),
            format!("'--cgroup', '{}'", node.root_cgroup().display()),
            format!("'--bpffs', '{}'", node.bpffs().display()),
            "'--drain', '1s'".to_owned(),
        ] {
            assert!(log.contains(&flag), "{flag} in {log}");
        }
        assert!(agent.process().resident_bytes().expect("running") > 1 << 20);
        let spent = cgroup::cpu_time(node.agent_host().cgroup()).expect("cgroup");
        assert!(
            spent > Duration::from_millis(1),
            "{spent:?} for starting Python"
        );
        let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", agent.process().id()));
        assert!(
            cgroup
                .expect("cgroup")
                .contains(&format!("/{}/agent/", node.name()))
        );
    }
    let agent = &mut agents[0];
    let first = agent.process().id();
    let mut old = agent.succeed().expect("successor");
    assert_eq!(old.id(), first);
    assert!(old.ended().expect("wait").is_none());
    old.kill().expect("kill");
    agent.kill_9().expect("kill -9");
    assert!(agent.get("/readyz").is_err());
    agent.start_again().expect("again");
    agent.terminate(SOON).expect("SIGTERM");
    assert!(agent.get("/readyz").is_err());

    let node = lab.node(1);
    let said = Agent::run_subcommand(node, &config, "cleanup", SOON).expect("run");
    assert!(said.text().contains(&format!(
        "flags cleanup [('--bpffs', '{}')",
        node.bpffs().display()
    )));

    let failing = node.start_agent(config.flag("--fail", "no such thing"));
    let error = format!("{:#}", failing.expect_err("it ends at once"));
    assert!(error.contains("cannot go on: no such thing"), "{error}");
}
