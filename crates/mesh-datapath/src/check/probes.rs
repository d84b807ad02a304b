// SPDX-License-Identifier: Apache-2.0
//! Tests the node's mounts, capabilities, CNI plugin and socket options.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::Path;

use mesh_common::settings::{MARK_CAPTURE, MARK_MASK, RULE_PRIORITY, TABLE_CAPTURE};
use mesh_common::{Endpoint, Protocol};

use super::{Finding, Outcome};
use crate::Host;
use crate::cni;
use mesh_sys::netns::NetNs;
use mesh_sys::route::{Family, Routing, Rule};
use mesh_sys::sock_diag::{SockDiag, States};
use mesh_sys::socket;

pub(super) fn finding(
    what: &'static str,
    needed: bool,
    outcome: Outcome,
    meaning: &'static str,
) -> Finding {
    Finding {
        what,
        needed,
        outcome,
        meaning,
    }
}

fn outcome<T>(tried: io::Result<T>, detail: impl Into<String>) -> Outcome {
    match tried {
        Ok(_) => Outcome::Present(detail.into()),
        Err(error) => Outcome::Missing(error.to_string()),
    }
}

/// The oldest supported kernel version.
const OLDEST: (u32, u32) = (5, 15);

/// The capabilities with which the agent is deployed (numbers of linux/capability.h). CAP_NET_BIND_SERVICE serves
/// clients whose port is below 1024; CAP_SYS_PTRACE serves to find the network namespaces of pods.
const CAPABILITIES: [(u32, &str); 4] = [
    (12, "CAP_NET_ADMIN"),
    (10, "CAP_NET_BIND_SERVICE"),
    (21, "CAP_SYS_ADMIN"),
    (19, "CAP_SYS_PTRACE"),
];

pub(super) fn machine(config: &Host) -> Vec<Finding> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = |path: &Path, kind: &str| match filesystem(&mounts, path) {
        Some(found) if found == kind => Outcome::Present(path.display().to_string()),
        Some(found) => Outcome::Missing(format!("{} is on a {found} file system", path.display())),
        None => Outcome::Missing(format!("{} does not exist", path.display())),
    };
    vec![
        finding(
            "kernel",
            false,
            release(),
            "The kernel is older than the oldest supported version; the lines below list the missing features.",
        ),
        finding(
            "capabilities",
            true,
            capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
            "The agent must run as root, with the capabilities in deploy/base/agent.yaml.",
        ),
        finding(
            "BTF",
            true,
            outcome(
                fs::metadata("/sys/kernel/btf/vmlinux"),
                "/sys/kernel/btf/vmlinux",
            ),
            "Socket-local storage needs a kernel with CONFIG_DEBUG_INFO_BTF.",
        ),
        finding(
            "cgroup2",
            true,
            mounted(&config.cgroup, "cgroup2"),
            "The eBPF programs cannot be attached to pods. Mount cgroup2, or set its path with --cgroup; a \
             container needs the host's mount.",
        ),
        finding(
            "bpffs",
            true,
            mounted(&config.bpffs, "bpf"),
            "Pods would lose their protection when the agent stops. Run: mount -t bpf bpf /sys/fs/bpf",
        ),
        finding(
            "CNI plugin",
            false,
            cni_plugin(config),
            "Pods have no host-side interface and cannot be protected.",
        ),
        finding(
            "no other socket hooks",
            false,
            socket_hooks(config),
            cni::BALANCERS,
        ),
        finding(
            "pod interfaces",
            false,
            outcome_text(pod_interfaces()),
            "The check cannot tell whether pods can be protected.",
        ),
    ]
}

fn cni_plugin(config: &Host) -> Outcome {
    let links = Routing::open().and_then(|mut routing| routing.links());
    let links: Vec<String> = links
        .unwrap_or_default()
        .into_iter()
        .map(|link| link.name)
        .collect();
    match cni::find(&config.cni_conf, &links) {
        Some(cni) if !cni.gate => Outcome::Missing(cni.to_string()),
        Some(cni) => Outcome::Present(cni.to_string()),
        None => Outcome::Present(format!(
            "no known CNI plugin in {}",
            config.cni_conf.display()
        )),
    }
}

fn socket_hooks(config: &Host) -> Outcome {
    match cni::balancers(&config.cgroup) {
        Ok(others) if others.is_empty() => Outcome::Present("none".to_owned()),
        Ok(others) => Outcome::Missing(others.join(", ")),
        Err(error) => Outcome::Missing(error.to_string()),
    }
}

/// Counts the interfaces with a peer in another network namespace, to which the gate can be attached.
fn pod_interfaces() -> io::Result<String> {
    let links = Routing::open()?.links()?;
    let gated = links
        .iter()
        .filter(|link| link.peer_namespace.is_some())
        .count();
    Ok(format!("{gated} suitable for the gate"))
}

fn outcome_text(tried: io::Result<String>) -> Outcome {
    match tried {
        Ok(text) => Outcome::Present(text),
        Err(error) => Outcome::Missing(error.to_string()),
    }
}

