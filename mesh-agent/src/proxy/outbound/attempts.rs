// SPDX-License-Identifier: Apache-2.0
//! The tunnels that a captured connection may use, in the order in which they are tried.

use std::rc::Rc;
use std::time::Instant;

use mesh_common::Endpoint;
use mesh_datapath::pods::PodHandle;

use super::target::{self, Target};
use crate::proxy::pool::Pooled;
use crate::proxy::worker::Worker;

/// Other endpoints of a service that are tried when one cannot be connected to.
const OTHER_ENDPOINTS: usize = 2;

/// One attempt to carry a connection.
pub(super) struct Attempt {
    /// The endpoint.
    pub(super) target: Rc<Target>,
    /// An idle tunnel to it; `None` if a new tunnel is to be made.
    pub(super) pooled: Option<Pooled>,
    /// Whether another endpoint is left, so that this one need not be waited for as long.
    pub(super) has_alternative: bool,
}

/// The next attempt.
enum Next {
    /// The idle tunnel to an endpoint, or a new one if there is none.
    Endpoint(Rc<Target>),
    /// A new tunnel to an endpoint whose idle tunnel was tried.
    NewTunnel(Rc<Target>),
    /// No attempt is left.
    Nothing,
}

/// Iterates over attempts: for each endpoint the idle tunnel first, if there is one, then a new tunnel.
pub(super) struct Attempts<'a> {
    worker: &'a Worker,
    pod: &'a PodHandle,
    tried: Vec<Endpoint>,
    next: Next,
}

impl<'a> Attempts<'a> {
    /// Begins with the endpoint that the connection was captured for.
    pub(super) fn new(worker: &'a Worker, pod: &'a PodHandle, target: Target) -> Self {
        Self {
            worker,
            pod,
            tried: Vec::new(),
            next: Next::Endpoint(Rc::new(target)),
        }
    }

    /// Skips the remaining attempts at the current endpoint.
    pub(super) fn skip_endpoint(&mut self) {
        if let Next::NewTunnel(target) = &self.next {
            self.next = match self.other_endpoint(target) {
                Some(other) => Next::Endpoint(other),
                None => Next::Nothing,
            };
        }
    }

    /// Another endpoint of the service, if one more may be tried.
    fn other_endpoint(&self, target: &Target) -> Option<Rc<Target>> {
        if self.tried.len() > OTHER_ENDPOINTS {
            return None;
        }
        target::another(self.worker, self.pod, target.request, &self.tried).map(Rc::new)
    }

    /// An idle tunnel that can still be used.
    fn pooled(&self, target: &Target) -> Option<Pooled> {
        let identities = &self.worker.identities;
        let key = &target.key;
        let epoch = identities.epoch(&key.own)?;
        let pooled = self.worker.pool.take(key, epoch, Instant::now())?;
        identities.stands(&key.own, &pooled.proof).then_some(pooled)
    }
}

impl Iterator for Attempts<'_> {
    type Item = Attempt;

    fn next(&mut self) -> Option<Attempt> {
        let target = match std::mem::replace(&mut self.next, Next::Nothing) {
            Next::Nothing => return None,
            Next::NewTunnel(target) => target,
            Next::Endpoint(target) => {
                self.tried.push(target.request.destination);
                if let Some(pooled) = self.pooled(&target) {
                    self.next = Next::NewTunnel(Rc::clone(&target));
                    return Some(Attempt {
                        target,
                        pooled: Some(pooled),
                        has_alternative: false,
                    });
                }
                target
            }
        };
        let other = self.other_endpoint(&target);
        let has_alternative = other.is_some();
        if let Some(other) = other {
            self.next = Next::Endpoint(other);
        }
        Some(Attempt {
            target,
            pooled: None,
            has_alternative,
        })
    }
}
