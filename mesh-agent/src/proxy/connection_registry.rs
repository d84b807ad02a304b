// SPDX-License-Identifier: Apache-2.0
//! The open connections of one worker, and how they are ended from outside: by a change of policy,
//! with their pod, or with the agent.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use mesh_common::path::{Outbound, outbound, tunnelled};
use mesh_common::{Endpoint, IdentityId, Protocol, Reason, Verdict};
use mesh_identity::{Identities, Proof};
use mesh_log::log_limited;
use mesh_plan::Index;
use mesh_tunnel::CloseReason;
use tokio::sync::Notify;

use mesh_telemetry::record::Close;

/// The input of the decision that allowed a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DecisionInput {
    /// A pod of this node is the client.
    Outbound {
        /// The destination after service resolution.
        to: Endpoint,
    },
    /// A pod of this node is the server.
    Inbound {
        /// The client's own address and port.
        from: Endpoint,
        /// The client's identity when the connection was allowed.
        peer: IdentityId,
        /// The destination.
        to: Endpoint,
    },
}

impl DecisionInput {
    /// The verdict, if this plan refuses the connection. A pod that the plan does not know is deleted,
    /// which is noticed elsewhere.
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

/// Why an open connection is terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Termination {
    /// Policy or modes changed, and this verdict refuses the connection now.
    Refused(Verdict),
    /// Another reason.
    Because(Reason),
}

impl Termination {
    /// The reason code.
    pub(crate) const fn reason(&self) -> Reason {
        match self {
            Self::Refused(_) => Reason::PolicyChanged,
            Self::Because(reason) => *reason,
        }
    }

    /// The reason that the peer is told.
    pub(crate) const fn reason_for_peer(&self) -> CloseReason {
        let reason = CloseReason::new(self.reason());
        match self {
            Self::Refused(verdict) => CloseReason {
                rule: verdict.rule,
                ..reason
            },
            Self::Because(_) => reason,
        }
    }

    /// The end of the connection's record.
    pub(crate) const fn close(&self) -> Close {
        match self {
            Self::Refused(verdict) => Close::Changed(*verdict),
            Self::Because(reason) => Close::Failed(*reason),
        }
    }
}

/// An open connection or tunnel.
#[derive(Debug)]
pub(crate) struct ConnectionEntry {
    uid: Arc<str>,
    input: Cell<Option<DecisionInput>>,
    proof: RefCell<Option<Rc<Proof>>>,
    idle: Cell<bool>,
    termination: Cell<Option<Termination>>,
    notify: Notify,
}

impl ConnectionEntry {
    /// Terminates the connection; the first reason counts.
    fn terminate(&self, why: Termination) {
        if self.termination.get().is_none() {
            self.termination.set(Some(why));
        }
        self.notify.notify_one();
    }

    /// Sets the input by which policy changes are decided; `None` if policy does not apply.
    pub(crate) fn set_input(&self, input: Option<DecisionInput>) {
        self.input.set(input);
    }

    /// The termination, if this plan refuses the connection.
    fn refused(&self, plan: &Index) -> Option<Termination> {
        let verdict = self.input.get()?.refused(plan, &self.uid)?;
        Some(Termination::Refused(verdict))
    }

    /// Sets the peer's proof of its identity.
    pub(crate) fn set_proof(&self, proof: &Rc<Proof>) {
        *self.proof.borrow_mut() = Some(Rc::clone(proof));
    }

    /// Sets whether this is a tunnel that carries no connection at the moment.
    pub(crate) fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
    }

    /// Waits until the connection is terminated. Cancel safe.
    pub(crate) async fn terminated(&self) -> Termination {
        loop {
            if let Some(why) = self.termination.get() {
                return why;
            }
            self.notify.notified().await;
        }
    }
}

/// The open connections and tunnels of one worker.
#[derive(Debug, Default)]
pub(crate) struct ConnectionRegistry {
    entries: RefCell<BTreeMap<u64, Rc<ConnectionEntry>>>,
    next: Cell<u64>,
}

impl ConnectionRegistry {
    /// Registers a connection of a pod. Register first, then decide: so no change is missed.
    pub(crate) fn register(self: &Rc<Self>, uid: &Arc<str>) -> Registration {
        let number = self.next.get();
        self.next.set(number + 1);
        let entry = Rc::new(ConnectionEntry {
            uid: Arc::clone(uid),
            input: Cell::new(None),
            proof: RefCell::new(None),
            idle: Cell::new(false),
            termination: Cell::new(None),
            notify: Notify::new(),
        });
        self.entries.borrow_mut().insert(number, Rc::clone(&entry));
        Registration {
            registry: Rc::clone(self),
            number,
            entry,
        }
    }

    /// The number of open connections.
    pub(crate) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Decides all connections again.
    pub(crate) fn decide_again(&self, plan: &Index) {
        for entry in self.entries.borrow().values() {
            if let Some(why) = entry.refused(plan) {
                entry.terminate(why);
            }
        }
    }

    /// Terminates tunnels whose peer's certificate is revoked.
    pub(crate) fn prove_again(&self, identities: &Identities) {
        for entry in self.entries.borrow().values() {
            if let Some(proof) = &*entry.proof.borrow()
                && entry.termination.get().is_none()
                && identities.is_revoked(proof)
            {
                log_limited!(info, proof.id, uid = %entry.uid, peer = %proof.id, "closing a tunnel: the peer's certificate is revoked");
                entry.terminate(Termination::Because(Reason::IdentityRefused));
            }
        }
    }

    /// Terminates the connections of pods for which `is_gone` holds.
    pub(crate) fn end_pods(&self, is_gone: impl Fn(&str) -> bool) {
        for entry in self.entries.borrow().values() {
            if is_gone(&entry.uid) {
                entry.terminate(Termination::Because(Reason::PodDeleted));
            }
        }
    }

    /// Terminates all connections.
    pub(crate) fn end_all(&self, reason: Reason) {
        for entry in self.entries.borrow().values() {
            entry.terminate(Termination::Because(reason));
        }
    }

    /// Terminates tunnels that carry no connection.
    pub(crate) fn end_idle(&self, reason: Reason) {
        for entry in self.entries.borrow().values() {
            if entry.idle.get() {
                entry.terminate(Termination::Because(reason));
            }
        }
    }
}

/// Keeps a connection registered.
#[derive(Debug)]
pub(crate) struct Registration {
    registry: Rc<ConnectionRegistry>,
    number: u64,
    entry: Rc<ConnectionEntry>,
}

impl std::ops::Deref for Registration {
    type Target = ConnectionEntry;

    fn deref(&self) -> &ConnectionEntry {
        &self.entry
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.entries.borrow_mut().remove(&self.number);
    }
}