fn release() -> Outcome {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let text = text.trim().to_owned();
    match version(&text) {
        Some(version) if version >= OLDEST => Outcome::Present(text),
        Some(_) | None => Outcome::Missing(text),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn capabilities(status: &str) -> Outcome {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Outcome::Present(CAPABILITIES.map(|(_, name)| name).join(", "))
    } else {
        Outcome::Missing(format!("missing {}", missing.join(", ")))
    }
}

/// Returns the type of a path's file system, from the content of `/proc/self/mountinfo`.
fn filesystem(mounts: &str, path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    mounts
        .lines()
        .filter_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let mount_point = Path::new(place.split(' ').nth(4)?);
            let inside = path.starts_with(mount_point);
            inside.then_some((mount_point, kind.split(' ').next()?))
        })
        // The later of two mounts on one mount point is visible.
        .max_by_key(|(mount_point, _)| mount_point.components().count())
        .map(|(_, kind)| kind.to_owned())
}

const TRANSPARENT: &str = "transparent sockets";
const PORT_RANGE: &str = "IP_LOCAL_PORT_RANGE";

/// Tests socket features, in a temporary network namespace where needed.
pub(super) fn sockets() -> Vec<Finding> {
    let inside = |f: fn() -> io::Result<()>| NetNs::fresh().and_then(|netns| netns.run(f)?);
    let cookie = NetNs::own().and_then(|netns| netns.cookie());
    vec![
        finding(
            "SO_NETNS_COOKIE",
            true,
            outcome(cookie, "network namespaces can be identified"),
            "The network namespaces of pods cannot be identified (needs Linux 5.14).",
        ),
        finding(
            TRANSPARENT,
            true,
            outcome(inside(transparent), "IPv4"),
            "The agent cannot connect with the addresses of clients (needs CAP_NET_ADMIN, not \
             CONFIG_NETFILTER).",
        ),
        finding(
            "routing by mark",
            true,
            outcome(inside(rule), "ip rule fwmark"),
            "Connections cannot be captured (needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_FIB_RULES).",
        ),
        finding(
            "tcp_fwmark_accept",
            true,
            outcome(inside(fwmark_accept), "net.ipv4.tcp_fwmark_accept"),
            "Replies of applications to the agent are routed out of the pod.",
        ),
        finding(
            "IPv6",
            false,
            outcome(fs::metadata("/proc/net/if_inet6"), "available"),
            "The agent handles only IPv4 traffic, and serves metrics on IPv4.",
        ),
        finding(
            "SOCK_DESTROY",
            false,
            outcome(destroy(), "sockets can be destroyed"),
            "A policy change does not close open direct connections (needs CONFIG_INET_DIAG_DESTROY).",
        ),
        finding(
            PORT_RANGE,
            false,
            outcome(port_range(), "local ports of the agent are separate"),
            "In rare cases, the agent uses a port that an application wants to bind (needs Linux \
             6.3).",
        ),
    ]
}

fn transparent() -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    socket::set_transparent(socket.as_fd(), &any)?;
    // TEST-NET-1 (RFC 5737) is never an address of this namespace.
    socket.bind(&SocketAddr::from(([192, 0, 2, 1], 1)).into())
}

fn rule() -> io::Result<()> {
    Routing::open()?.add_rule(&Rule {
        family: Family::V4,
        mark: MARK_CAPTURE,
        mask: MARK_MASK,
        table: TABLE_CAPTURE,
        priority: RULE_PRIORITY,
    })
}

fn fwmark_accept() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1")
}

fn port_range() -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket::set_local_port_range(socket.as_fd(), 60_000, 60_999)
}

/// Destroys a loopback connection of this process, found by its addresses.
fn destroy() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (local, remote) = (client.local_addr()?, client.peer_addr()?);
    let ends = (Endpoint::from(local), Endpoint::from(remote));
    let mut diag = SockDiag::open()?;
    let sockets = diag.sockets(Protocol::TCP, States::LIVE)?;
    let ours = sockets
        .iter()
        .find(|socket| (socket.local, socket.remote) == ends)
        .ok_or_else(|| io::Error::other("the test connection is not listed"))?;
    if diag.destroy(ours)? {
        Ok(())
    } else {
        Err(io::Error::other("the test connection was already closed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_version_is_parsed() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("5.15"), Some((5, 15)));
        assert_eq!(version("odd"), None);
    }

    #[test]
    fn missing_capabilities_are_reported() {
        let Outcome::Missing(why) = capabilities("CapPrm:\t0\nCapEff:\t0000000000081400\n") else {
            panic!("CAP_SYS_ADMIN is not in the mask")
        };
        assert_eq!(why, "missing CAP_SYS_ADMIN");
        let all = capabilities("CapEff:\t000001ffffffffff\n");
        assert!(matches!(all, Outcome::Present(_)));
    }

    #[test]
    fn innermost_mount_determines_the_file_system() {
        let mounts = "1 0 0:1 / / rw - ext4 /dev/x rw\n2 1 0:2 / /proc rw - proc proc rw\n";
        let of = |path: &str| filesystem(mounts, Path::new(path));
        assert_eq!(of("/proc/self").as_deref(), Some("proc"));
        assert_eq!(of("/usr").as_deref(), Some("ext4"));
        assert_eq!(of("/does/not/exist"), None);
    }
}
