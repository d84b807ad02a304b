// SPDX-License-Identifier: Apache-2.0
//! Tests the capture of connections without an agent: the eBPF programs with a hand-written plan, and listeners of
//! this test in place of the agent's that report what they receive.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use mesh_common::Addr;
use mesh_common::identity::{IdentityId, Peer};
use mesh_common::pod::{PodState, PodView};
use mesh_datapath::pods::find::ByAnnotation;
use mesh_datapath::pods::{self, PodNetns};
use mesh_datapath::{Config, Datapath, PodAttachment};
use mesh_plan::plan::{Entry, LocalPod, MapOp};
use mesh_test::pod::probe_cmd;
use mesh_test::reports::{Storm, Tcp};
use mesh_test::{Lab, Pod, Topology, talk};

const LONG: Duration = Duration::from_secs(300);
/// Peers in the hand-written plan: a /24 and a /120.
const PEERS: u8 = 255;

/// A directory in bpffs, removed on drop.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// A captured pod. Dropping it closes the listeners, as when the agent exits.
struct Captured {
    _datapath: Datapath,
    _pins: Pins,
    pod_netns: PodNetns,
    items: Vec<mesh_datapath::pods::netns_config::NetnsItem>,
}

impl Drop for Captured {
    fn drop(&mut self) {
        let _left = pods::unenroll(&self.pod_netns, &self.items);
    }
}

fn peer(last: u8) -> [IpAddr; 2] {
    let v6 = format!("fd00:99::{last:x}").parse().expect("an address");
    [IpAddr::from([10, 99, 0, last]), v6]
}

fn serve(listener: &TcpListener) {
    listener.set_nonblocking(false).expect("a socket");
    for _ in 0..8 {
        let listener = listener.try_clone().expect("a socket");
        thread::spawn(move || {
            // The thread exits with the test process.
            for stream in listener.incoming().flatten() {
                let _over = talk::serve(&stream, "captured");
            }
        });
    }
}

/// Captures a pod as an agent does: finds and configures its network namespace, attaches the programs and applies the
/// plan. The plan tunnels connections to the peers, and this test replies to them.
fn capture(lab: &Lab, pod: &Pod) -> Captured {
    let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/{}", lab.id())));
    fs::create_dir(&pins.0).expect("bpffs is mounted: run `cargo xtask setup`");
    let config = Config {
        bpffs: pins.0.clone(),
        cgroup: pod.node().root_cgroup().to_path_buf(),
        trace: false,
    };
    let (mut datapath, _events) = Datapath::load(&config).expect("the datapath loads");
    let local = LocalPod {
        addresses: pod.addresses().iter().copied().collect(),
        netns_path: Some(pod.path().display().to_string()),
        ..LocalPod::default()
    };
    let pod_netns = pods::find(pod.uid(), &local, &ByAnnotation).expect("the namespace");
    let (listeners, items) = pods::enroll(&pod_netns, &local).expect("prepared");
    let view = PodView {
        id: IdentityId(IdentityId::FIRST_WORKLOAD.0),
        v4: IpAddr::from(pod.v4()).into(),
        v6: IpAddr::from(pod.v6()).into(),
        flags: PodState::ENROLLED,
        ..PodView::default()
    };
    let attachment = PodAttachment {
        uid: pod.uid(),
        netns: pod_netns.netns.as_fd(),
        netns_cookie: pod_netns.cookie,
        link: None,
        mac: [0; 8],
        view,
    };
    let facts = datapath.add_pod(&attachment).expect("added");
    for (slot, listener) in listeners.iter() {
        datapath
            .set_listener(facts.index, slot, listener.as_fd())
            .expect("a listener");
    }
    let value = Peer {
        id: IdentityId(IdentityId::FIRST_WORKLOAD.0 + 1),
        flags: Peer::POD | Peer::ENROLLED | Peer::READY,
        pad: 0,
    };
    let plan: Vec<_> = (0..=PEERS)
        .flat_map(peer)
        .map(|ip| MapOp::Put(Entry::Peer(Addr::from(ip), value)))
        .collect();
    datapath.apply(&plan).expect("applied");
    for listener in [&listeners.outbound4, &listeners.outbound6] {
        serve(listener.as_ref().expect("both families"));
    }
    Captured {
        _datapath: datapath,
        _pins: pins,
        pod_netns,
        items,
    }
}

