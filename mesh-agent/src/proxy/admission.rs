// SPDX-License-Identifier: Apache-2.0
//! Bounds the number of concurrent TLS handshakes: per source and pod, per pod, and per agent.
//!
//! Handshakes beyond a bound wait in order of arrival, not longer than the time limit of a handshake. A
//! connection that has not sent a byte holds no permit: it is only counted against its source.

use std::collections::BTreeMap;
#[expect(
    clippy::disallowed_types,
    reason = "private to this file: tunnels of one pod are served by several workers; held for a look-up"
)]
use std::sync::Mutex;
use std::sync::{Arc, PoisonError, Weak};

use mesh_common::Addr;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bounds of handshakes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Concurrent handshakes of one pod, in both directions.
    pub pod: usize,
    /// Concurrent handshakes from one address to one pod.
    pub source: usize,
    /// Connections from one address to one pod that have not proven an identity yet.
    pub unproven: usize,
    /// Concurrent handshakes of the agent.
    pub total: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            pod: 256,
            source: 64,
            unproven: 1024,
            total: 2048,
        }
    }
}

/// The permits of the whole agent.
#[derive(Clone, Debug)]
pub(crate) struct Total(Arc<Semaphore>);

impl Total {
    pub(crate) fn new(bounds: &Bounds) -> Self {
        Self(Arc::new(Semaphore::new(bounds.total)))
    }
}

/// The permits of one source.
#[derive(Debug)]
struct Source {
    unproven: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
}

/// The permits of one pod.
#[derive(Debug)]
#[expect(clippy::disallowed_types, reason = "see the import")]
pub(crate) struct Admission {
    bounds: Bounds,
    pod: Arc<Semaphore>,
    total: Total,
    sources: Mutex<Sources>,
}

/// The known sources.
#[derive(Debug, Default)]
struct Sources {
    known: BTreeMap<Addr, Weak<Source>>,
    /// The number of entries at which sources without connections are removed.
    sweep_at: usize,
}

/// Number of sources without connections that may be kept.
const REMEMBERED: usize = 64;

/// A connection that has not proven an identity yet, counted against its source.
#[derive(Debug)]
pub(crate) struct Unproven {
    source: Arc<Source>,
    _counted: OwnedSemaphorePermit,
}

/// The permits of a handshake; returned when dropped.
#[derive(Debug)]
pub(crate) struct Admitted {
    _permits: [Option<OwnedSemaphorePermit>; 3],
}

impl Admission {
    #[expect(clippy::disallowed_types, reason = "see the import")]
    pub(crate) fn new(bounds: Bounds, total: Total) -> Self {
        Self {
            bounds,
            pod: Arc::new(Semaphore::new(bounds.pod)),
            total,
            sources: Mutex::new(Sources::default()),
        }
    }

    /// Counts a connection against its source. `None` if the source has too many.
    pub(crate) fn arrived(&self, from: Addr) -> Option<Unproven> {
        let source = self.source(from);
        let _counted = Arc::clone(&source.unproven).try_acquire_owned().ok()?;
        Some(Unproven { source, _counted })
    }

    fn source(&self, from: Addr) -> Arc<Source> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = sources.known.get(&from).and_then(Weak::upgrade) {
            return known;
        }
        if sources.known.len() >= sources.sweep_at {
            sources.known.retain(|_, source| source.strong_count() > 0);
            sources.sweep_at = 2 * sources.known.len() + REMEMBERED;
        }
        let source = Arc::new(Source {
            unproven: Arc::new(Semaphore::new(self.bounds.unproven)),
            handshakes: Arc::new(Semaphore::new(self.bounds.source)),
        });
        sources.known.insert(from, Arc::downgrade(&source));
        source
    }

    /// Waits for the permits of a handshake with a client. Cancel safe.
    pub(crate) async fn accept(&self, from: &Unproven) -> Admitted {
        let source = acquire(&from.source.handshakes).await;
        let [_, pod, total] = self.dial().await._permits;
        Admitted {
            _permits: [source, pod, total],
        }
    }

    /// Waits for the permits of a handshake with a server. Cancel safe.
    pub(crate) async fn dial(&self) -> Admitted {
        let pod = acquire(&self.pod).await;
        let total = acquire(&self.total.0).await;
        Admitted {
            _permits: [None, pod, total],
        }
    }
}

/// The semaphores are never closed.
async fn acquire(of: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(of).acquire_owned().await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(last: u8) -> Addr {
        std::net::IpAddr::from([10, 0, 0, last]).into()
    }

    fn admission(total: &Total) -> Admission {
        let bounds = Bounds {
            pod: 3,
            source: 2,
            unproven: 4,
            total: 5,
        };
        Admission::new(bounds, total.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_are_bounded_per_source_pod_and_agent() {
        let total = Total(Arc::new(Semaphore::new(5)));
        let (one, two) = (admission(&total), admission(&total));
        let waits = async |pod: &Admission, from: &Unproven| {
            let second = std::time::Duration::from_secs(1);
            tokio::time::timeout(second, pod.accept(from)).await.ok()
        };
        let (a, b) = (one.arrived(addr(1)).unwrap(), one.arrived(addr(2)).unwrap());
        let first = waits(&one, &a).await.unwrap();
        let _second = waits(&one, &a).await.unwrap();
        assert!(waits(&one, &a).await.is_none(), "the source");
        let _third = waits(&one, &b).await.unwrap();
        assert!(waits(&one, &b).await.is_none(), "the pod");
        let c = two.arrived(addr(1)).unwrap();
        let _fourth = waits(&two, &c).await.unwrap();
        let _fifth = waits(&two, &c).await.unwrap();
        let d = two.arrived(addr(4)).unwrap();
        assert!(waits(&two, &d).await.is_none(), "the agent");
        drop(first);
        assert!(waits(&two, &d).await.is_some());
    }

    #[test]
    fn unproven_connections_are_bounded_per_source_and_forgotten() {
        let total = Total(Arc::new(Semaphore::new(5)));
        let pod = admission(&total);
        let all: Vec<_> = (0..4).map(|_| pod.arrived(addr(1)).unwrap()).collect();
        assert!(pod.arrived(addr(1)).is_none());
        assert!(pod.arrived(addr(2)).is_some());
        drop(all);
        assert!(pod.arrived(addr(1)).is_some());
        for last in 0..=255 {
            drop(pod.arrived(addr(last)));
        }
        assert!(pod.sources.lock().unwrap().known.len() <= REMEMBERED);
    }
}
