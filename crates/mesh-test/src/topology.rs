// SPDX-License-Identifier: Apache-2.0
//! Links, addresses and routes of the lab, in the two topologies that CNI plugins give a node.
//!
//! All `ip` commands of the lab are here, and nothing about manifests, cgroups or programs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;
use crate::wait::eventually;
use mesh_sys::testbed::{self, Placement, Rights};

/// Topology of the pod network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// No bridge, a host route for each pod, and a link-local gateway by proxy ARP, as in Calico.
    Routed,
    /// A bridge `cni0` per node with the node's pod CIDR, as in flannel with host-gw.
    Bridged,
}

/// The link-local gateway of routed pods.
const ROUTED_GATEWAY: &str = "169.254.1.1";
/// Address of the host side of every routed pod's link, derived from the MAC that Calico uses.
const ROUTED_GATEWAY6: &str = "fe80::ecee:eeff:feee:eeee";
const ROUTED_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// The bridge of a bridged node.
pub(crate) const BRIDGE: &str = "cni0";
/// Name of the link from a node, or the outside host, to the wire, in the host's own namespace.
pub(crate) const UPLINK: &str = "eth0";
/// Name of the wire's bridge.
pub(crate) const WIRE: &str = "br0";
/// Host number of the wire's own address, the nodes' default gateway.
const GATEWAY_HOST: u8 = 254;
/// Host number of the outside host.
pub(crate) const OUTSIDE_HOST: u8 = 100;

/// Returns the IPv4 address of a node, or of another host on the wire.
pub(crate) fn node_v4(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 50, host)
}

/// Returns the wire's own IPv4 address.
pub(crate) fn gateway_v4() -> Ipv4Addr {
    node_v4(GATEWAY_HOST)
}

/// Returns the IPv6 address of a node, or of another host on the wire.
pub(crate) fn node_v6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, u16::from(host))
}

/// Returns a pod's IPv4 address; host 0 is the CIDR itself, 1 the bridge.
pub(crate) fn pod_v4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, host)
}

/// Returns a pod's IPv6 address; host 0 is the CIDR itself, 1 the bridge.
pub(crate) fn pod_v6(node: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, u16::from(node), 0, 0, 0, 0, u16::from(host))
}

/// Returns a node's pod CIDRs, IPv4 first.
pub(crate) fn pod_cidrs(node: u8) -> [String; 2] {
    [
        format!("{}/24", pod_v4(node, 0)),
        format!("{}/64", pod_v6(node, 0)),
    ]
}

/// Returns the MAC address of a pod's or bridge's interface. It is derived from the IP address, as
/// in old versions of the CNI bridge plugin, so that a reused address needs no neighbor update.
pub(crate) fn mac_of(node: u8, host: u8) -> String {
    let [a, b, c, d] = pod_v4(node, host).octets();
    format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Returns the MAC address of a pod's next hop for packets that leave the node.
pub(crate) fn gateway_mac(topology: Topology, node: u8) -> String {
    match topology {
        Topology::Routed => ROUTED_MAC.to_owned(),
        Topology::Bridged => mac_of(node, 1),
    }
}

/// Runs `ip` in a namespace and returns its output.
fn ip(netns: &Netns, args: &[&str], input: &str) -> Result<Vec<u8>> {
    let mut command = Command::new("ip");
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let netns_fd = netns.descriptor()?;
    let placement = Placement {
        netns: netns_fd,
        cgroup_procs: None,
        rights: Rights::Root,
    };
    testbed::place(&mut command, placement);
    let mut child = command.spawn().context("cannot start ip")?;
    let mut stdin = child.stdin.take().context("stdin is piped")?;
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip in {}: {error}, given:\n{input}",
        netns.name()
    );
    Ok(output.stdout)
}

/// Runs a batch of `ip` commands in a namespace.
pub(crate) fn ip_batch(netns: &Netns, batch: &str) -> Result<()> {
    ip(netns, &["-batch", "-"], batch).map(drop)
}

