// SPDX-License-Identifier: Apache-2.0
//! Finds a pod's interface by the pod's addresses, never by its name, and the interface's veth peer in the
//! agent's namespace, to which the gate is attached.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::Path;

use super::{Error, WithAction as _};
use mesh_sys::netns::NetNs;
use mesh_sys::route::{Link, Routing};

/// A pod's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The index in the pod's namespace.
    pub index: u32,
    /// The name in the pod's namespace.
    pub name: String,
    /// The index of the veth peer in the agent's namespace; 0 = the peer is in another namespace or does not
    /// exist (macvlan, ipvlan, SR-IOV), so no gate can be attached.
    pub host_index: u32,
    /// The MAC address, padded with 2 zero bytes; all 0 = none.
    pub mac: [u8; 8],
}

/// The addresses and links of a namespace.
struct NetnsState {
    addresses: Vec<(u32, IpAddr)>,
    links: Vec<Link>,
    /// The id (NETNSA_NSID) of the agent's namespace in this namespace.
    agent: Option<i32>,
}

/// Finds the interface that has the pod's addresses.
pub(super) fn of_pod(
    netns: &NetNs,
    addresses: &BTreeSet<IpAddr>,
    path: &Path,
) -> Result<Interface, Error> {
    let agent = NetNs::own().with_action("open the agent's namespace")?;
    let facts = netns
        .run(|| read(&agent))
        .with_action("enter")?
        .with_action("read the interfaces")?;
    let index = common_index(&facts.addresses, addresses, path)?;
    let link = facts.links.into_iter().find(|link| link.index == index);
    let link = link
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        .with_action("find the interface")?;
    let ours = link.peer_namespace.is_some() && link.peer_namespace == facts.agent;
    let mut mac = [0; 8];
    if let Some(address) = link.mac {
        mac[..6].copy_from_slice(&address);
    }
    Ok(Interface {
        index,
        name: link.name,
        host_index: if ours { link.peer.unwrap_or(0) } else { 0 },
        mac,
    })
}

/// Returns whether a namespace has this interface.
pub(super) fn is_there(netns: &NetNs, index: u32) -> bool {
    let links = netns.run(|| Routing::open()?.links());
    // A read error does not mean that the interface is gone.
    links.map_or(true, |links| {
        links.map_or(true, |links| links.iter().any(|link| link.index == index))
    })
}

fn read(agent: &NetNs) -> io::Result<NetnsState> {
    let mut routing = Routing::open()?;
    Ok(NetnsState {
        addresses: routing.addresses()?,
        links: routing.links()?,
        agent: routing.number_of(agent.as_fd())?,
    })
}

fn common_index(
    found: &[(u32, IpAddr)],
    wanted: &BTreeSet<IpAddr>,
    path: &Path,
) -> Result<u32, Error> {
    let mut common = None;
    for address in wanted {
        let index = found
            .iter()
            .find(|(_, a)| a == address)
            .map(|(index, _)| *index)
            .ok_or_else(|| Error::AddressNotFound {
                path: path.to_owned(),
                address: *address,
            })?;
        if common.is_some_and(|other| other != index) {
            return Err(Error::SeveralInterfaces);
        }
        common = Some(index);
    }
    common
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the pod has no address"))
        .with_action("find the interface")
}
