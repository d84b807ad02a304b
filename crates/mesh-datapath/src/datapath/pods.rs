// SPDX-License-Identifier: Apache-2.0
//! Adds local pods to the maps, and attaches programs to their interfaces and namespaces.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use aya::programs::LinkOrder;
use aya::programs::links::FdLink;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use mesh_common::flow::Flow;
use mesh_common::maps::{ConnectionKey, MAX_PODS};
use mesh_common::pod::{GatePod, ListenerSlot, LocalAddr, PodIndex, PodState, PodView};
use mesh_common::{Addr, Endpoint, Reason};

use super::load::{GATES, INBOUND, gate, inbound, pin_directory, pod_directory, program_fd};
use super::tables::{all, put, remove};
use super::{Datapath, Error, links};
use mesh_sys::clock;

/// The namespace and interfaces of a pod to attach.
#[derive(Debug)]
pub struct PodAttachment<'a> {
    /// The pod's UID.
    pub uid: &'a str,
    /// Its network namespace.
    pub netns: BorrowedFd<'a>,
    /// The namespace's cookie.
    pub netns_cookie: u64,
    /// The index and name of the host-side interface, if the pod has one.
    pub link: Option<(u32, String)>,
    /// The MAC address of the pod's interface, padded with 2 zero bytes; all 0 = not checked.
    pub mac: [u8; 8],
    /// The pod's view until the first plan is applied. Ignored for a pod that an earlier agent attached.
    pub view: PodView,
}

/// The result of attaching a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedPod {
    /// The pod's index in the maps.
    pub index: PodIndex,
    /// Whether an earlier agent had attached the pod.
    pub taken_over: bool,
    /// Why the gate could not be attached; the pod is not protected then. `None` = it is attached.
    pub ungated: Option<String>,
}

/// The names of a pod's pinned links.
const PIN_INBOUND: &str = "inbound";
const PIN_GATES: [(&str, TcAttachType); 2] = [
    ("from", TcAttachType::Ingress),
    ("to", TcAttachType::Egress),
];

impl Datapath {
    /// Adds a pod in this order: state, gate, the maps by which the hooks find the pod, sk_lookup. A pod that an
    /// earlier agent attached keeps its state and gets the new programs.
    ///
    /// # Errors
    /// The maps are full, or a map update or the attachment of sk_lookup failed.
    pub fn add_pod(&mut self, pod: &PodAttachment<'_>) -> Result<AttachedPod, Error> {
        let known = all(&self.maps.by_netns, "PODS_BY_NETNS")?;
        let (index, taken_over) = match known.get(&pod.netns_cookie) {
            Some(index) => (*index, true),
            None => (self.free_slot()?, false),
        };
        let directory = pod_directory(&self.config.bpffs, index.0);
        fs::create_dir_all(&directory).map_err(|source| Error::Bpffs {
            path: directory.clone(),
            source,
        })?;
        let view = match self.state(index) {
            Some(state) if taken_over => state.view,
            _ => pod.view,
        };
        self.by_uid.insert(pod.uid.to_owned(), index);
        let link = pod.link.as_ref().map_or(0, |(link, _)| *link);
        let base = PodState {
            netns_cookie: pod.netns_cookie,
            mac: pod.mac,
            link,
            view,
            ..PodState::default()
        };
        self.write(index, base)?;
        let ungated = self.attach_gate(pod, &directory)?;
        let mut gated = base;
        match ungated {
            None => gated.view.flags |= PodState::GATED,
            Some(_) => gated.view.flags &= !PodState::GATED,
        }
        self.write(index, gated)?;
        for addr in [view.v4, view.v6]
            .into_iter()
            .filter(|addr| !addr.is_none())
        {
            put(
                &mut self.maps.by_addr,
                "PODS_BY_ADDR",
                addr,
                LocalAddr { index, link },
            )?;
        }
        put(
            &mut self.maps.by_netns,
            "PODS_BY_NETNS",
            pod.netns_cookie,
            index,
        )?;
        self.attach_inbound(pod, &directory)?;
        self.next_generation()?;
        Ok(AttachedPod {
            index,
            taken_over,
            ungated,
        })
    }

    /// Changes a pod's policy and modes in one atomic write. The flag for an attached gate is not changed.
    ///
    /// # Errors
    /// The pod was not added, or the map update failed.
    pub fn set_pod(&mut self, index: PodIndex, view: &PodView) -> Result<(), Error> {
        let switched = self.switch_pod(index, view);
        self.next_generation()?;
        switched
    }

