// SPDX-License-Identifier: Apache-2.0
//! A pod: a namespace on a node, a cgroup below the node's pods, and its manifest.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::names::LabId;
use crate::netns::Netns;
use crate::node::Node;
use crate::process::{Cmd, Host, Output, Proc};
use crate::programs;
use crate::reports::Tcp;
use crate::topology::{self, PodLink, Topology};

/// Maximum length of a link name (IFNAMSIZ without the NUL).
const LINK_NAME: usize = 15;

/// The address families of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    /// IPv4 and IPv6.
    #[default]
    Dual,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

/// Specification of a pod.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub(crate) name: String,
    pub(crate) node: u8,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) families: Families,
    pub(crate) ports: Vec<(String, u16, String)>,
    pub(crate) host_number: Option<u8>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) uid: Option<String>,
}

impl From<(&str, u8)> for PodSpec {
    fn from((name, node): (&str, u8)) -> Self {
        Self::new(name, node)
    }
}

impl PodSpec {
    /// Returns a dual-stack pod on node `node` (from 1), in namespace `default`, labeled `app:
    /// NAME`.
    #[must_use]
    pub fn new(name: &str, node: u8) -> Self {
        Self {
            name: name.to_owned(),
            node,
            namespace: "default".to_owned(),
            service_account: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            annotations: BTreeMap::new(),
            families: Families::Dual,
            ports: Vec::new(),
            host_number: None,
            addresses: Vec::new(),
            uid: None,
        }
    }

    /// Sets the UID, e.g. to one that an API server assigned (default: a new one).
    #[must_use]
    pub fn uid(mut self, uid: &str) -> Self {
        self.uid = Some(uid.to_owned());
        self
    }

    /// Sets the Kubernetes namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Sets the service account (default: the pod's name).
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    /// Adds or replaces a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds or replaces an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Sets the address families.
    #[must_use]
    pub fn families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    /// Adds a named container port; the protocol is as in Kubernetes, e.g. `TCP`.
    #[must_use]
    pub fn port(mut self, name: &str, number: u16, protocol: &str) -> Self {
        self.ports
            .push((name.to_owned(), number, protocol.to_owned()));
        self
    }

    /// Sets the host number of the addresses (default: the next free one from 10), e.g. to reuse
    /// it.
    #[must_use]
    pub fn host_number(mut self, number: u8) -> Self {
        self.host_number = Some(number);
        self
    }

    /// Sets addresses outside the node's CIDRs, at most one of each family; only for routed labs.
    #[must_use]
    pub fn addresses(mut self, addresses: &[IpAddr]) -> Self {
        self.addresses = addresses.to_vec();
        self
    }
}

/// A pod of the lab.
#[derive(Debug)]
pub struct Pod {
    host: Host,
    pub(crate) spec: PodSpec,
    node: Arc<Node>,
    uid: String,
    host_if: String,
    host_number: u8,
    topology: Topology,
    addresses: Vec<IpAddr>,
}

impl Deref for Pod {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Pod {
    /// Creates the pod; `serial` is its number within the lab, which is never reused.
    pub(crate) fn create(
        id: LabId,
        topology: Topology,
        node: Arc<Node>,
        spec: PodSpec,
        (serial, host_number): (u32, u8),
    ) -> Result<Self> {
        let netns = Arc::new(Netns::create(
            &id.netns(&format!("{}-{serial}", spec.name)),
        )?);
        let prefix = match topology {
            Topology::Routed => "cali",
            Topology::Bridged => "veth",
        };
        let mut host_if = format!("{prefix}{serial}-{}", spec.name);
        host_if.truncate(LINK_NAME);
        let v4 = IpAddr::from(topology::pod_v4(node.number(), host_number));
        let v6 = IpAddr::from(topology::pod_v6(node.number(), host_number));
        let addresses = match spec.families {
            _ if !spec.addresses.is_empty() => spec.addresses.clone(),
            Families::Dual => vec![v4, v6],
            Families::V4 => vec![v4],
            Families::V6 => vec![v6],
        };
        topology::lay_pod(&PodLink {
            topology,
            node: &node,
            node_number: node.number(),
            pod: &netns,
            host_number,
            host_if: &host_if,
            addresses: &addresses,
        })
        .with_context(|| format!("pod {}", spec.name))?;
        let own = || format!("{:08x}-0000-4000-8000-{serial:012x}", std::process::id());
        let uid = spec.uid.clone().unwrap_or_else(own);
        let cgroup = node.pods_cgroup().join(format!("pod{uid}"));
        let dir = id.dir().join(format!("{}-{serial}", spec.name));
        let host = Host::new(&spec.name, netns, cgroup, dir)?;
        Ok(Self {
            host,
            spec,
            node,
            uid,
            host_if,
            host_number,
            topology,
            addresses,
        })
    }

    /// Returns the pod's name, which is unique in the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Returns the pod's Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.spec.namespace
    }