/// Waits until every link of the namespace is operational. The kernel reports a new carrier to
/// bridges and IPv6 up to a second late, and until then frames are lost.
pub(crate) fn settle(netns: &Netns) -> Result<()> {
    let mut last = String::new();
    let what = format!("links of {} to come up", netns.name());
    let settled = eventually(&what, Duration::from_secs(10), || match unsettled(netns) {
        Ok(None) => Some(Ok(())),
        Ok(Some(link)) => {
            last = link;
            None
        }
        Err(e) => Some(Err(e)),
    });
    settled.with_context(|| format!("link {last} is not up"))?
}

/// Returns a link that is not yet operational. A bridge without ports needs no carrier.
fn unsettled(netns: &Netns) -> Result<Option<String>> {
    let output = ip(netns, &["-json", "link", "show"], "")?;
    let links: Vec<serde_json::Value> = serde_json::from_slice(&output)?;
    let pending = links.into_iter().find(|link| {
        let has = |flag: &str| {
            let flags = link["flags"].as_array();
            flags.is_some_and(|flags| flags.iter().any(|set| set == flag))
        };
        let name = link["ifname"].as_str().unwrap_or_default();
        let bridge = [WIRE, BRIDGE].contains(&name);
        let empty_bridge = bridge && !has("LOWER_UP");
        has("UP") && !has("LOOPBACK") && !empty_bridge && link["operstate"] != "UP"
    });
    Ok(pending.map(|link| link["ifname"].to_string()))
}

/// Creates the wire: a bridge with the address of the nodes' default gateway.
pub(crate) fn lay_wire(wire: &Netns) -> Result<()> {
    let (v4, v6) = (node_v4(GATEWAY_HOST), node_v6(GATEWAY_HOST));
    ip_batch(
        wire,
        &format!(
            "link set lo up\nlink add {WIRE} type bridge\naddr add {v4}/24 dev {WIRE}\n\
             addr add {v6}/64 dev {WIRE} nodad\nlink set {WIRE} up\n"
        ),
    )
}

/// Connects a host to the wire, with routes to the pods of the other `nodes`.
pub(crate) fn join_wire(
    wire: &Netns,
    host: &Netns,
    port: &str,
    number: u8,
    nodes: u8,
) -> Result<()> {
    let (v4, v6) = (node_v4(number), node_v6(number));
    let (gateway, gateway6) = (node_v4(GATEWAY_HOST), node_v6(GATEWAY_HOST));
    let mut batch = format!(
        "link set lo up\nlink add {UPLINK} type veth peer name {port} netns {}\n\
         addr add {v4}/24 dev {UPLINK}\naddr add {v6}/64 dev {UPLINK} nodad\n\
         link set {UPLINK} up\nroute add default via {gateway}\nroute add default via {gateway6}\n",
        wire.name()
    );
    for other in (1..=nodes).filter(|other| *other != number) {
        let [cidr4, cidr6] = pod_cidrs(other);
        writeln!(batch, "route add {cidr4} via {}", node_v4(other))?;
        writeln!(batch, "route add {cidr6} via {}", node_v6(other))?;
    }
    ip_batch(host, &batch)?;
    ip_batch(
        wire,
        &format!("link set {port} master {WIRE}\nlink set {port} up\n"),
    )
}

/// Adds routes from the wire to the pods of all nodes, for servers in the wire's namespace.
pub(crate) fn lead_to_pods(wire: &Netns, nodes: u8) -> Result<()> {
    let mut batch = String::new();
    for node in 1..=nodes {
        let [cidr4, cidr6] = pod_cidrs(node);
        writeln!(batch, "route add {cidr4} via {}", node_v4(node))?;
        writeln!(batch, "route add {cidr6} via {}", node_v6(node))?;
    }
    ip_batch(wire, &batch)
}

/// Adds an address to a host on the wire.
pub(crate) fn add_address(host: &Netns, address: IpAddr) -> Result<()> {
    let batch = match address {
        IpAddr::V4(v4) => format!("addr replace {v4}/32 dev {UPLINK}\n"),
        IpAddr::V6(v6) => format!("addr replace {v6}/128 dev {UPLINK} nodad\n"),
    };
    ip_batch(host, &batch)
}

