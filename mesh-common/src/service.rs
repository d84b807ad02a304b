// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Service load balancing: from a virtual address to a backend, as a pure function over a look-up.

use crate::Addr;
use crate::addr::{Endpoint, Port, Protocol};

abi_id! {
    /// A list of backends, immutable: a hash of its content. A service switches from one list to
    /// the next by one write.
    pub struct BackendListId(pub u64);
}

abi! {
    /// Key of the map `SERVICES`. Port 0 with protocol 0 marks an address that is virtual: what is
    /// sent to it on another port than the service's own is refused, not sent.
    pub struct ServiceKey {
        /// The virtual address, or a node's for node ports.
        pub addr: Addr,
        /// The service's port.
        pub port: Port,
        /// TCP or UDP.
        pub protocol: Protocol,
        /// Always 0.
        pub pad: u8,
    }

    /// Value of the map `SERVICES`.
    pub struct Service {
        /// The backends.
        pub backends: BackendListId,
        /// How many there are; 0 = connections are refused at once.
        pub count: u32,
        /// Always 0; affinity and algorithm will live here.
        pub flags: u32,
    }

    /// Key of the map `BACKENDS`.
    pub struct BackendKey {
        /// The list.
        pub list: BackendListId,
        /// Position in the list, below [`Service::count`].
        pub index: u32,
        /// Always 0.
        pub pad: u32,
    }
}

impl ServiceKey {
    /// The key of a service port.
    #[inline(always)]
    #[must_use]
    pub const fn new(at: Endpoint, protocol: Protocol) -> Self {
        Self {
            addr: at.addr,
            port: at.port,
            protocol,
            pad: 0,
        }
    }

    /// The key that marks an address as virtual.
    #[inline(always)]
    #[must_use]
    pub const fn marker(addr: Addr) -> Self {
        Self {
            addr,
            port: Port(0),
            protocol: Protocol(0),
            pad: 0,
        }
    }
}

/// Where services are looked up.
pub trait Services {
    /// The service of a key.
    fn service(&self, key: &ServiceKey) -> Option<Service>;
    /// A backend of a list.
    fn backend(&self, key: &BackendKey) -> Option<Endpoint>;
}

/// What became of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Not a service: the destination stays.
    Unchanged,
    /// Goes to this backend.
    Backend(Endpoint),
    /// A service port without an endpoint that takes traffic: refused at once.
    NoEndpoints,
    /// A virtual address, but no port of a service: refused at once.
    NoPort,
}

/// Whether an endpoint is a service's, so that packets to it need translation.
#[inline(always)]
pub fn is_virtual(services: &impl Services, at: &Endpoint, protocol: Protocol) -> bool {
    services.service(&ServiceKey::marker(at.addr)).is_some()
        || services.service(&ServiceKey::new(*at, protocol)).is_some()
}

/// How often a list may be looked up again when it is switched between the two look-ups.
const ATTEMPTS: u32 = 2;

/// Resolves a destination. `random` is a uniform random number that picks the backend.
///
/// The service and its list are two look-ups. An agent may switch the list between them and remove
/// the old one, so a miss is tried again with the service's new value.
#[inline(always)]
pub fn route(services: &impl Services, to: Endpoint, protocol: Protocol, random: u32) -> Route {
    let key = ServiceKey::new(to, protocol);
    for _ in 0..ATTEMPTS {
        let Some(service) = services.service(&key) else {
            return match services.service(&ServiceKey::marker(to.addr)) {
                Some(_) => Route::NoPort,
                None => Route::Unchanged,
            };
        };
        if service.count == 0 {
            return Route::NoEndpoints;
        }
        let index = random % service.count;
        if let Some(backend) = services.backend(&BackendKey {
            list: service.backends,
            index,
            pad: 0,
        }) {
            return Route::Backend(backend);
        }
    }
    Route::NoEndpoints
}