    /// Returns the pod's UID, `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Returns the pod's node.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Returns the pod's SPIFFE ID in a trust domain.
    #[must_use]
    pub fn spiffe_id(&self, trust_domain: &str) -> String {
        let PodSpec {
            namespace,
            service_account,
            ..
        } = &self.spec;
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }

    /// Returns all addresses of the pod, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Returns the IPv4 address of the pod's node and host number, even if the pod does not have
    /// it.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        topology::pod_v4(self.node.number(), self.host_number)
    }

    /// Returns the IPv6 address of the pod's node and host number, even if the pod does not have
    /// it.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        topology::pod_v6(self.node.number(), self.host_number)
    }

    /// Returns the host number of the pod's addresses.
    #[must_use]
    pub fn host_number(&self) -> u8 {
        self.host_number
    }

    /// Returns the name of the pod's link in the node's namespace; in the pod it is `eth0`.
    #[must_use]
    pub fn host_if(&self) -> &str {
        &self.host_if
    }

    /// Returns the MAC address of the pod's `eth0`.
    #[must_use]
    pub fn mac(&self) -> String {
        topology::mac_of(self.node.number(), self.host_number)
    }

    /// Returns the MAC address of the pod's next hop for packets that leave the node.
    #[must_use]
    pub fn gateway_mac(&self) -> String {
        topology::gateway_mac(self.topology, self.node.number())
    }

    /// Returns both addresses of the pod's node and host number, IPv4 first, with a port.
    #[must_use]
    pub fn at(&self, port: u16) -> [SocketAddr; 2] {
        [(self.v4(), port).into(), (self.v6(), port).into()]
    }

    /// Returns the pod's actual addresses, IPv4 first, with a port.
    #[must_use]
    pub fn all_at(&self, port: u16) -> Vec<SocketAddr> {
        let at = |ip: &IpAddr| SocketAddr::new(*ip, port);
        self.addresses.iter().map(at).collect()
    }

    /// Fetches a URL with curl, which runs as a process of the pod.
    ///
    /// # Errors
    /// curl cannot be started or times out. A failure of curl is in the output.
    pub fn curl(&self, url: &str) -> Result<Output> {
        let cmd = Cmd::new("curl").args(["--silent", "--show-error", "--max-time", "5", "-g", url]);
        self.run(cmd, Duration::from_secs(10))
    }
}

impl Host {
    /// Runs the `probe` program with a command line and waits until it exits.
    ///
    /// # Errors
    /// The program cannot be started or has not exited within 30 s. Its failure is in the output.
    pub fn probe(&self, line: &str) -> Result<Output> {
        self.run(probe_cmd(line)?, Duration::from_secs(30))
    }

    /// Runs `probe tcp` with a command line (without `tcp`), which makes one connection.
    ///
    /// # Errors
    /// As [`Host::probe`], or the program prints no report. A failed connection is in the report.
    pub fn tcp(&self, line: &str) -> Result<Tcp> {
        self.probe(&format!("tcp {line}"))?.json()
    }

    /// Runs a command line without quoting and returns its standard output.
    ///
    /// # Errors
    /// The program fails or has not exited within 15 s.
    pub fn output(&self, line: &str) -> Result<String> {
        let output = self.run(Cmd::line(line), Duration::from_secs(15))?;
        Ok(output.ok().with_context(|| line.to_owned())?.text())
    }

    /// Starts a Python script whose output is read line by line.
    ///
    /// # Errors
    /// The script cannot be started.
    pub fn python(&self, script: &str, args: &[&str]) -> Result<Proc> {
        let cmd = Cmd::new("python3").args(["-uc", script]).args(args);
        self.spawn_lines(cmd)
    }

    /// Starts the `probe` program with a command line; its output is read line by line.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_probe(&self, line: &str) -> Result<Proc> {
        self.spawn_lines(probe_cmd(line)?)
    }

    /// Starts `probe serve` with a command line (without `serve`) and waits until it listens.
    ///
    /// # Errors
    /// The server does not listen within 5 s.
    pub fn serve(&self, line: &str) -> Result<Proc> {
        let server = self.start_probe(&format!("serve {line}"))?;
        let ready = server.line(Duration::from_secs(5))?;
        ready.with_context(|| format!("probe serve {line} ended: {}", server.log_tail()))?;
        Ok(server)
    }
}

/// Options of `probe tcp` for every kind of client socket. The last one is incomplete: the caller
/// appends the client's own address.
pub const SOCKETS: [&str; 9] = [
    "",
    "--nonblocking",
    "--fastopen",
    "--device eth0",
    "--mark 0x10",
    "--mptcp",
    "--mapped",
    "--mapped --nonblocking",
    "--reset --from",
];

/// Returns the command that runs the `probe` program with these arguments.
///
/// # Errors
/// The program is not built.
pub fn probe_cmd(line: &str) -> Result<Cmd> {
    Ok(Cmd::new(programs::probe()?).args(line.split_ascii_whitespace()))
}
