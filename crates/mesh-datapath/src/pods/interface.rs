// SPDX-License-Identifier: Apache-2.0
//! A pod's interface: found by the pod's addresses, never by its name, with its other end in the
//! agent's namespace, where the gate goes.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::Path;

use super::{Error, Tried as _};
use mesh_sys::netns::NetNs;
use mesh_sys::route::{Link, Routing};

/// A pod's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index in the pod's namespace.
    pub index: u32,
    /// Its name there.
    pub name: String,
    /// The index of its other end in the agent's namespace; 0 = its other end is elsewhere, or it
    /// has none (macvlan, ipvlan, SR-IOV): no gate.
    pub host_index: u32,
    /// Its hardware address, then 2 bytes 0; all 0 = it has none.
    pub mac: [u8; 8],
}

/// What a namespace says about itself.
struct Facts {
    addresses: Vec<(u32, IpAddr)>,
    links: Vec<Link>,
    /// The number by which it knows the agent's namespace.
    agent: Option<i32>,
}

/// Finds the interface that has the pod's addresses.
pub(super) fn of_pod(
    netns: &NetNs,
    addresses: &BTreeSet<IpAddr>,
    path: &Path,
) -> Result<Interface, Error> {
    let agent = NetNs::own().tried("name the agent's namespace")?;
    let facts = netns
        .run(|| read(&agent))
        .tried("enter")?
        .tried("read the interfaces")?;
    let index = common_index(&facts.addresses, addresses, path)?;
    let link = facts.links.into_iter().find(|link| link.index == index);
    let link = link
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        .tried("find the interface")?;
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

/// Whether a namespace has this interface.
pub(super) fn is_there(netns: &NetNs, index: u32) -> bool {
    let links = netns.run(|| Routing::open()?.links());
    // What cannot be read is not gone.
    links.map_or(true, |links| {
        links.map_or(true, |links| links.iter().any(|link| link.index == index))
    })
}

fn read(agent: &NetNs) -> io::Result<Facts> {
    let mut routing = Routing::open()?;
    Ok(Facts {
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
            .ok_or_else(|| Error::NotIts {
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
        .tried("find the interface")
}
