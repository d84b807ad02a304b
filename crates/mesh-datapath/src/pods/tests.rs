// SPDX-License-Identifier: Apache-2.0
//! Tests enrollment in real network namespaces.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use mesh_common::settings::{MARK_CAPTURE, MARK_INBOUND};

use super::lab::{Lab, V4, V6, lab};
use super::*;
use mesh_sys::lab::ip;

impl Lab {
    fn find(&self) -> Result<PodNetns, Error> {
        self.node
            .run(|| find("uid", &self.local, &find::ByAnnotation))
            .expect("it can be entered")
    }

    /// Returns all rules and routes that `ip` shows, and the sysctls.
    fn state(&self) -> String {
        self.pod
            .run(|| {
                let mut text = String::new();
                for family in ["-4", "-6"] {
                    text += &ip(&[family, "rule"]);
                    text += &ip(&[family, "route", "show", "table", "all"]);
                }
                let switch = |name| {
                    std::fs::read_to_string(format!("/proc/sys/net/{name}"))
                        .expect("the kernel has it")
                };
                text += &switch("ipv4/fwmark_reflect");
                text += &switch("ipv6/fwmark_reflect");
                text + &switch("ipv4/tcp_fwmark_accept")
            })
            .expect("it can be entered")
    }
}

#[test]
fn interface_is_found_by_address_with_its_veth_peer() {
    let lab = lab(&[V4, V6]);
    let pod_netns = lab.find().unwrap();
    assert_eq!(pod_netns.interface.name, "net7");
    let (index, mac) = lab
        .node
        .run(|| {
            let host = ip(&["-o", "link", "show", "host7"]);
            let index: u32 = host.split(':').next().unwrap().parse().unwrap();
            (index, host)
        })
        .unwrap();
    assert_eq!(pod_netns.interface.host_index, index);
    assert_ne!(pod_netns.interface.mac[..6], [0; 6]);
    assert_eq!(pod_netns.interface.mac[6..], [0; 2]);
    assert!(!mac.is_empty());
    let shown = lab.pod.run(|| ip(&["-o", "link", "show", "net7"])).unwrap();
    let text: Vec<String> = pod_netns.interface.mac[..6]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert!(shown.contains(&text.join(":")), "{shown}");
    assert_eq!(pod_netns.cookie, lab.pod.cookie().unwrap());
    assert!(pod_netns.is_there());
}

#[test]
fn interface_with_veth_peer_in_another_namespace_has_no_host_index() {
    let lab = lab(&[V4]);
    // The test's own namespace is not the one of the veth peer.
    let pod_netns = find("uid", &lab.local, &find::ByAnnotation).unwrap();
    assert_eq!(pod_netns.interface.host_index, 0);
}

#[test]
fn namespace_without_the_pods_address_is_rejected() {
    let mut lab = lab(&[V4]);
    lab.local.addresses.insert(V6.parse().unwrap());
    assert!(
        matches!(lab.find(), Err(Error::AddressNotFound { address, .. }) if address.to_string() == V6)
    );
    lab.local.netns_path = None;
    assert!(matches!(lab.find(), Err(Error::NoAnnotation)));
    lab.local.netns_path = Some("/run/netns/no-such".to_owned());
    assert!(matches!(lab.find(), Err(Error::Open { .. })));
}

