// SPDX-License-Identifier: Apache-2.0
//! An in-memory kernel: the plan, the pods, and a log of operations in order.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use mesh_common::pod::{ListenerSlot, PodIndex, PodState, PodView};
use mesh_common::{Endpoint, Reason};
use mesh_plan::Plan;
use mesh_plan::plan::{Entry, LocalPod, MapOp};

use super::kernel::Kernel;
use mesh_datapath::{AttachedPod, Error, PodAttachment};

/// An old connection: local endpoint, remote endpoint, and the reason why it stays plaintext.
pub(super) type Old = (Endpoint, Endpoint, Reason);

/// The state, shared so that a test can inspect it while `control` owns the kernel.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) plan: RefCell<Plan>,
    pub(super) pods: RefCell<BTreeMap<PodIndex, PodState>>,
    pub(super) uids: RefCell<BTreeMap<String, PodIndex>>,
    pub(super) old: RefCell<BTreeMap<PodIndex, Vec<Old>>>,
    /// The operations so far, one line each.
    pub(super) log: RefCell<Vec<String>>,
    /// Number of operations that succeed before one fails; `None` = all succeed.
    pub(super) fails_after: Cell<Option<usize>>,
    /// Refuses operations on services.
    pub(super) refuses_services: Cell<bool>,
    /// Attaches pods without a tc gate.
    pub(super) ungated: Cell<bool>,
    /// Another agent of the node writes.
    pub(super) replaced: Cell<bool>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Fake(pub(super) Rc<State>);

impl Fake {
    fn log(&self, line: String) {
        self.0.log.borrow_mut().push(line);
    }

    pub(super) fn view(&self, uid: &str) -> Option<PodView> {
        let index = *self.0.uids.borrow().get(uid)?;
        Some(self.0.pods.borrow().get(&index)?.view)
    }

    /// Forgets the UIDs of pods, as a restart of the agent does.
    pub(super) fn restart(&self) {
        self.0.uids.borrow_mut().clear();
        self.0.log.borrow_mut().clear();
    }
}

impl Kernel for Fake {
    fn is_writer(&mut self) -> bool {
        !self.0.replaced.get()
    }

    fn dump(&self) -> Result<Plan, Error> {
        let mut plan = self.0.plan.borrow().clone();
        let pods = self.0.pods.borrow();
        plan.pods = self
            .0
            .uids
            .borrow()
            .iter()
            .map(|(uid, index)| {
                let view = pods[index].view;
                (
                    uid.clone(),
                    LocalPod {
                        view,
                        ..LocalPod::default()
                    },
                )
            })
            .collect();
        Ok(plan)
    }

    fn apply(&mut self, ops: &[MapOp]) -> Result<(), Error> {
        for op in ops {
            let refused = || Error::Attach {
                program: "test",
                target: "nothing".to_owned(),
                source: io::Error::from(io::ErrorKind::OutOfMemory),
            };
            if op.is_of_services() && self.0.refuses_services.get() {
                return Err(refused());
            }
            match self.0.fails_after.get() {
                Some(0) => return Err(refused()),
                Some(n) => self.0.fails_after.set(Some(n - 1)),
                None => {}
            }
            if let MapOp::Put(Entry::Pod(uid, view)) = op {
                let index = *self.0.uids.borrow().get(uid).expect("the pod was added");
                self.set_pod(index, view)?;
            } else {
                self.log("write".to_owned());
                mesh_plan::diff::apply(&mut self.0.plan.borrow_mut(), op);
            }
        }
        Ok(())
    }

    fn note(&self, _plan: &Plan) {}

    fn pods(&self) -> Result<Vec<(PodIndex, PodState)>, Error> {
        Ok(self.0.pods.borrow().iter().map(|(i, s)| (*i, *s)).collect())
    }

    fn add_pod(&mut self, pod: &PodAttachment<'_>) -> Result<AttachedPod, Error> {
        let mut pods = self.0.pods.borrow_mut();
        let known = pods
            .iter()
            .find(|(_, state)| state.netns_cookie == pod.netns_cookie)
            .map(|(index, _)| *index);
        let index = known.unwrap_or_else(|| {
            let free = (0..).map(PodIndex).find(|i| !pods.contains_key(i));
            free.expect("there are enough numbers")
        });
        if known.is_none() {
            let state = PodState {
                netns_cookie: pod.netns_cookie,
                view: pod.view,
                ..PodState::default()
            };
            pods.insert(index, state);
        }
        self.0.uids.borrow_mut().insert(pod.uid.to_owned(), index);
        self.log(format!("add {}", pod.uid));
        Ok(AttachedPod {
            index,
            taken_over: known.is_some(),
            ungated: (pod.link.is_none() || self.0.ungated.get())
                .then(|| "no host side".to_owned()),
        })
    }

    fn set_listener(
        &mut self,
        index: PodIndex,
        slot: ListenerSlot,
        _listener: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        self.log(format!("listener {} {slot:?}", index.0));
        Ok(())
    }

    fn set_pod(&mut self, index: PodIndex, view: &PodView) -> Result<(), Error> {
        let mut pods = self.0.pods.borrow_mut();
        let state = pods.get_mut(&index).expect("the pod was added");
        state.view = *view;
        let enrolled = if view.has(PodState::ENROLLED) {
            "enrolled"
        } else {
            "plain"
        };
        self.log(format!("set {} {enrolled} {:x}", index.0, view.set.0));
        Ok(())
    }

    fn remove_pod(&mut self, index: PodIndex) -> Result<(), Error> {
        self.0.pods.borrow_mut().remove(&index);
        self.0.uids.borrow_mut().retain(|_, i| *i != index);
        self.log(format!("remove {}", index.0));
        Ok(())
    }

    fn set_old_connections(
        &mut self,
        index: PodIndex,
        connections: &[(Endpoint, Endpoint, Reason)],
    ) -> Result<(), Error> {
        self.0.old.borrow_mut().insert(index, connections.to_vec());
        self.log(format!("old {} {}", index.0, connections.len()));
        Ok(())
    }
}