    /// Does [`Self::set_pod`] without the new config generation that invalidates cached decisions.
    pub(super) fn switch_pod(&mut self, index: PodIndex, view: &PodView) -> Result<(), Error> {
        let mut state = self
            .state(index)
            .ok_or_else(|| Error::UnknownPod(format!("slot {}", index.0)))?;
        let gated = state.view.flags & PodState::GATED;
        let old = [state.view.v4, state.view.v6];
        let new = [view.v4, view.v6];
        state.view = *view;
        state.view.flags = (view.flags & !PodState::GATED) | gated;
        let link = state.link;
        for addr in new.into_iter().filter(|addr| !addr.is_none()) {
            put(
                &mut self.maps.by_addr,
                "PODS_BY_ADDR",
                addr,
                LocalAddr { index, link },
            )?;
        }
        self.write(index, state)?;
        for addr in old
            .into_iter()
            .filter(|addr| !addr.is_none() && !new.contains(addr))
        {
            self.forget_addr(addr, index)?;
        }
        Ok(())
    }

    /// Sets the agent's listener in a slot. The previous listener in the slot gets no new connections from then on.
    ///
    /// # Errors
    /// The socket does not listen.
    pub fn set_listener(
        &mut self,
        index: PodIndex,
        slot: ListenerSlot,
        listener: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        self.maps
            .listeners
            .set(index.listener(slot), &listener.as_raw_fd(), 0)
            .map_err(|source| Error::Map {
                action: format!("write the listener {slot:?} of pod {} to", index.0),
                map: "LISTENERS",
                source: Box::new(source),
            })
    }

