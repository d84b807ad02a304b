// SPDX-License-Identifier: Apache-2.0
//! Agents restart under load while the kernel goes on translating, allowing and denying. The same load
//! detects detached programs.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::reports::{Storm, Tcp};
use mesh_test::{Agent, AgentConfig, Lab, Mesh, Pod, Proc, Topology, eventually};

const SOON: Duration = Duration::from_secs(20);
const VIPS: [&str; 2] = ["10.96.7.7", "fd00:96::77"];

const ONLY_GOOD: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-good, namespace: default}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
  ingress:
    - from: [{podSelector: {matchLabels: {app: good}}}]
";

struct Scene {
    mesh: Mesh,
    good: std::sync::Arc<Pod>,
    bad: std::sync::Arc<Pod>,
    #[expect(dead_code, reason = "held for its drop")]
    server: Proc,
    direct: Vec<SocketAddr>,
}

/// A server, one who may reach it and one who may not, all on one node.
fn scene() -> Scene {
    let lab = Lab::builder(Topology::Routed)
        .nodes(1)
        .namespace("default", &[ENROLLED])
        .pods(["good", "bad", "server"].map(|name| (name, 1)))
        .build()
        .expect("lab");
    lab.apply_text("only-good", ONLY_GOOD).expect("policy");
    let ips = VIPS.map(|ip| ip.parse().expect("address"));
    let (app, ports) = (("app", "server"), [(80, 7000, "TCP")]);
    lab.service(("default", "server"), &ips, app, &ports)
        .expect("service");
    let mesh = Mesh::start(lab).expect("mesh");
    let [good, bad, server] = ["good", "bad", "server"].map(|name| mesh.pod(name));
    let direct = server
        .addresses()
        .iter()
        .map(|ip| SocketAddr::new(*ip, 7000))
        .collect();
    let server = server.serve("--tcp [::]:7000").expect("server");
    let scene = Scene {
        mesh,
        good,
        bad,
        server,
        direct,
    };
    for to in scene.virtually().iter().chain(&scene.direct) {
        assert!(scene.tcp(&scene.good, *to).ok, "{to}");
        assert!(!scene.tcp(&scene.bad, *to).ok, "{to}");
    }
    scene
}

impl Scene {
    fn virtually(&self) -> [SocketAddr; 2] {
        VIPS.map(|ip| SocketAddr::new(ip.parse().expect("address"), 80))
    }

    fn tcp(&self, from: &Pod, to: SocketAddr) -> Tcp {
        let output = from.probe(&format!("tcp --to {to} --timeout-ms 1000"));
        output.expect("run").json().expect("report")
    }

    /// Direct, through the service, and denied, until asked for.
    fn storms(&self, seconds: u32) -> [Proc; 3] {
        let start = |from: &Pod, to: &[SocketAddr]| {
            let to: String = to.iter().map(|to| format!("--to {to} ")).collect();
            let line = format!(
                "storm {to} --any-server --seconds {seconds} --pause-us 1000 --timeout-ms 1000"
            );
            from.start_probe(&line).expect("storm")
        };
        [
            start(&self.good, &self.direct),
            start(&self.good, &self.virtually()),
            start(&self.bad, &self.direct),
        ]
    }

    fn agent(&mut self) -> &mut Agent {
        &mut self.mesh.agents[0]
    }
}

fn finished(storms: &[Proc; 3]) -> [Storm; 3] {
    storms
        .each_ref()
        .map(|storm| Storm::of(storm).expect("report"))
}

#[test]
fn agent_restart_is_unnoticed_and_enforces_denials() {
    let mut scene = scene();
    let storms = scene.storms(15);
    let agent = scene.agent();
    // A successor beside it, a kill, an orderly end.
    let mut old = agent.succeed().expect("a successor");
    old.signal(libc::SIGTERM).expect("asked to end");
    assert!(old.wait(SOON).expect("ended").success());
    agent.kill_9().expect("killed");
    agent.start_again().expect("started");
    agent.terminate(SOON).expect("ended");
    agent.start_again().expect("started");
    let [direct, virtually, denied] = finished(&storms);
    let all = format!("{direct:?}\n{virtually:?}\n{denied:?}");
    assert!(direct.ok + virtually.ok >= 5000, "{all}");
    assert_eq!((direct.failed, direct.wrong), (0, 0), "{all}");
    assert_eq!((virtually.failed, virtually.wrong), (0, 0), "{all}");
    assert_eq!((denied.ok, denied.wrong), (0, 0), "{all}");
    assert!(denied.failed > 1000, "{all}");
}

#[test]
fn overlapping_agents_record_each_connection_once() {
    let mut scene = scene();
    let storms = scene.storms(6);
    let agent = scene.agent();
    let mut old = agent.succeed().expect("a successor");
    old.signal(libc::SIGTERM).expect("asked to end");
    assert!(old.wait(SOON).expect("ended").success());
    let [direct, virtually, _] = finished(&storms);
    // Those of the scene itself, too; each has two ends.
    let made = usize::try_from(direct.ok + virtually.ok + 4).expect("a few thousand");
    let agent = scene.agent();
    let all = eventually("all records", SOON, || {
        (recorded(agent) >= 2 * made).then_some(())
    });
    // What would come twice has come when it ends.
    agent.terminate(SOON).expect("ended");
    assert_eq!(recorded(agent), 2 * made, "{all:?}");
}

/// Ends of connections that `good` has made.
fn recorded(agent: &Agent) -> usize {
    let flows = agent.flows().expect("the flow log");
    let of_good =
        |flow: &&serde_json::Value| flow["kind"] == "connection" && flow["source"]["pod"] == "good";
    flows.iter().filter(of_good).count()
}

#[test]
fn load_detects_detached_programs() {
    let mut scene = scene();
    let storms = scene.storms(8);
    let config = AgentConfig::new(&Mesh::own_ca(&scene.mesh));
    let agent = scene.agent();
    agent.terminate(SOON).expect("ended");
    let node = std::sync::Arc::clone(agent.node());
    Agent::run_subcommand(&node, &config, "cleanup", SOON)
        .expect("run")
        .ok()
        .expect("removed");
    agent.start_again().expect("started");
    let (bad, to) = (std::sync::Arc::clone(&scene.bad), scene.direct[0]);
    eventually("the policy to be in force again", SOON, || {
        (!scene.tcp(&bad, to).ok).then_some(())
    })
    .expect("in force");
    let [_, virtually, denied] = finished(&storms);
    assert!(
        virtually.failed > 0 && denied.ok > 0,
        "{virtually:?}\n{denied:?}"
    );
}
