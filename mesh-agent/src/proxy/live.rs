// SPDX-License-Identifier: Apache-2.0
//! The connections of one worker that are open, and how they are ended from outside: by a change
//! of policy, with their pod, or with the agent.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use mesh_common::path::{Outbound, outbound, tunnelled};
use mesh_common::{Endpoint, IdentityId, Protocol, Reason};
use mesh_plan::Plan;
use tokio::sync::Notify;

use crate::identity::{Identities, Proof};

/// What a connection was allowed for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Subject {
    /// A pod of this node reaches out.
    Outbound {
        /// Where to, services resolved.
        to: Endpoint,
    },
    /// A pod of this node is reached.
    Inbound {
        /// By whom: the application's own address and port.
        from: Endpoint,
        /// Who that was when it was allowed.
        peer: IdentityId,
        /// What is reached.
        to: Endpoint,
    },
}

impl Subject {
    /// Whether the plan still allows it to this pod. A pod that the plan does not know is none of
    /// the plan's business: its end is noticed elsewhere.
    fn is_allowed(&self, plan: &Plan, uid: &str) -> bool {
        let Some(pod) = plan.pods.get(uid) else {
            return true;
        };
        match self {
            Self::Outbound { to } => {
                outbound(plan, &pod.view, *to, Protocol::TCP).action != Outbound::Refuse
            }
            Self::Inbound { from, peer, to } => {
                let peer = plan.peers.get(&from.addr).map_or(*peer, |now| now.id);
                tunnelled(plan, &pod.view, peer, &from.addr, to.port).allowed
            }
        }
    }
}

/// An open connection or tunnel, as others see it.
#[derive(Debug)]
pub(crate) struct Entry {
    uid: Arc<str>,
    subject: Cell<Option<Subject>>,
    proof: RefCell<Option<Rc<Proof>>>,
    idle: Cell<bool>,
    ended: Cell<Option<Reason>>,
    notify: Notify,
}

impl Entry {
    /// Ends it; the first reason counts.
    fn end(&self, reason: Reason) {
        if self.ended.get().is_none() {
            self.ended.set(Some(reason));
        }
        self.notify.notify_one();
    }

    /// What it is to be judged by from now on; `None` = nothing that policy speaks of.
    pub(crate) fn set_subject(&self, subject: Option<Subject>) {
        self.subject.set(subject);
    }

    /// What the peer has proven itself with.
    pub(crate) fn set_proof(&self, proof: &Rc<Proof>) {
        *self.proof.borrow_mut() = Some(Rc::clone(proof));
    }

    /// Whether it is a tunnel that carries no connection at the moment.
    pub(crate) fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
    }

    /// Waits until it is to end. Cancel safe.
    pub(crate) async fn ended(&self) -> Reason {
        loop {
            if let Some(reason) = self.ended.get() {
                return reason;
            }
            self.notify.notified().await;
        }
    }
}

/// Everything open on one worker.
#[derive(Debug, Default)]
pub(crate) struct Live {
    entries: RefCell<BTreeMap<u64, Rc<Entry>>>,
    next: Cell<u64>,
}

impl Live {
    /// Registers something that belongs to a pod. Register first, then decide: so no change is
    /// missed.
    pub(crate) fn register(self: &Rc<Self>, uid: &Arc<str>) -> Registered {
        let number = self.next.get();
        self.next.set(number + 1);
        let entry = Rc::new(Entry {
            uid: Arc::clone(uid),
            subject: Cell::new(None),
            proof: RefCell::new(None),
            idle: Cell::new(false),
            ended: Cell::new(None),
            notify: Notify::new(),
        });
        self.entries.borrow_mut().insert(number, Rc::clone(&entry));
        Registered {
            live: Rc::clone(self),
            number,
            entry,
        }
    }

    /// How many are open.
    pub(crate) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Decides all of them again.
    pub(crate) fn decide_again(&self, plan: &Plan) {
        for entry in self.entries.borrow().values() {
            if let Some(subject) = entry.subject.get()
                && !subject.is_allowed(plan, &entry.uid)
            {
                entry.end(Reason::PolicyChanged);
            }
        }
    }

    /// Ends those whose peer's certificate is revoked.
    pub(crate) fn prove_again(&self, identities: &Identities) {
        for entry in self.entries.borrow().values() {
            if let Some(proof) = &*entry.proof.borrow()
                && entry.ended.get().is_none()
                && identities.is_revoked(proof)
            {
                tracing::info!(uid = %entry.uid, peer = %proof.id, "a peer's certificate is revoked: its tunnel is closed");
                entry.end(Reason::IdentityRefused);
            }
        }
    }

    /// Ends what belongs to pods for which `is_gone`.
    pub(crate) fn end_pods(&self, is_gone: impl Fn(&str) -> bool) {
        for entry in self.entries.borrow().values() {
            if is_gone(&entry.uid) {
                entry.end(Reason::PodDeleted);
            }
        }
    }

    /// Ends everything.
    pub(crate) fn end_all(&self, reason: Reason) {
        for entry in self.entries.borrow().values() {
            entry.end(reason);
        }
    }

    /// Ends tunnels that carry no connection.
    pub(crate) fn end_idle(&self, reason: Reason) {
        for entry in self.entries.borrow().values() {
            if entry.idle.get() {
                entry.end(reason);
            }
        }
    }
}

/// Keeps an entry registered.
#[derive(Debug)]
pub(crate) struct Registered {
    live: Rc<Live>,
    number: u64,
    entry: Rc<Entry>,
}

impl std::ops::Deref for Registered {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.live.entries.borrow_mut().remove(&self.number);
    }
}
