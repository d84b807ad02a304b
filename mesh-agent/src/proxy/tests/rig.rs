// SPDX-License-Identifier: Apache-2.0
//! Two nodes with their pods, and substitutes for the kernel programs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use mesh_common::pod::{PodIndex, PodView};
use mesh_common::{Addr, Endpoint, IdentityId, Peer, PodState, Port};
use mesh_datapath::pods::{Listeners, PodHandle, PodTable};
pub(super) use mesh_identity::Config as IdentityConfig;
use mesh_identity::{Ca, Clock, SpiffeId, TrustDomain};
use mesh_plan::cluster::{ObjectName, Pod};
use mesh_plan::plan::LocalPod;
use mesh_plan::{Index, Plan};
use mesh_sys::netns::NetNs;
use mesh_telemetry::flows::{Flows, Target};
use mesh_telemetry::metrics::Metrics;
use mesh_tunnel::Socket;
use serde_json::Value;
use socket2::{Domain, Socket as RawSocket, Type};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::super::pod_sockets::{Addresses, Connecting, PeerAddress, PodSockets};
use super::super::*;

pub(super) const CLIENT: &str = "10.244.0.2";
pub(super) const SERVER: &str = "10.244.1.3";

const CLIENT_ID: IdentityId = IdentityId(1000);
const SERVER_ID: IdentityId = IdentityId(1001);

/// Each rig has a second octet of its own, so that tests can run at the same time.
fn next_net() -> u8 {
    static NEXT: AtomicUsize = AtomicUsize::new(10);
    u8::try_from(NEXT.fetch_add(1, Relaxed)).unwrap()
}

/// Maps addresses of pods to loopback addresses in a network of the rig's own.
#[derive(Clone)]
pub(super) struct Loopback {
    net: u8,
    /// Tunnels that were dialled.
    pub(super) dialled: Arc<AtomicUsize>,
    /// Dials that are still to be refused, as by a peer that is not up yet.
    pub(super) refuse: Arc<AtomicUsize>,
    /// The client's address and port at the last hand-over.
    pub(super) client: Arc<OnceLock<SocketAddr>>,
}

impl Loopback {
    /// `10.244.b.c` as the agent's listeners and sockets of pods have it.
    pub(super) fn real(&self, at: SocketAddr) -> SocketAddr {
        let IpAddr::V4(v4) = at.ip() else {
            panic!("{at}")
        };
        let [_, _, c, d] = v4.octets();
        (Ipv4Addr::new(127, self.net, c, d), at.port()).into()
    }

    /// The same, as applications of pods have it.
    pub(super) fn application(&self, at: SocketAddr) -> SocketAddr {
        let mut real = self.real(at);
        if let IpAddr::V4(v4) = real.ip() {
            let [a, b, c, d] = v4.octets();
            real.set_ip(Ipv4Addr::new(a, b, c + 100, d).into());
        }
        real
    }

    fn pod(at: SocketAddr) -> SocketAddr {
        let IpAddr::V4(v4) = at.ip() else {
            panic!("{at}")
        };
        let [_, _, c, d] = v4.octets();
        (Ipv4Addr::new(10, 244, c, d), at.port()).into()
    }

    pub(super) fn connect(
        &self,
        from: SocketAddr,
        to: SocketAddr,
    ) -> io::Result<std::net::TcpStream> {
        let socket = RawSocket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_reuse_address(true)?;
        socket.bind(&self.real(from).into())?;
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        Ok(socket.into())
    }
}

impl PodSockets for Loopback {
    fn addresses(&self, socket: &Socket) -> io::Result<Addresses> {
        Ok(Addresses {
            local: Self::pod(socket.local_addr()?),
            peer: Self::pod(socket.peer_addr()?),
        })
    }

    fn peer(&self, _: &PodHandle, address: PeerAddress) -> io::Result<std::net::TcpStream> {
        self.dialled.fetch_add(1, Relaxed);
        let mut to = self.real(address.to);
        let refuse = self
            .refuse
            .fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if refuse.is_ok() {
            to.set_port(1);
        }
        self.connect(address.from, to)
    }

    fn application(
        &self,
        _: &PodHandle,
        client: SocketAddr,
        to: SocketAddr,
    ) -> io::Result<Connecting> {
        self.client.get_or_init(|| client);
        let any = SocketAddr::new(to.ip(), 0);
        let stream = self.connect(any, Self::application(self, to))?;
        Ok(Connecting {
            stream,
            connected: false,
        })
    }

    fn service(&self, _: &PodHandle, to: Endpoint, _: Port) -> Option<Endpoint> {
        (to.port.get() != 0).then(|| at("10.96.0.1:80"))
    }
}

