// SPDX-License-Identifier: Apache-2.0
//! The addresses of this node's own interfaces. Its Node object need not list all of them, above all not
//! the pods' gateway on a bridge, which is the source of the kubelet's probes.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use mesh_sys::route::Routing;

/// Reads the addresses of this node's interfaces.
pub type Read = fn() -> io::Result<BTreeSet<IpAddr>>;

/// Reads the addresses of this node's interfaces by netlink.
///
/// # Errors
/// When netlink fails.
pub fn read() -> io::Result<BTreeSet<IpAddr>> {
    let addresses = Routing::open()?.addresses()?;
    Ok(addresses.into_iter().map(|(_, address)| address).collect())
}

/// The addresses of the last successful read.
#[derive(Debug)]
pub(super) struct OwnAddresses {
    read: Read,
    known: BTreeSet<IpAddr>,
    failed: bool,
}

impl OwnAddresses {
    pub(super) const fn new(read: Read) -> Self {
        Self {
            read,
            known: BTreeSet::new(),
            failed: false,
        }
    }

    /// Reads the addresses again and tells whether they changed. A failure leaves them as they are.
    pub(super) fn refresh(&mut self) -> bool {
        match (self.read)() {
            Ok(addresses) => {
                self.failed = false;
                let changed = addresses != self.known;
                self.known = addresses;
                changed
            }
            Err(error) => {
                if !self.failed {
                    tracing::warn!(
                        %error,
                        "cannot read this node's own addresses: probes of the kubelet may be refused"
                    );
                }
                self.failed = true;
                false
            }
        }
    }

    pub(super) const fn get(&self) -> &BTreeSet<IpAddr> {
        &self.known
    }
}
