// SPDX-License-Identifier: Apache-2.0
//! The interface between `control` and the kernel: [`Datapath`] in production, an in-memory fake in tests.

use std::os::fd::BorrowedFd;

use mesh_common::pod::{ListenerSlot, PodIndex, PodState, PodView};
use mesh_common::{Endpoint, Reason};
use mesh_plan::Plan;
use mesh_plan::plan::MapOp;

use mesh_datapath::{AttachedPod, Datapath, Error, PodAttachment};
use mesh_sys::sock_diag::Socket;

/// The datapath operations that `control` uses; each method has the contract of the same method of
/// [`Datapath`].
pub trait Kernel {
    /// See [`Datapath::is_writer`]; without kernel programs there is no other agent.
    fn is_writer(&mut self) -> bool {
        true
    }
    /// See [`Datapath::stop_writing`].
    fn stop_writing(&mut self) {}
    /// See [`Datapath::dump`].
    ///
    /// # Errors
    /// When a map cannot be read.
    fn dump(&self) -> Result<Plan, Error>;
    /// See [`Datapath::apply`].
    ///
    /// # Errors
    /// The first operation that fails; later operations are not attempted.
    fn apply(&mut self, ops: &[MapOp]) -> Result<(), Error>;
    /// See [`Datapath::note`].
    fn note(&self, plan: &Plan);
    /// See [`Datapath::pods`].
    ///
    /// # Errors
    /// When the map cannot be read.
    fn pods(&self) -> Result<Vec<(PodIndex, PodState)>, Error>;
    /// See [`Datapath::add_pod`].
    ///
    /// # Errors
    /// When no slot is left, or the kernel refuses.
    fn add_pod(&mut self, pod: &PodAttachment<'_>) -> Result<AttachedPod, Error>;
    /// See [`Datapath::set_listener`].
    ///
    /// # Errors
    /// When the socket does not listen.
    fn set_listener(
        &mut self,
        index: PodIndex,
        slot: ListenerSlot,
        listener: BorrowedFd<'_>,
    ) -> Result<(), Error>;
    /// See [`Datapath::set_pod`].
    ///
    /// # Errors
    /// When the pod was not added.
    fn set_pod(&mut self, index: PodIndex, view: &PodView) -> Result<(), Error>;
    /// See [`Datapath::remove_pod`].
    ///
    /// # Errors
    /// When a map or a pin cannot be changed.
    fn remove_pod(&mut self, index: PodIndex) -> Result<(), Error>;
    /// See [`Datapath::set_old_connections`].
    ///
    /// # Errors
    /// When the map is full.
    fn set_old_connections(
        &mut self,
        index: PodIndex,
        connections: &[(Endpoint, Endpoint, Reason)],
    ) -> Result<(), Error>;
    /// See [`Handles::decided`]; `None` without kernel programs.
    ///
    /// [`Handles::decided`]: mesh_datapath::Handles::decided
    fn decided(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// See [`Handles::is_tunnel`].
    ///
    /// [`Handles::is_tunnel`]: mesh_datapath::Handles::is_tunnel
    fn is_tunnel(&self, _socket: &Socket) -> bool {
        false
    }
    /// See [`Datapath::expire_flows`].
    ///
    /// # Errors
    /// When the map cannot be read.
    fn expire_flows(&mut self) -> Result<usize, Error> {
        Ok(0)
    }
}

impl Kernel for Datapath {
    fn is_writer(&mut self) -> bool {
        Self::is_writer(self)
    }

    fn stop_writing(&mut self) {
        Self::stop_writing(self);
    }

    fn dump(&self) -> Result<Plan, Error> {
        Self::dump(self)
    }

    fn apply(&mut self, ops: &[MapOp]) -> Result<(), Error> {
        Self::apply(self, ops)
    }

    fn note(&self, plan: &Plan) {
        Self::note(self, plan);
    }

    fn pods(&self) -> Result<Vec<(PodIndex, PodState)>, Error> {
        Self::pods(self)
    }

    fn add_pod(&mut self, pod: &PodAttachment<'_>) -> Result<AttachedPod, Error> {
        Self::add_pod(self, pod)
    }

    fn set_listener(
        &mut self,
        index: PodIndex,
        slot: ListenerSlot,
        listener: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        Self::set_listener(self, index, slot, listener)
    }

    fn set_pod(&mut self, index: PodIndex, view: &PodView) -> Result<(), Error> {
        Self::set_pod(self, index, view)
    }

    fn remove_pod(&mut self, index: PodIndex) -> Result<(), Error> {
        Self::remove_pod(self, index)
    }

    fn set_old_connections(
        &mut self,
        index: PodIndex,
        connections: &[(Endpoint, Endpoint, Reason)],
    ) -> Result<(), Error> {
        Self::set_old_connections(self, index, connections)
    }

    fn decided(&self) -> Option<BorrowedFd<'_>> {
        Some(Self::decided(self))
    }

    fn is_tunnel(&self, socket: &Socket) -> bool {
        Self::is_tunnel(self, socket)
    }

    fn expire_flows(&mut self) -> Result<usize, Error> {
        Self::expire_flows(self)
    }
}