    /// Removes a deleted pod: first its entries in look-up maps and its links, last its state.
    ///
    /// # Errors
    /// A map or pin cannot be changed.
    pub fn remove_pod(&mut self, index: PodIndex) -> Result<(), Error> {
        self.by_uid.retain(|_, other| *other != index);
        let directory = pod_directory(&self.config.bpffs, index.0);
        let state = self.state(index);
        if let Some(state) = &state {
            remove(&mut self.maps.by_netns, "PODS_BY_NETNS", state.netns_cookie)?;
        }
        let pins = PIN_GATES
            .map(|(name, _)| name)
            .into_iter()
            .chain([PIN_INBOUND]);
        for name in pins {
            links::unpin(&directory.join(name)).map_err(|source| Error::Bpffs {
                path: directory.join(name),
                source,
            })?;
        }
        if let Err(source) = fs::remove_dir(&directory)
            && source.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::Bpffs {
                path: directory,
                source,
            });
        }
        if let Some(state) = &state {
            for addr in [state.view.v4, state.view.v6] {
                self.forget_addr(addr, index)?;
            }
            if state.link != 0 {
                remove(&mut self.maps.by_link, "PODS_BY_LINK", state.link)?;
            }
        }
        self.forget_flows(|slot_pod, _| slot_pod == index)?;
        self.forget_old_connections(index)?;
        remove(&mut self.maps.pods, "PODS", index)?;
        self.next_generation()
    }

    /// Returns all pods in the maps, also those of an earlier agent.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn pods(&self) -> Result<Vec<(PodIndex, PodState)>, Error> {
        Ok(all(&self.maps.pods, "PODS")?.into_iter().collect())
    }

    /// Replaces the pod's list of connections that predate its enrollment or its peer's and stay plaintext, each as
    /// (local endpoint, remote endpoint, reason).
    ///
    /// # Errors
    /// The map is full.
    pub fn set_old_connections(
        &mut self,
        index: PodIndex,
        connections: &[(Endpoint, Endpoint, Reason)],
    ) -> Result<(), Error> {
        let keep: BTreeSet<_> = connections
            .iter()
            .map(|(local, remote, _)| ConnectionKey {
                local: *local,
                remote: *remote,
            })
            .collect();
        for (local, remote, reason) in connections {
            let key = ConnectionKey {
                local: *local,
                remote: *remote,
            };
            put(
                &mut self.maps.old_connections,
                "OLD_CONNECTIONS",
                key,
                *reason as u32,
            )?;
        }
        self.drop_old_connections(index, &keep)
    }

    /// Removes expired UDP flows to free map entries, and returns their number. The hooks ignore expired flows anyway.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn expire_flows(&mut self) -> Result<usize, Error> {
        let now = clock::monotonic_ns();
        self.forget_flows(|_, flow| !flow.alive(now))
    }

    fn forget_flows(&mut self, gone: impl Fn(PodIndex, &Flow) -> bool) -> Result<usize, Error> {
        let mut removed = 0;
        for (slot, flow) in all(&self.maps.flows, "FLOWS")? {
            let pod = PodIndex(slot.pod);
            if gone(pod, &flow) {
                remove(&mut self.maps.flows, "FLOWS", slot)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn forget_old_connections(&mut self, index: PodIndex) -> Result<(), Error> {
        self.drop_old_connections(index, &BTreeSet::new())
    }

    fn drop_old_connections(
        &mut self,
        index: PodIndex,
        keep: &BTreeSet<ConnectionKey>,
    ) -> Result<(), Error> {
        let Some(state) = self.state(index) else {
            return Ok(());
        };
        for key in all(&self.maps.old_connections, "OLD_CONNECTIONS")?.into_keys() {
            if state.view.owns(&key.local.addr) && !keep.contains(&key) {
                remove(&mut self.maps.old_connections, "OLD_CONNECTIONS", key)?;
            }
        }
        Ok(())
    }

    /// Removes an address, unless it now belongs to another pod.
    fn forget_addr(&mut self, addr: Addr, index: PodIndex) -> Result<(), Error> {
        if !addr.is_none()
            && self
                .maps
                .by_addr
                .get(&addr, 0)
                .is_ok_and(|now| now.index == index)
        {
            remove(&mut self.maps.by_addr, "PODS_BY_ADDR", addr)?;
        }
        Ok(())
    }

    fn state(&self, index: PodIndex) -> Option<PodState> {
        self.maps.pods.get(&index, 0).ok()
    }

    /// Writes a pod's state with a new revision.
    fn write(&mut self, index: PodIndex, state: PodState) -> Result<(), Error> {
        self.revision += 1;
        let state = PodState {
            revision: self.revision,
            revision_end: self.revision,
            ..state
        };
        put(&mut self.maps.pods, "PODS", index, state)?;
        if state.link == 0 {
            return Ok(());
        }
        let gate = GatePod::new(index, &state);
        put(&mut self.maps.by_link, "PODS_BY_LINK", state.link, gate)
    }

    pub(super) fn latest_revision(&self) -> u64 {
        let pods = all(&self.maps.pods, "PODS").unwrap_or_default();
        pods.values().map(|state| state.revision).max().unwrap_or(0)
    }

    fn free_slot(&self) -> Result<PodIndex, Error> {
        let used = all(&self.maps.pods, "PODS")?;
        (0..MAX_PODS)
            .map(PodIndex)
            .find(|index| !used.contains_key(index))
            .ok_or(Error::TooManyPods(used.len()))
    }

    /// Attaches the gate as the first tcx program, or updates it. `Some` = why it could not be attached.
    fn attach_gate(
        &mut self,
        pod: &PodAttachment<'_>,
        directory: &Path,
    ) -> Result<Option<String>, Error> {
        let Some((_, name)) = &pod.link else {
            return Ok(Some("the pod has no host-side interface".to_owned()));
        };
        for (program, (pin, side)) in GATES.into_iter().zip(PIN_GATES) {
            let path = directory.join(pin);
            let refused = |source| Error::Attach {
                program,
                target: name.clone(),
                source,
            };
            let classifier = gate(&mut self.object, program)?;
            let fd = program_fd(classifier.fd(), program)?;
            if links::update(&path, fd.as_fd()).map_err(refused)? {
                continue;
            }
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let attached = classifier
                .attach_with_options(name, side, options)
                .and_then(|id| classifier.take_link(id))
                .map_err(io::Error::other)
                .and_then(|link| FdLink::try_from(link).map_err(io::Error::other));
            match attached {
                Ok(link) => links::pin(link, &path).map_err(refused)?,
                Err(err) => return Ok(Some(format!("cannot attach tcx to {name}: {err}"))),
            }
        }
        Ok(None)
    }

    fn attach_inbound(&mut self, pod: &PodAttachment<'_>, directory: &Path) -> Result<(), Error> {
        let path = directory.join(PIN_INBOUND);
        let target = format!("the network namespace of pod {}", pod.uid);
        let refused = |source| Error::Attach {
            program: INBOUND,
            target: target.clone(),
            source,
        };
        let program = inbound(&mut self.object)?;
        let fd = program_fd(program.fd(), INBOUND)?;
        if links::update(&path, fd.as_fd()).map_err(refused)? {
            return Ok(());
        }
        let link = program
            .attach(pod.netns)
            .and_then(|id| program.take_link(id))
            .map(FdLink::from)
            .map_err(|err| refused(io::Error::other(err)))?;
        links::pin(link, &path).map_err(refused)
    }

    /// Updates the links of all pods that an earlier agent attached to the new programs.
    pub(super) fn update_pod_links(&mut self) -> Result<(), Error> {
        let pods = pin_directory(&self.config.bpffs).join("pods");
        let failed = |source| Error::Bpffs {
            path: pods.clone(),
            source,
        };
        let mut directories = fs::read_dir(&pods)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .map_err(failed)?;
        directories.sort_by_key(fs::DirEntry::file_name);
        for (program, (pin, _)) in GATES.into_iter().zip(PIN_GATES) {
            let fd = program_fd(gate(&mut self.object, program)?.fd(), program)?;
            for directory in &directories {
                let _gone =
                    links::update(&directory.path().join(pin), fd.as_fd()).map_err(failed)?;
            }
        }
        let fd = program_fd(inbound(&mut self.object)?.fd(), INBOUND)?;
        for directory in &directories {
            let _gone =
                links::update(&directory.path().join(PIN_INBOUND), fd.as_fd()).map_err(failed)?;
        }
        Ok(())
    }
}