fn lab() -> Lab {
    Lab::builder(Topology::Routed)
        .pods([("a", 1), ("stranger", 1)])
        .build()
        .expect("lab")
}

#[test]
fn hundred_thousand_short_connections_at_default_sysctls() {
    let lab = lab();
    let a = lab.pod("a");
    let _captured = capture(&lab, &a);
    // Not port 15008: only agents can connect to the tunnel port of an enrolled pod.
    let line = "storm --net 10.99.0.0/24 --net fd00:99::/120 --ports 1-15000 --threads 2 \
                --count 100000 --seed 7";
    let report: Storm = a
        .run(probe_cmd(line).expect("probe"), LONG)
        .expect("run")
        .json()
        .expect("report");
    assert_eq!(
        (report.ok, report.wrong, report.failed),
        (100_000, 0, 0),
        "{report:?}"
    );
}

#[test]
fn every_kind_of_client_socket_is_captured() {
    let lab = lab();
    let a = lab.pod("a");
    let _captured = capture(&lab, &a);
    let [v4, v6] = peer(7).map(|ip| SocketAddr::new(ip, 443));
    let bound = format!("--from {}:0", a.v4());
    for (to, options) in [
        (v4, ""),
        (v6, ""),
        (v4, "--mapped"),
        (v4, "--device eth0"),
        (v6, "--device eth0"),
        (v4, "--mark 0x77"),
        (v4, "--nonblocking"),
        (v4, "--fastopen"),
        (v4, "--mptcp"),
        (v4, bound.as_str()),
    ] {
        let line = format!("tcp --to {to} {options}");
        let report: Tcp = a.probe(&line).expect("run").json().expect("report");
        assert!(report.ok, "{line}: {report:?}");
        assert!(report.ends_agree(), "{line}: {report:?}");
        assert_eq!(report.peer, Some(to), "{line}");
        let seen = report.identity.expect("an identity");
        assert_eq!(
            (seen.name.as_str(), seen.server),
            ("captured", to),
            "{line}"
        );
        assert!(a.addresses().contains(&seen.client.ip()), "{line}: {seen}");
    }
}

#[test]
fn other_hosts_cannot_reach_agent_listeners() {
    let lab = lab();
    let (a, stranger) = (lab.pod("a"), lab.pod("stranger"));
    let captured = capture(&lab, &a);
    let [to, _] = peer(9).map(|ip| SocketAddr::new(ip, 80));
    // Packets to mesh addresses that another host routes to the pod are not delivered: they have no mark.
    let route = format!(
        "ip route replace 10.99.0.0/24 via {} onlink dev eth0",
        a.v4()
    );
    let _maybe = stranger
        .run(mesh_test::Cmd::line(&route), LONG)
        .expect("run");
    let line = format!("tcp --to {to} --timeout-ms 700");
    let report: Tcp = stranger.probe(&line).expect("run").json().expect("report");
    assert!(!report.ok, "{report:?}");
    // The listeners' ports are on loopback and cannot be reached by the pod's address.
    let listening: Vec<u16> = a
        .tcp_sockets()
        .expect("ss")
        .iter()
        .filter_map(|socket| socket.local)
        .filter(|local| local.ip().is_loopback())
        .map(|local| local.port())
        .collect();
    assert!(!listening.is_empty(), "the listeners exist");
    for port in listening {
        let line = format!(
            "tcp --to {} --timeout-ms 700",
            SocketAddr::new(a.v4().into(), port)
        );
        let report: Tcp = stranger.probe(&line).expect("run").json().expect("report");
        assert_eq!(
            report.errno,
            Some(libc::ECONNREFUSED),
            "port {port}: {report:?}"
        );
    }
    // Connections of the pod itself still succeed.
    let report: Tcp = a.probe(&line).expect("run").json().expect("report");
    assert!(report.ok, "{report:?}");
    drop(captured);
}
