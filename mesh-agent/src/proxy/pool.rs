// SPDX-License-Identifier: Apache-2.0
//! Idle tunnels of one worker.
//!
//! A tunnel is used again only by the same pod, as the same identity and under the same policy,
//! towards the same pod at the same address, which proved the same identity, and only while the
//! certificate and roots under which that was proven are in use.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::policy::PolicySetId;
use mesh_common::{Endpoint, IdentityId};
use mesh_identity::{Epoch, Proof, SpiffeId};
use mesh_telemetry::metrics::{Metrics, Role};
use mesh_tunnel::{Carrier, CarrierError as _, Tunnel};

/// The key of a tunnel: connections with equal keys may share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// The destination pod's address, and the port of its agent.
    pub(crate) to: Endpoint,
    /// The source pod's own address.
    pub(crate) from: mesh_common::Addr,
    /// The source pod.
    pub(crate) uid: Arc<str>,
    /// The destination pod.
    pub(crate) peer_uid: Arc<str>,
    /// The policy of the source pod.
    pub(crate) set: PolicySetId,
    /// The destination's identity in policies.
    pub(crate) peer: IdentityId,
    /// The source's identity.
    pub(crate) own: SpiffeId,
    /// The identity that the peer has proven.
    pub(crate) expected: SpiffeId,
}

/// Bounds of a pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Tunnels with one key.
    pub(crate) per_key: usize,
    /// Tunnels of one worker.
    pub(crate) total: usize,
    /// The time after which an unused tunnel is closed.
    pub(crate) idle: Duration,
    /// The age up to which a tunnel is used again.
    pub(crate) age: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            per_key: 64,
            total: 1024,
            idle: Duration::from_secs(60),
            age: Duration::from_secs(600),
        }
    }
}

/// A pooled tunnel is lent to one connection at a time.
const _: () = assert!(!<Tunnel as Carrier>::PROTOCOL.multiplexed);

/// A tunnel that can be pooled.
pub(crate) struct Pooled {
    /// The tunnel.
    pub(crate) tunnel: Tunnel,
    /// The certificate and roots under which it was made.
    pub(crate) epoch: Epoch,
    /// The peer's proof of its identity.
    pub(crate) proof: Rc<Proof>,
    /// When it was made.
    pub(crate) made: Instant,
}

struct Idle {
    pooled: Pooled,
    since: Instant,
}

/// The idle tunnels of one worker.
pub(crate) struct Pool {
    bounds: Bounds,
    metrics: Metrics,
    count: Cell<usize>,
    idle: RefCell<BTreeMap<Key, Vec<Idle>>>,
}

impl Pool {
    /// Creates an empty pool.
    pub(crate) const fn new(bounds: Bounds, metrics: Metrics) -> Self {
        Self {
            bounds,
            metrics,
            count: Cell::new(0),
            idle: RefCell::new(BTreeMap::new()),
        }
    }

    /// Takes the tunnel that was used last, if one is left that can still be used.
    pub(crate) fn take(&self, key: &Key, epoch: Epoch, now: Instant) -> Option<Pooled> {
        let mut idle = self.idle.borrow_mut();
        let tunnels = idle.get_mut(key)?;
        let mut found = None;
        while let Some(mut next) = tunnels.pop() {
            self.count.set(self.count.get() - 1);
            if self.usable(&next, epoch, now) && self.is_quiet(&mut next.pooled.tunnel) {
                found = Some(next.pooled);
                break;
            }
        }
        if tunnels.is_empty() {
            idle.remove(key);
        }
        found
    }

    /// Keeps a tunnel for the next connection, or returns it if the pool is full.
    #[must_use = "close a tunnel that the pool does not take"]
    pub(crate) fn put(&self, key: &Key, pooled: Pooled, now: Instant) -> Option<Tunnel> {
        let mut idle = self.idle.borrow_mut();
        if self.count.get() >= self.bounds.total {
            return Some(pooled.tunnel);
        }
        let tunnels = idle.entry(key.clone()).or_default();
        if tunnels.len() >= self.bounds.per_key {
            return Some(pooled.tunnel);
        }
        tunnels.push(Idle { pooled, since: now });
        self.count.set(self.count.get() + 1);
        None
    }

    /// Removes tunnels that are too old, were closed by the peer, or fail `keep`.
    pub(crate) fn sweep(
        &self,
        now: Instant,
        mut keep: impl FnMut(&Key, Epoch) -> bool,
    ) -> Vec<Tunnel> {
        let mut out = Vec::new();
        self.idle.borrow_mut().retain(|key, tunnels| {
            let all = std::mem::take(tunnels);
            for mut idle in all {
                let epoch = idle.pooled.epoch;
                if keep(key, epoch)
                    && self.usable(&idle, epoch, now)
                    && self.is_quiet(&mut idle.pooled.tunnel)
                {
                    tunnels.push(idle);
                } else {
                    out.push(idle.pooled.tunnel);
                }
            }
            !tunnels.is_empty()
        });
        self.count.set(self.count.get() - out.len());
        out
    }

    /// Removes all tunnels.
    pub(crate) fn drain(&self) -> Vec<Tunnel> {
        self.sweep(Instant::now(), |_, _| false)
    }

    fn is_quiet(&self, tunnel: &mut Tunnel) -> bool {
        tunnel.is_quiet().unwrap_or_else(|error| {
            if error.is_violation() {
                tracing::debug!(%error, "protocol violation in an idle tunnel");
                self.metrics.violated(Role::Client);
            }
            false
        })
    }

    fn usable(&self, idle: &Idle, epoch: Epoch, now: Instant) -> bool {
        idle.pooled.epoch == epoch
            && now.duration_since(idle.since) < self.bounds.idle
            && now.duration_since(idle.pooled.made) < self.bounds.age
    }
}
