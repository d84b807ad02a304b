// SPDX-License-Identifier: Apache-2.0
//! The connections of one worker that are open, and how they are ended from outside: by a change
//! of policy, with their pod, or with the agent.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use mesh_common::path::{Outbound, outbound, tunnelled};
use mesh_common::{Endpoint, IdentityId, Protocol, Reason, Verdict};
use mesh_plan::Index;
use tokio::sync::Notify;

use super::tunnel::frame::Why;
use mesh_identity::{Identities, Proof};
use mesh_telemetry::record::Close;

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
    /// What refuses it to this pod by now, if anything does. A pod that the plan does not know is
    /// none of the plan's business: its end is noticed elsewhere.
    fn refused(&self, plan: &Index, uid: &str) -> Option<Verdict> {
        let pod = plan.pods.get(uid)?;
        match self {
            Self::Outbound { to } => {
                let path = outbound(plan, &pod.view, pod.view.set, *to, Protocol::TCP);
                (path.action == Outbound::Refuse).then_some(path.verdict)
            }
            Self::Inbound { from, peer, to } => {
                let peer = plan.peers.get(&from.addr).map_or(*peer, |now| now.id);
                let verdict = tunnelled(plan, pod.view.set, peer, &from.addr, to.port);
                (!verdict.allowed).then_some(verdict)
            }
        }
    }
}

/// Why an open connection is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Policy or modes changed, and this is decided now.
    Refused(Verdict),
    /// Of something else.
    Because(Reason),
}

impl Ending {
    /// In a word.
    pub(crate) const fn reason(&self) -> Reason {
        match self {
            Self::Refused(_) => Reason::PolicyChanged,
            Self::Because(reason) => *reason,
        }
    }

    /// For the other end.
    pub(crate) const fn why(&self) -> Why {
        let why = Why::new(self.reason());
        match self {
            Self::Refused(verdict) => Why {
                rule: verdict.rule,
                ..why
            },
            Self::Because(_) => why,
        }
    }

    /// For the record.
    pub(crate) const fn close(&self) -> Close {
        match self {
            Self::Refused(verdict) => Close::Changed(*verdict),
            Self::Because(reason) => Close::Failed(*reason),
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
    ended: Cell<Option<Ending>>,
    notify: Notify,
}

impl Entry {
    /// Ends it; the first word counts.
    fn end(&self, why: Ending) {
        if self.ended.get().is_none() {
            self.ended.set(Some(why));
        }
        self.notify.notify_one();
    }

    /// What it is to be judged by from now on; `None` = nothing that policy speaks of.
    pub(crate) fn set_subject(&self, subject: Option<Subject>) {
        self.subject.set(subject);
    }

    /// Why it is to end by this plan, if it is.
    pub(crate) fn refused(&self, plan: &Index) -> Option<Ending> {
        let verdict = self.subject.get()?.refused(plan, &self.uid)?;
        Some(Ending::Refused(verdict))
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
    pub(crate) async fn ended(&self) -> Ending {
        loop {
            if let Some(why) = self.ended.get() {
                return why;
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
    pub(crate) fn decide_again(&self, plan: &Index) {
        for entry in self.entries.borrow().values() {
            if let Some(why) = entry.refused(plan) {
                entry.end(why);
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
                entry.end(Ending::Because(Reason::IdentityRefused));
            }
        }
    }

    /// Ends what belongs to pods for which `is_gone`.
    pub(crate) fn end_pods(&self, is_gone: impl Fn(&str) -> bool) {
        for entry in self.entries.borrow().values() {
            if is_gone(&entry.uid) {
                entry.end(Ending::Because(Reason::PodDeleted));
            }
        }
    }

    /// Ends everything.
    pub(crate) fn end_all(&self, reason: Reason) {
        for entry in self.entries.borrow().values() {
            entry.end(Ending::Because(reason));
        }
    }

    /// Ends tunnels that carry no connection.
    pub(crate) fn end_idle(&self, reason: Reason) {
        for entry in self.entries.borrow().values() {
            if entry.idle.get() {
                entry.end(Ending::Because(reason));
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
