// SPDX-License-Identifier: Apache-2.0
//! Enrolling and unenrolling a pod keeps its open connections.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::manifests::Manifests;
use mesh_test::reports::Tcp;
use mesh_test::{Agent, AgentConfig, Lab, Pod, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(15);
const WORD: &str = "samovar";
const PORT: u16 = 7000;

fn lab() -> Lab {
    Lab::builder(Topology::Routed)
        .nodes(2)
        .namespace("shop", &[])
        .pod(PodSpec::new("a", 1).namespace("shop"))
        .pod(PodSpec::new("b", 2).namespace("shop"))
        .build()
        .expect("lab")
}

fn agent(lab: &Lab, node: u8) -> Agent {
    let config = AgentConfig::new(&format!("self:{}", lab.dir().join("ca").display()));
    let config = config.flag("--drain", "1s");
    lab.node(node).start_agent(config).expect("agent")
}

/// Labels a pod, and waits until its agent, if there is one, says that it is so.
fn label(lab: &Lab, pod: &Pod, agent: Option<&Agent>, value: &str) {
    let mut object = Manifests::pod_object(pod);
    object["metadata"]["labels"]["mesh.rs/dataplane"] = value.into();
    lab.apply(&Manifests::pod_file(pod), &object)
        .expect("applied");
    let Some(agent) = agent else {
        return;
    };
    let name = format!("shop/{}", pod.name());
    let is_so = || {
        let pods = agent.ask("/pods").ok()?;
        let mine = pods.as_array()?.iter().find(|one| one["name"] == *name)?;
        (mine["enrolled"] == (value == "enabled")).then_some(())
    };
    eventually("the pod to be as it is labelled", SOON, is_so)
        .map_err(|e| format!("{e:#}\n{}", agent.log_tail()))
        .expect("labelled");
}

fn tcp(from: &Pod, to: SocketAddr) -> Tcp {
    let line = format!("tcp --timeout-ms 2000 --to {to}");
    let output = from.probe(&line).expect("probe");
    output.json().expect("a report")
}

#[test]
fn connection_in_progress_survives_enrollment() {
    let lab = lab();
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let to = SocketAddr::new(b.v4().into(), PORT);
    let _server = b.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    // The other node has no agent: whoever is captured finds nobody there.
    let agent = agent(&lab, 1);
    label(&lab, &b, None, "enabled");
    let way = b.output("ip -4 route show default").expect("output");
    b.output("ip -4 route del default").expect("output");
    let line = format!("hold --to {to} --timeout-ms 14000 --seconds 1");
    let client = a.start_probe(&line).expect("client");
    eventually("a SYN without an answer", SOON, || {
        a.output("ss -Htn state syn-sent")
            .expect("output")
            .contains(&to.to_string())
            .then_some(())
    })
    .expect("connecting");
    label(&lab, &a, Some(&agent), "enabled");
    b.output(&format!("ip -4 route add {}", way.trim()))
        .expect("output");
    let said = client.line(SOON).expect("line").expect("no end");
    assert!(said.contains("open"), "{said}\n{}", agent.log_tail());
    // It has the right that it began with; nothing that begins now has it.
    let later = tcp(&a, to);
    assert!(!later.ok, "in clear from an enrolled pod: {later:?}");
}

#[test]
fn open_connections_survive_unenrollment() {
    let lab = lab();
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let to = SocketAddr::new(b.v4().into(), PORT);
    let _server = b.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let agents = [agent(&lab, 1), agent(&lab, 2)];
    for (pod, agent) in [(&a, &agents[0]), (&b, &agents[1])] {
        label(&lab, pod, Some(agent), "enabled");
    }
    eventually("a connection", SOON, || tcp(&a, to).ok.then_some(())).expect("connected");
    let line = format!("hold --to {to} --say {WORD} --pulse-ms 10");
    let mut open = a.start_probe(&line).expect("client");
    open.line(SOON).expect("line").expect("open");
    let capture = lab.capture_wire().expect("capture");
    label(&lab, &a, Some(&agents[0]), "disabled");
    label(&lab, &b, Some(&agents[1]), "disabled");
    let new = tcp(&a, to);
    assert!(new.ok && new.ends_agree(), "{new:?}");
    std::thread::sleep(Duration::from_secs(2));
    assert!(
        open.ended().expect("look").is_none(),
        "it ended: {}",
        agents[0].log_tail()
    );
    let seen = capture.stop().expect("capture");
    seen.complete().expect("no frame lost");
    assert_eq!(seen.find(WORD.as_bytes()).expect("search"), []);
    assert_eq!(seen.tcp_service_ports(), [PORT, 15_008]);
    open.signal(libc::SIGKILL).expect("ended");
    for pod in [&a, &b] {
        eventually("the rules to go", SOON, || {
            (!pod.output("ip rule").expect("output").contains("1978")).then_some(())
        })
        .expect("nothing of ours is left");
    }
}