#[test]
fn unenroll_restores_the_previous_configuration() {
    for addresses in [&[V4, V6][..], &[V4], &[V6]] {
        let lab = lab(addresses);
        let before = lab.state();
        let pod_netns = lab.find().unwrap();
        let (listeners, list) = enroll(&pod_netns, &lab.local).unwrap();
        let during = lab.state();
        for address in addresses {
            let route = format!("local default dev net7 table {}", TABLE_CAPTURE_TEXT);
            assert!(during.contains(&route), "{during}");
            assert!(during.contains(&format!("src {address}")), "{during}");
        }
        assert!(during.contains("fwmark 0x4d0000/0xff0000 lookup 19781"));
        assert!(during.contains("fwmark 0x6d0000/0xff0000 lookup 19782"));
        assert!(during.ends_with("1\n"));
        assert_eq!(listeners.iter().count(), 2 * addresses.len());
        // Enrollment after an agent restart changes nothing.
        let (_again, same) = enroll(&pod_netns, &lab.local).unwrap();
        assert_eq!(lab.state(), during);
        assert_eq!(same, list);
        let found = netns_config::present(&pod_netns.netns).unwrap();
        for made in &list {
            assert!(found.contains(made), "{made} is not found");
        }
        unenroll(&pod_netns, &list).unwrap();
        assert_eq!(lab.state(), before);
        unenroll(&pod_netns, &list).expect("removing absent items succeeds");
        assert!(netns_config::present(&pod_netns.netns).unwrap().is_empty());
    }
}

const TABLE_CAPTURE_TEXT: &str = "19781";

#[test]
fn flushed_rules_and_routes_are_repaired_and_reported() {
    let lab = lab(&[V4, V6]);
    let pod_netns = lab.find().unwrap();
    let (_listeners, list) = enroll(&pod_netns, &lab.local).unwrap();
    let whole = lab.state();
    assert!(
        netns_config::ensure(&pod_netns.netns, &list)
            .unwrap()
            .is_empty()
    );
    lab.pod
        .run(|| {
            // Only the mesh's rule and routes: a pod that flushes the kernel's rules has no network.
            ip(&["-4", "rule", "del", "priority", "9000"]);
            ip(&["-6", "route", "flush", "table", TABLE_CAPTURE_TEXT]);
        })
        .unwrap();
    let repaired = netns_config::ensure(&pod_netns.netns, &list).unwrap();
    assert_eq!(repaired.len(), 2, "{repaired:?}");
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&lab.state()), sorted(&whole));
}

#[test]
fn pod_that_listens_on_the_tunnel_port_is_not_enrolled() {
    for (at, refused) in [
        ("0.0.0.0:15008", true),
        ("[::]:15008", true),
        ("127.0.0.1:15008", false),
    ] {
        let lab = lab(&[V4, V6]);
        let before = lab.state();
        let pod_netns = lab.find().unwrap();
        let _held = lab.pod.run(|| TcpListener::bind(at)).unwrap().unwrap();
        let result = enroll(&pod_netns, &lab.local);
        if refused {
            assert!(matches!(result, Err(Error::TunnelPortTaken { .. })), "{at}");
            assert_eq!(lab.state(), before);
        } else {
            assert!(result.is_ok(), "{at}");
        }
    }
}

#[test]
fn only_marked_connections_are_delivered_to_the_pod_itself() {
    let lab = lab(&[V4, V6]);
    let pod_netns = lab.find().unwrap();
    let _made = enroll(&pod_netns, &lab.local).unwrap();
    for (to, any) in [
        ("203.0.113.5:80", "0.0.0.0:80"),
        ("[2001:db8::5]:80", "[::]:80"),
    ] {
        let to: SocketAddr = to.parse().unwrap();
        lab.pod
            .run(|| {
                // The listener accepts connections to any address that is delivered locally.
                let listener = socket::transparent_listener(any.parse().unwrap(), 16).unwrap();
                listener.set_nonblocking(false).unwrap();
                // Mark bits of the application are ignored.
                for mark in [MARK_CAPTURE, MARK_CAPTURE | 0x77] {
                    let client = socket::outgoing(SocketAddr::new(unspecified(&to), 0)).unwrap();
                    client.set_nonblocking(false).unwrap();
                    socket::set_mark(client.as_fd(), mark).unwrap();
                    client
                        .connect_timeout(&to.into(), Duration::from_secs(2))
                        .unwrap();
                    let (accepted, from) = listener.accept().unwrap();
                    assert_eq!(accepted.local_addr().unwrap(), to);
                    assert!(lab.local.addresses.contains(&from.ip()), "{from}");
                }
                for mark in [0, MARK_CAPTURE >> 8, 0x0001_0000] {
                    let client = socket::outgoing(SocketAddr::new(unspecified(&to), 0)).unwrap();
                    socket::set_mark(client.as_fd(), mark).unwrap();
                    let error = client.connect(&to.into()).unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable, "{mark:#x}");
                }
            })
            .unwrap();
    }
}

