// SPDX-License-Identifier: Apache-2.0
//! Finds the network namespace and interface of a local pod, and configures the namespace for the mesh.
//!
//! Everything that the agent configures in a pod's namespace, except its sockets, is one list
//! ([`netns_config`]), which [`enroll`] applies and [`unenroll`] removes. Dropping a handle only closes the
//! agent's sockets: the programs that protect the pod stay attached. This module does not use BPF maps or
//! programs.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use mesh_common::Protocol;
use mesh_common::pod::{ListenerSlot, PodIndex};
use mesh_common::settings::TUNNEL_PORT;
use mesh_plan::plan::LocalPod;

use mesh_sys::netns::NetNs;
use mesh_sys::sock_diag::{SockDiag, States};
use mesh_sys::socket;

pub mod find;
pub mod interface;
pub mod lab;
pub mod netns_config;
pub mod open;
pub mod watch;

use interface::Interface;
use netns_config::NetnsItem;

/// The length of a listener's accept queue: the default of `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Why a pod's namespace cannot be found or configured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pod has no annotation with the path of its namespace.
    #[error("network namespace unknown: set the annotation mesh.rs/netns on the pod")]
    NoAnnotation,
    /// No process of the pod was found.
    #[error(
        "no process of the pod found in {path}: check that the pod has started and that the agent runs with hostPID"
    )]
    NoProcess {
        /// The mount point of the proc file system.
        path: PathBuf,
    },
    /// The processes of the node cannot be listed.
    #[error("cannot list the processes in {path}")]
    Processes {
        /// The mount point of the proc file system.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The container runtime did not return a process of the pod.
    #[error(
        "no process of the pod found, and the container runtime at {socket} returned none: {why}"
    )]
    Runtime {
        /// The runtime's socket.
        socket: PathBuf,
        /// The cause.
        why: String,
    },
    /// The pod's processes are in the network namespace of the node.
    #[error("the pod's processes are in the node's own network namespace")]
    HostNetns,
    /// The namespace cannot be opened.
    #[error("cannot open the pod's network namespace {path}: check that the pod is running")]
    Open {
        /// The namespace file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The namespace lacks an address of the pod: it is not the pod's namespace.
    #[error(
        "the network namespace {path} does not have the pod's address {address}: the pod is still being set up, or the annotation is wrong"
    )]
    AddressNotFound {
        /// The namespace file.
        path: PathBuf,
        /// The missing address.
        address: IpAddr,
    },
    /// The pod's addresses are on several interfaces.
    #[error("the pod's addresses are on several interfaces, which is not supported")]
    SeveralInterfaces,
    /// An application in the pod listens on the tunnel port.
    #[error(
        "pod not enrolled: an application listens on {at}, and its port is reserved for tunnels"
    )]
    TunnelPortTaken {
        /// The application's listening address.
        at: SocketAddr,
    },
    /// A kernel operation failed.
    #[error("cannot {what} in the pod's network namespace")]
    Kernel {
        /// The operation.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// Adds the name of the operation to an I/O error.
trait WithAction<T> {
    fn with_action(self, what: &'static str) -> Result<T, Error>;
}

impl<T> WithAction<T> for io::Result<T> {
    fn with_action(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Kernel { what, source })
    }
}

/// The managed pods of this node, by UID.
pub type PodTable = BTreeMap<String, Arc<PodHandle>>;

/// A managed pod. A change of its listeners creates a new handle that shares the namespace.
#[derive(Debug)]
pub struct PodHandle {
    /// The pod's UID.
    pub uid: String,
    /// The pod's index in the BPF maps.
    pub index: PodIndex,
    /// The pod's network namespace, which lives at least as long as this handle. Drop the handle when the pod
    /// leaves the table.
    pub netns: Arc<NetNs>,
    /// The cookie of the namespace, by which the kernel programs identify it.
    pub netns_cookie: u64,
    /// The agent's listeners in the namespace; `None` = the pod is not enrolled.
    pub listeners: Option<Arc<Listeners>>,
    /// The index of the veth peer in the agent's namespace; 0 = none.
    pub link: u32,
    /// The MAC address of the pod's interface, padded with 2 zero bytes; all 0 = unknown.
    pub mac: [u8; 8],
}

/// The agent's listeners in a pod's namespace: transparent, nonblocking and on loopback, so that only
/// connections that the kernel programs redirect reach them. `None` = the pod has no address of the family.
#[derive(Debug)]
pub struct Listeners {
    /// Accepts captured connections, IPv4.
    pub outbound4: Option<TcpListener>,
    /// Accepts captured connections, IPv6.
    pub outbound6: Option<TcpListener>,
    /// Accepts tunnels, IPv4.
    pub tunnel4: Option<TcpListener>,
    /// Accepts tunnels, IPv6.
    pub tunnel6: Option<TcpListener>,
}

impl Listeners {
    /// Iterates over the listeners that exist, with their slots.
    pub fn iter(&self) -> impl Iterator<Item = (ListenerSlot, &TcpListener)> {
        [
            (ListenerSlot::Outbound4, self.outbound4.as_ref()),
            (ListenerSlot::Outbound6, self.outbound6.as_ref()),
            (ListenerSlot::Tunnel4, self.tunnel4.as_ref()),
            (ListenerSlot::Tunnel6, self.tunnel6.as_ref()),
        ]
        .into_iter()
        .filter_map(|(slot, listener)| Some((slot, listener?)))
    }

    fn open(addresses: impl Iterator<Item = IpAddr>) -> io::Result<Self> {
        let mut all = Self {
            outbound4: None,
            outbound6: None,
            tunnel4: None,
            tunnel6: None,
        };
        for address in addresses {
            let (loopback, outbound, tunnel): (IpAddr, _, _) = match address {
                IpAddr::V4(_) => (
                    Ipv4Addr::LOCALHOST.into(),
                    &mut all.outbound4,
                    &mut all.tunnel4,
                ),
                IpAddr::V6(_) => (
                    Ipv6Addr::LOCALHOST.into(),
                    &mut all.outbound6,
                    &mut all.tunnel6,
                ),
            };
            let at = SocketAddr::new(loopback, 0);
            *outbound = Some(socket::transparent_listener(at, BACKLOG)?);
            *tunnel = Some(socket::transparent_listener(at, BACKLOG)?);
        }
        Ok(all)
    }
}

/// The network namespace and interface of a pod, checked against the pod's addresses.
#[derive(Clone, Debug)]
pub struct PodNetns {
    /// The network namespace.
    pub netns: Arc<NetNs>,
    /// The cookie of the namespace, by which the kernel programs identify it.
    pub cookie: u64,
    /// The namespace file.
    pub path: PathBuf,
    /// Whether the file is below `/proc/PID` and can disappear before the namespace does.
    pub of_a_process: bool,
    /// The pod's interface.
    pub interface: Interface,
}

impl PodNetns {
    /// Returns whether the namespace still exists at its path. A path below `/proc/PID` disappears when one
    /// container exits; then the pod's interface, which is removed with the sandbox, decides.
    #[must_use]
    pub fn is_there(&self) -> bool {
        mesh_sys::netns::NetNsId::of(&self.path).is_ok_and(|id| id == self.netns.id())
            || (self.of_a_process && interface::is_there(&self.netns, self.interface.index))
    }
}

/// Finds a pod's network namespace and interface. Rejects a namespace that lacks one of the pod's addresses.
///
/// # Errors
/// The pod is not running yet, or its namespace cannot be found or does not match the pod.
pub fn find(uid: &str, pod: &LocalPod, finder: &impl find::Find) -> Result<PodNetns, Error> {
    let path = finder.path(uid, pod)?;
    let netns = NetNs::open(&path).map_err(|source| Error::Open {
        path: path.clone(),
        source,
    })?;
    if NetNs::own().is_ok_and(|own| own.id() == netns.id()) {
        return Err(Error::HostNetns);
    }
    let interface = interface::of_pod(&netns, &pod.addresses, &path)?;
    let cookie = netns.cookie().with_action("read the namespace's cookie")?;
    Ok(PodNetns {
        netns: Arc::new(netns),
        cookie,
        path,
        of_a_process: finder.is_of_a_process(),
        interface,
    })
}

/// Configures a pod's namespace for the mesh: listeners, rules, routes and sysctls. Keeps what an earlier
/// agent configured. Removes everything again after an error.
///
/// # Errors
/// An application listens on the tunnel port, or a kernel operation failed.
pub fn enroll(
    pod_netns: &PodNetns,
    pod: &LocalPod,
) -> Result<(Arc<Listeners>, Vec<NetnsItem>), Error> {
    tunnel_port_is_free(&pod_netns.netns)?;
    let listeners = pod_netns
        .netns
        .run(|| Listeners::open(pod.addresses.iter().copied()))
        .with_action("enter")?
        .with_action("open the agent's listeners")?;
    let list = netns_config::wanted(pod_netns.interface.index, &pod.addresses);
    match netns_config::ensure(&pod_netns.netns, &list) {
        Ok(_) => Ok((Arc::new(listeners), list)),
        Err(error) => {
            if let Err(left) = netns_config::remove(&pod_netns.netns, &list) {
                tracing::warn!(pod = %pod.name, error = %left, "mesh configuration left behind in the pod's network namespace");
            }
            Err(error)
        }
    }
}

/// Removes what [`enroll`] configured. The listeners close when their last handle is dropped.
///
/// # Errors
/// The first item that could not be removed; all other items are removed.
pub fn unenroll(pod_netns: &PodNetns, list: &[NetnsItem]) -> Result<(), Error> {
    netns_config::remove(&pod_netns.netns, list)
}

/// Checks that no application listens on the tunnel port, where other pods could no longer reach it. Loopback
/// listeners are allowed: loopback traffic is not captured.
fn tunnel_port_is_free(netns: &NetNs) -> Result<(), Error> {
    let listening = netns
        .run(|| SockDiag::open()?.sockets(Protocol::TCP, States::LISTEN))
        .with_action("enter")?
        .with_action("list the listeners")?;
    let taken = listening
        .iter()
        .find(|s| s.local.port == TUNNEL_PORT && !s.local.addr.is_loopback());
    match taken {
        Some(socket) => Err(Error::TunnelPortTaken {
            at: socket.local.into(),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
