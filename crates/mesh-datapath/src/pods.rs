// SPDX-License-Identifier: Apache-2.0
//! The pods of this node: find a pod's namespace and interface, and prepare it for the mesh.
//!
//! Everything that the agent makes in a pod's namespace, but for its sockets, is one list
//! ([`made`]), made by [`enrol`] and removed by [`withdraw`]. Dropping a handle only closes our
//! sockets: what protects the pod stays. It never touches BPF maps or programs.

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
pub mod made;
pub mod open;
pub mod watch;

use interface::Interface;
use made::Made;

/// As many connections as may wait to be accepted: what `net.core.somaxconn` allows by default.
const BACKLOG: i32 = 4096;

/// Why a pod is not, or not fully, taken care of.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source names no namespace.
    #[error("its namespace is not known: set the annotation mesh.rs/netns")]
    NotNamed,
    /// No process shows where it is.
    #[error(
        "no process of it is in {path}: has it started, and does the agent see the processes of the machine (hostPID)?"
    )]
    NoProcess {
        /// The proc file system.
        path: PathBuf,
    },
    /// The processes of the machine cannot be listed.
    #[error("cannot list the processes in {path}")]
    Processes {
        /// The proc file system.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The container runtime does not say either.
    #[error("no process of it is known, and the container runtime at {socket} does not say: {why}")]
    Runtime {
        /// The runtime's socket.
        socket: PathBuf,
        /// Why not.
        why: String,
    },
    /// It is the node's own.
    #[error("its processes are in the node's own namespace")]
    Nodes,
    /// The namespace cannot be opened.
    #[error("cannot open its namespace {path}; is the pod running?")]
    Open {
        /// The namespace's file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The namespace is another's.
    #[error(
        "the namespace {path} does not have its address {address}: is it still being set up, or the annotation wrong?"
    )]
    NotIts {
        /// The namespace's file.
        path: PathBuf,
        /// The address that is not there.
        address: IpAddr,
    },
    /// Its addresses are on several interfaces.
    #[error("its addresses are on several interfaces, which is not supported")]
    SeveralInterfaces,
    /// An application has the tunnel port.
    #[error("an application of the pod listens on {at}, which is the tunnel port; not enrolled")]
    TunnelPortTaken {
        /// Where it listens.
        at: SocketAddr,
    },
    /// The kernel refused something.
    #[error("cannot {what} in its namespace")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Names what was tried, for an error.
trait Tried<T> {
    fn tried(self, what: &'static str) -> Result<T, Error>;
}

impl<T> Tried<T> for io::Result<T> {
    fn tried(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Kernel { what, source })
    }
}

/// The managed pods of this node, by UID.
pub type PodTable = BTreeMap<String, Arc<PodHandle>>;

/// A managed pod. A change of its listeners makes a new handle that shares the namespace.
#[derive(Debug)]
pub struct PodHandle {
    /// Its UID.
    pub uid: String,
    /// Its slot in the kernel's maps.
    pub index: PodIndex,
    /// Its namespace. Whoever keeps this keeps the namespace: let go when the pod leaves the table.
    pub netns: Arc<NetNs>,
    /// What the kernel knows the namespace by.
    pub netns_cookie: u64,
    /// The agent's listeners in it; only while it is enrolled.
    pub listeners: Option<Arc<Listeners>>,
    /// Its interface's other end, in the agent's namespace; 0 = it has none there.
    pub link: u32,
    /// The address of its own interface, then 2 bytes 0; all 0 = not known.
    pub mac: [u8; 8],
}

/// The agent's listeners in a pod's namespace: transparent, nonblocking, on loopback, so that they
/// are reached by steering only. `None` where the pod has no address of the family.
#[derive(Debug)]
pub struct Listeners {
    /// Captured connections, IPv4.
    pub outbound4: Option<TcpListener>,
    /// Captured connections, IPv6.
    pub outbound6: Option<TcpListener>,
    /// Tunnels, IPv4.
    pub tunnel4: Option<TcpListener>,
    /// Tunnels, IPv6.
    pub tunnel6: Option<TcpListener>,
}

impl Listeners {
    /// Those that exist, with their slots.
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

/// A pod's namespace and interface, found and checked.
#[derive(Clone, Debug)]
pub struct Home {
    /// The namespace.
    pub netns: Arc<NetNs>,
    /// What the kernel knows it by.
    pub cookie: u64,
    /// The namespace's file.
    pub path: PathBuf,
    /// The file is that of a process, and may go before the namespace does.
    pub of_a_process: bool,
    /// The pod's interface.
    pub interface: Interface,
}

impl Home {
    /// Whether the namespace still exists under its file. If that was a process', containers come
    /// and go in a pod: then, whether it still has its interface, which goes with the sandbox.
    #[must_use]
    pub fn is_there(&self) -> bool {
        mesh_sys::netns::NetNsId::of(&self.path).is_ok_and(|id| id == self.netns.id())
            || (self.of_a_process && interface::is_there(&self.netns, self.interface.index))
    }
}

/// Finds a pod's namespace and its interface. A namespace that does not have all of the pod's
/// addresses is not the pod's.
///
/// # Errors
/// While the pod is not up, or when the source is wrong about it.
pub fn find(uid: &str, pod: &LocalPod, finder: &impl find::Find) -> Result<Home, Error> {
    let path = finder.path(uid, pod)?;
    let netns = NetNs::open(&path).map_err(|source| Error::Open {
        path: path.clone(),
        source,
    })?;
    if NetNs::own().is_ok_and(|own| own.id() == netns.id()) {
        return Err(Error::Nodes);
    }
    let interface = interface::of_pod(&netns, &pod.addresses, &path)?;
    let cookie = netns.cookie().tried("read the namespace's cookie")?;
    Ok(Home {
        netns: Arc::new(netns),
        cookie,
        path,
        of_a_process: finder.is_of_a_process(),
        interface,
    })
}

/// Prepares a pod's namespace for the mesh: listeners, rules, routes, sysctls. What is there
/// already, from an earlier agent, stays. After an error nothing of it is left.
///
/// # Errors
/// When an application has the tunnel port, or the kernel refuses.
pub fn enrol(home: &Home, pod: &LocalPod) -> Result<(Arc<Listeners>, Vec<Made>), Error> {
    tunnel_port_is_free(&home.netns)?;
    let listeners = home
        .netns
        .run(|| Listeners::open(pod.addresses.iter().copied()))
        .tried("enter")?
        .tried("open the agent's listeners")?;
    let list = made::wanted(home.interface.index, &pod.addresses);
    match made::ensure(&home.netns, &list) {
        Ok(_) => Ok((Arc::new(listeners), list)),
        Err(error) => {
            if let Err(left) = made::remove(&home.netns, &list) {
                tracing::warn!(pod = %pod.name, error = %left, "something of ours is left in the pod");
            }
            Err(error)
        }
    }
}

/// Removes what [`enrol`] made. The listeners end with their last handle.
///
/// # Errors
/// When the kernel refuses; everything else is removed nevertheless.
pub fn withdraw(home: &Home, list: &[Made]) -> Result<(), Error> {
    made::remove(&home.netns, list)
}

/// A listener of the application on the tunnel port would never be reached again by others.
/// Loopback is the pod's own and stays so.
fn tunnel_port_is_free(netns: &NetNs) -> Result<(), Error> {
    let listening = netns
        .run(|| SockDiag::open()?.sockets(Protocol::TCP, States::LISTEN))
        .tried("enter")?
        .tried("list the listeners")?;
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