pub(super) fn at(text: &str) -> Endpoint {
    text.parse::<SocketAddr>().unwrap().into()
}

pub(super) fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

/// One node.
pub(super) struct Node {
    pub(super) proxy: ProxyHandle,
    pub(super) in_force: watch::Sender<Arc<InForce>>,
    pub(super) metrics: Metrics,
    flows: Flows,
}

impl Node {
    /// A number on the page of metrics; 0 if it is not there.
    pub(super) fn metric(&self, series: &str) -> u64 {
        let page = self
            .metrics
            .page(mesh_telemetry::metrics::Format::Prometheus);
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0, |number| number.trim().parse().unwrap())
    }

    /// The same, once it is at least `count`: what a peer sees may come before it is counted.
    pub(super) async fn counted(&self, series: &str, count: u64) -> u64 {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let now = self.metric(series);
            if now >= count {
                return now;
            }
            assert!(Instant::now() < until, "{series}: {now} of {count}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Plan)) {
        self.in_force.send_modify(|now| {
            let mut plan = now.plan.plan().clone();
            change(&mut plan);
            let now = Arc::make_mut(now);
            now.plan = Arc::new(Index::new(plan));
            now.revision += 1;
        });
    }

    /// The records so far, once there are `count`.
    pub(super) async fn records(&self, count: usize) -> Vec<Value> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let lines = self.flows.sink().recent().await;
            if lines.len() >= count {
                assert_eq!(lines.len(), count, "{lines:?}");
                return lines
                    .iter()
                    .map(|l| serde_json::from_str(l).unwrap())
                    .collect();
            }
            assert!(Instant::now() < until, "{count} records: {lines:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Two nodes, a client pod on one and a server pod on the other.
pub(super) struct Rig {
    pub(super) near: Node,
    pub(super) far: Node,
    pub(super) net: Loopback,
    pub(super) identities: Identities,
    pub(super) timing: Timing,
    pub(super) tunnel_port: Port,
    tunnel: TcpListener,
    pub(super) ca: tempfile::TempDir,
}

/// The listener of the client's node for a destination: here every destination needs one.
pub(super) struct Route {
    pub(super) to: SocketAddr,
    pub(super) application: tokio::net::TcpListener,
}

pub(super) fn now() -> SystemTime {
    #[expect(clippy::disallowed_methods, reason = "a test's wall clock")]
    SystemTime::now()
}

pub(super) fn timing() -> Timing {
    Timing {
        unknown_peer: Duration::from_millis(500),
        ..Timing::default()
    }
}

fn workload(name: &str) -> Pod {
    Pod {
        name: ObjectName::new("shop", name),
        uid: name.into(),
        workload: ("Deployment".to_owned(), name.to_owned()),
        service_account: format!("{name}-sa"),
        ..Pod::default()
    }
}

fn plan(local: &str) -> Plan {
    let mut plan = Plan::default();
    for (name, ip, id) in [("client", CLIENT, CLIENT_ID), ("server", SERVER, SERVER_ID)] {
        let flags = Peer::ENROLLED | Peer::READY | Peer::POD;
        plan.peers.insert(addr(ip), Peer { id, flags, pad: 0 });
        plan.names
            .workloads
            .insert(addr(ip), Arc::new(workload(name)));
        if name == local {
            plan.pods.insert(name.to_owned(), local_pod(name, ip, id));
        }
    }
    plan
}

fn local_pod(name: &str, ip: &str, id: IdentityId) -> LocalPod {
    LocalPod {
        name: ObjectName::new("shop", name),
        service_account: format!("{name}-sa"),
        addresses: [ip.parse().unwrap()].into(),
        netns_path: None,
        static_uid: None,
        deny: None,
        view: PodView {
            id,
            v4: addr(ip),
            flags: PodState::ENROLLED,
            ..PodView::default()
        },
    }
}

fn table(plan: &Plan, listeners: Listeners) -> Arc<PodTable> {
    let uid = plan.pods.keys().next().unwrap();
    let handle = PodHandle {
        uid: uid.clone(),
        index: PodIndex(0),
        netns: Arc::new(NetNs::own().unwrap()),
        netns_cookie: 0,
        listeners: Some(Arc::new(listeners)),
        link: 0,
        mac: [0; 8],
    };
    Arc::new(BTreeMap::from([(uid.clone(), Arc::new(handle))]))
}

const NOBODY: Listeners = Listeners {
    outbound4: None,
    outbound6: None,
    tunnel4: None,
    tunnel6: None,
};

fn listener(at: SocketAddr) -> TcpListener {
    let listener = TcpListener::bind(at).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

impl Rig {
    pub(super) async fn new() -> (Self, Route) {
        Self::with(timing()).await
    }

    pub(super) async fn with(timing: Timing) -> (Self, Route) {
        Self::of(timing, |_, _| {}).await
    }

    /// With another configuration of certificates; `change` is also given a directory.
    pub(super) async fn of(
        timing: Timing,
        change: impl FnOnce(&mut IdentityConfig, &std::path::Path),
    ) -> (Self, Route) {
        let net = Loopback {
            net: next_net(),
            dialled: Arc::default(),
            refuse: Arc::default(),
            client: Arc::default(),
        };
        let ca = tempfile::tempdir().unwrap();
        let mut config = IdentityConfig {
            ca: Ca::SelfSigned(ca.path().to_owned()),
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            aliases: Vec::new(),
            alpn: mesh_tunnel::ALPN,
            crls: Vec::new(),
            clock: Clock::new(now),
            seed: 1,
        };
        change(&mut config, ca.path());
        let wanted: BTreeSet<_> = ["client-sa", "server-sa", "other-sa"]
            .map(|sa| SpiffeId::new(&config.trust_domain, "shop", sa).unwrap())
            .into();
        let (sender, receiver) = watch::channel(wanted.clone());
        let identities = Identities::start(config, receiver).await.unwrap();
        for id in &wanted {
            identities.ready(id).await.unwrap();
        }
        // The requested identities do not change until the process ends.
        std::mem::forget(sender);

        let server: SocketAddr = format!("{SERVER}:0").parse().unwrap();
        let tunnel = listener(net.real(server));
        let tunnel_port = Port::new(tunnel.local_addr().unwrap().port());
        let outbound = listener(net.real(server));
        let port = outbound.local_addr().unwrap().port();
        let to = SocketAddr::new(server.ip(), port);
        let application = listener(net.application(to));
        let application = tokio::net::TcpListener::from_std(application).unwrap();

        let far = Listeners {
            tunnel4: Some(tunnel.try_clone().unwrap()),
            ..NOBODY
        };
        let near = Listeners {
            outbound4: Some(outbound),
            ..NOBODY
        };
        let rig = Self {
            near: node("client", near, &net, &identities, timing, tunnel_port),
            far: node("server", far, &net, &identities, timing, tunnel_port),
            net,
            identities,
            timing,
            tunnel_port,
            tunnel,
            ca,
        };
        (rig, Route { to, application })
    }

    /// Replaces the agent of the server's node.
    pub(super) async fn restart_far(&mut self) {
        let listeners = Listeners {
            tunnel4: Some(self.tunnel.try_clone().unwrap()),
            ..NOBODY
        };
        let next = node(
            "server",
            listeners,
            &self.net,
            &self.identities,
            self.timing,
            self.tunnel_port,
        );
        let old = std::mem::replace(&mut self.far, next);
        old.proxy.finish().await;
    }

    /// Connects to a destination as the client's application, and is captured.
    pub(super) async fn connect(&self, route: &Route) -> TcpStream {
        let from = format!("{CLIENT}:0").parse().unwrap();
        let stream = self.net.connect(from, self.net.real(route.to)).unwrap();
        let stream = TcpStream::from_std(stream).unwrap();
        stream.writable().await.unwrap();
        stream
    }

    /// Both applications' ends of a connection.
    pub(super) async fn pair(&self, route: &Route) -> (TcpStream, TcpStream) {
        let (client, accepted) = tokio::join!(self.connect(route), route.application.accept());
        (client, accepted.unwrap().0)
    }
}

fn node(
    name: &str,
    listeners: Listeners,
    net: &Loopback,
    identities: &Identities,
    timing: Timing,
    tunnel_port: Port,
) -> Node {
    let metrics = Metrics::new();
    let flows = Flows::start(&Target::Off, &metrics).unwrap();
    let plan = Index::new(plan(name));
    let first = InForce {
        revision: 1,
        pods: table(&plan, listeners),
        plan: Arc::new(plan),
        ..InForce::default()
    };
    let (sender, in_force) = watch::channel(Arc::new(first));
    let policy = in_force.clone();
    let recorder = Recorder::new(
        name,
        move || policy.borrow().policy(),
        metrics.clone(),
        flows.sink(),
        now,
    );
    let dependencies = Dependencies {
        in_force,
        identities: identities.clone(),
        recorder,
    };
    let config = Config {
        workers: NonZeroUsize::new(2).unwrap(),
        tunnel_port,
        real_ports: false,
        timing,
    };
    let net = net.clone();
    let proxy = start_with(config, dependencies, move || Box::new(net.clone())).unwrap();
    Node {
        proxy,
        in_force: sender,
        metrics,
        flows,
    }
}

/// Whether reading ends with a reset.
pub(super) async fn is_reset(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 64]).await {
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}
