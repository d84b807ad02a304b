// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Service load balancing: [`route`] maps a virtual address to a backend, as a pure function over a
//! look-up trait.

use crate::Addr;
use crate::addr::{Endpoint, Port, Protocol};

abi_id! {
    /// An immutable list of backends: a hash of its content. One write switches a service from one
    /// list to the next.
    pub struct BackendListId(pub u64);
}

abi! {
    /// Key of the map `SERVICES`. Port 0 with protocol 0 marks a virtual address: traffic to it on any
    /// port but the service's own is refused.
    pub struct ServiceKey {
        /// The virtual address; for node ports, a node's address.
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
        /// The number of backends; 0 = connections are refused at once.
        pub count: u32,
        /// Always 0.
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

/// Looks up services.
pub trait Services {
    /// The service of a key.
    fn service(&self, key: &ServiceKey) -> Option<Service>;
    /// A backend of a list.
    fn backend(&self, key: &BackendKey) -> Option<Endpoint>;
}

/// The result of resolving a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The destination is not a service, and is used as it is.
    Unchanged,
    /// The backend to use instead.
    Backend(Endpoint),
    /// The service has no endpoint that accepts traffic: refused at once.
    NoEndpoints,
    /// The address is virtual, and no service has the port: refused at once.
    NoPort,
}

impl Service {
    /// The key of the backend that a number selects, for a uniform choice by a random number;
    /// `None` = there is no backend.
    #[inline(always)]
    #[must_use]
    pub const fn choose(&self, number: u32) -> Option<BackendKey> {
        if self.count == 0 {
            return None;
        }
        Some(BackendKey {
            list: self.backends,
            index: number % self.count,
            pad: 0,
        })
    }
}

/// Whether an endpoint is a service's, so that packets to it need translation.
#[inline(always)]
pub fn is_virtual(services: &impl Services, at: &Endpoint, protocol: Protocol) -> bool {
    services.service(&ServiceKey::marker(at.addr)).is_some()
        || services.service(&ServiceKey::new(*at, protocol)).is_some()
}

/// Attempts to find a backend when the list is switched between the two look-ups.
const ATTEMPTS: u32 = 2;

/// Resolves a destination. `random` is a uniform random number that selects the backend.
///
/// The service and its list are two look-ups. The agent may switch the list between them and remove
/// the old one, so a miss is retried with the service's new value.
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
        let Some(key) = service.choose(random) else {
            return Route::NoEndpoints;
        };
        if let Some(backend) = services.backend(&key) {
            return Route::Backend(backend);
        }
    }
    Route::NoEndpoints
}