/// Adds routes to addresses through another host on the wire.
pub(crate) fn add_routes(host: &Netns, to: &[IpAddr], by: u8) -> Result<()> {
    let mut batch = String::new();
    for address in to {
        match address {
            IpAddr::V4(v4) => writeln!(batch, "route replace {v4}/32 via {}", node_v4(by))?,
            IpAddr::V6(v6) => writeln!(batch, "route replace {v6}/128 via {}", node_v6(by))?,
        }
    }
    ip_batch(host, &batch)
}

/// Creates the links and settings of a node other than its uplink.
pub(crate) fn lay_node(topology: Topology, node: &Netns, number: u8) -> Result<()> {
    node.sysctl("ipv4/ip_forward", "1")?;
    node.sysctl("ipv6/conf/all/forwarding", "1")?;
    match topology {
        Topology::Routed => Ok(()),
        Topology::Bridged => ip_batch(
            node,
            &format!(
                "link add {BRIDGE} address {} type bridge\naddr add {}/24 dev {BRIDGE}\n\
                 addr add {}/64 dev {BRIDGE} nodad\nlink set {BRIDGE} up\n",
                mac_of(number, 1),
                pod_v4(number, 1),
                pod_v6(number, 1),
            ),
        ),
    }
}

/// The link of a pod to its node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PodLink<'a> {
    pub(crate) topology: Topology,
    pub(crate) node: &'a Netns,
    pub(crate) node_number: u8,
    pub(crate) pod: &'a Netns,
    pub(crate) host_number: u8,
    /// Name of the link in the node's namespace.
    pub(crate) host_if: &'a str,
    pub(crate) addresses: &'a [IpAddr],
}

/// Connects a pod to its node.
pub(crate) fn lay_pod(link: &PodLink<'_>) -> Result<()> {
    let host = link.host_if;
    let mut node = format!(
        "link add {host} type veth peer name eth0 netns {}\n",
        link.pod.name()
    );
    let mac = mac_of(link.node_number, link.host_number);
    let mut pod = format!("link set lo up\nlink set eth0 address {mac}\n");
    match link.topology {
        Topology::Routed => write!(
            node,
            "link set {host} addrgenmode none\nlink set {host} address {ROUTED_MAC}\n\
             addr add {ROUTED_GATEWAY6}/64 dev {host} nodad\nlink set {host} up\n"
        )?,
        Topology::Bridged => write!(
            node,
            "link set {host} master {BRIDGE}\nlink set {host} type bridge_slave hairpin on\n\
             link set {host} up\n"
        )?,
    }
    let mut routes = String::new();
    for address in link.addresses {
        let (length, gateway) = match (link.topology, address) {
            (Topology::Routed, IpAddr::V4(_)) => {
                writeln!(routes, "route add {ROUTED_GATEWAY} dev eth0 scope link")?;
                (32, ROUTED_GATEWAY.to_owned())
            }
            (Topology::Routed, IpAddr::V6(_)) => (128, ROUTED_GATEWAY6.to_owned()),
            (Topology::Bridged, IpAddr::V4(_)) => (24, pod_v4(link.node_number, 1).to_string()),
            (Topology::Bridged, IpAddr::V6(_)) => (64, pod_v6(link.node_number, 1).to_string()),
        };
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        writeln!(pod, "addr add {address}/{length} dev eth0{nodad}")?;
        writeln!(routes, "route add default via {gateway} dev eth0")?;
        if link.topology == Topology::Routed {
            // "replace", because a deleted pod with this address may still have its route.
            writeln!(node, "route replace {address}/{length} dev {host}")?;
        }
    }
    writeln!(pod, "link set eth0 up")?;
    ip_batch(link.node, &node)?;
    if link.topology == Topology::Routed {
        link.node
            .sysctl(&format!("ipv4/conf/{host}/proxy_arp"), "1")?;
        // Without this, proxy ARP delays an answer by up to 0.8 s.
        link.node
            .sysctl(&format!("ipv4/neigh/{host}/proxy_delay"), "0")?;
    }
    ip_batch(link.pod, &(pod + &routes))
}