fn unspecified(like: &SocketAddr) -> IpAddr {
    match like {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Connects as the agent does on behalf of a client. A process that another test is starting can hold the
/// previous socket for a moment.
fn handed_over(client: SocketAddr, at: SocketAddr) -> socket2::Socket {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let socket = socket::on_behalf_of(client, MARK_INBOUND).unwrap();
        socket.set_nonblocking(false).unwrap();
        match socket.connect_timeout(&at.into(), Duration::from_secs(2)) {
            Ok(()) => return socket,
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => panic!("{client}: {e}"),
        }
    }
}

#[test]
fn application_sees_the_clients_address_and_port() {
    let lab = lab(&[V4, V6]);
    let pod_netns = lab.find().unwrap();
    let _made = enroll(&pod_netns, &lab.local).unwrap();
    for (client, own) in [("10.244.3.7:40001", V4), ("[fd00:3::7]:40001", V6)] {
        let client: SocketAddr = client.parse().unwrap();
        let at = SocketAddr::new(own.parse().unwrap(), 8080);
        lab.pod
            .run(|| {
                let listener = TcpListener::bind(at).unwrap();
                // A client port can be reused at once.
                for _ in 0..2 {
                    let socket = handed_over(client, at);
                    let (accepted, from) = listener.accept().unwrap();
                    assert_eq!(from, client);
                    assert_eq!(accepted.local_addr().unwrap(), at);
                    socket.set_linger(Some(Duration::ZERO)).unwrap();
                }
            })
            .unwrap();
    }
}

#[test]
fn agent_listeners_block_no_application_port() {
    let lab = lab(&[V4]);
    let pod_netns = lab.find().unwrap();
    let (listeners, _list) = enroll(&pod_netns, &lab.local).unwrap();
    let port = listeners
        .outbound4
        .as_ref()
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    lab.pod
        .run(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
            let socket = socket.unwrap();
            socket.set_reuse_port(true).unwrap();
            let at: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
            let stolen = socket.bind(&at.into()).and_then(|()| socket.listen(1));
            assert!(
                stolen.is_err(),
                "a process of the pod joined the agent's listener"
            );
            // The same port is free on the pod's own address.
            TcpListener::bind(format!("{V4}:{port}")).expect("the application may have the port");
            let outside = TcpStream::connect(format!("{V4}:{port}")).unwrap_err();
            assert_eq!(outside.kind(), io::ErrorKind::ConnectionRefused);
        })
        .unwrap();
}

#[tokio::test]
async fn watch_reports_a_flush_and_releases_the_namespace() {
    let lab = lab(&[V4]);
    let pod_netns = lab.find().unwrap();
    let (_listeners, _list) = enroll(&pod_netns, &lab.local).unwrap();
    let (sender, mut receiver) = tokio::sync::mpsc::channel(4);
    let watch = watch::start(&pod_netns.netns, "uid".to_owned(), sender).unwrap();
    lab.pod
        .run(|| ip(&["rule", "del", "priority", "9000"]))
        .unwrap();
    let told = tokio::time::timeout(Duration::from_secs(5), receiver.recv()).await;
    assert_eq!(told.unwrap().as_deref(), Some("uid"));
    drop(watch);
    while receiver.recv().await.is_some() {}
}

#[test]
fn namespace_is_removed_when_its_handles_are_dropped() {
    let lab = lab(&[V4]);
    let pod_netns = lab.find().unwrap();
    let enrolled = enroll(&pod_netns, &lab.local).unwrap();
    let Lab { node, pod, .. } = lab;
    drop((pod_netns, enrolled, pod));
    // The veth is removed with the namespace.
    let deadline = Instant::now() + Duration::from_secs(5);
    while node.run(|| ip(&["-o", "link"])).unwrap().contains("host7") {
        assert!(Instant::now() < deadline, "the namespace is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}
