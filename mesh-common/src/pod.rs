// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! State of this node's pods, as the kernel programs need it.

use crate::addr::{Addr, Port};
use crate::identity::IdentityId;
use crate::policy::PolicySetId;

abi_id! {
    /// A managed pod's index on this node, below [`crate::maps::MAX_PODS`].
    pub struct PodIndex(pub u32);
}

/// Names one of the agent's four listeners in a pod's network namespace.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerSlot {
    /// The listener of captured IPv4 connections.
    Outbound4 = 0,
    /// The listener of captured IPv6 connections.
    Outbound6 = 1,
    /// The listener of IPv4 tunnels.
    Tunnel4 = 2,
    /// The listener of IPv6 tunnels.
    Tunnel6 = 3,
}

impl PodIndex {
    /// Returns the index of one of the pod's listeners in the map `LISTENERS`, which has four for each
    /// pod.
    #[inline(always)]
    #[must_use]
    pub const fn listener(self, slot: ListenerSlot) -> u32 {
        self.0 * 4 + slot as u32
    }
}

abi! {
    /// Value of the map `PODS`, keyed by [`PodIndex`]. The agent replaces the value as a whole.
    pub struct PodState {
        /// A number that changes with every write. If it differs from `revision_end`, the value was
        /// replaced while it was read.
        pub revision: u64,
        /// The part that decisions need.
        pub view: PodView,
        /// The cookie of the pod's network namespace.
        pub netns_cookie: u64,
        /// The MAC address of the pod's interface, then two bytes 0. All 0 = not known, and not
        /// checked.
        pub mac: [u8; 8],
        /// The index of the pod's host-side interface, to which the gate is attached; 0 = the pod has no
        /// gate.
        pub link: u32,
        /// Always 0.
        pub pad: u32,
        /// The same number as `revision`.
        pub revision_end: u64,
    }

    /// Value of the map `PODS_BY_LINK`, keyed by the index of a host-side interface: the part of a
    /// pod's state by which the gate checks segments of open connections. The agent writes it right
    /// after the pod's [`PodState`]. No new connection is decided by it.
    pub struct GatePod {
        /// The pod's index.
        pub index: PodIndex,
        /// A copy of [`PodView::flags`].
        pub flags: u32,
        /// A copy of [`PodState::mac`].
        pub mac: [u8; 8],
        /// A copy of [`PodView::v4`].
        pub v4: Addr,
        /// A copy of [`PodView::v6`].
        pub v6: Addr,
    }

    /// Value of the map `PODS_BY_ADDR`, keyed by [`Addr`].
    pub struct LocalAddr {
        /// The index of the pod that has the address.
        pub index: PodIndex,
        /// A copy of [`PodState::link`].
        pub link: u32,
    }

    /// Key of the map `PORT_MODES`: a port with another mode than the pod's. The value is one of
    /// [`port_mode`].
    pub struct ModeKey {
        /// The value of [`PodView::modes`].
        pub set: u64,
        /// The pod's port.
        pub port: Port,
        /// Always 0.
        pub pad: u16,
        /// Always 0.
        pub pad_end: u32,
    }

    /// The part of a pod's state that the decisions of [`crate::path`] need.
    pub struct PodView {
        /// The policy set of the pod.
        pub set: PolicySetId,
        /// The pod's identity.
        pub id: IdentityId,
        /// The pod's IPv4 address, or [`Addr::NONE`].
        pub v4: Addr,
        /// The pod's IPv6 address, or [`Addr::NONE`].
        pub v6: Addr,
        /// The `set` of the pod's [`ModeKey`]s, which override Strict and Permissive for single ports;
        /// 0 = no override.
        pub modes: u64,
        /// A set of `PodState::ENROLLED`, `PodState::STRICT` and so on.
        pub flags: u32,
        /// Always 0.
        pub pad: u32,
    }
}

impl GatePod {
    /// Makes the value of a pod from its state.
    #[must_use]
    pub const fn new(index: PodIndex, state: &PodState) -> Self {
        Self {
            index,
            flags: state.view.flags,
            mac: state.mac,
            v4: state.view.v4,
            v6: state.view.v6,
        }
    }

    /// Returns whether a flag of [`PodState`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Returns whether the address is one of the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns(&self, addr: &Addr) -> bool {
        owns(&self.v4, &self.v6, addr)
    }
}

impl ModeKey {
    /// Makes the key of a port.
    #[inline(always)]
    #[must_use]
    pub const fn new(set: u64, port: Port) -> Self {
        Self {
            set,
            port,
            pad: 0,
            pad_end: 0,
        }
    }
}

/// Values of the map `PORT_MODES`.
pub mod port_mode {
    /// The port accepts plaintext and tunnels.
    pub const PERMISSIVE: u8 = 1;
    /// The port accepts tunnels only.
    pub const STRICT: u8 = 2;
}

impl PodState {
    /// The pod is enrolled in the mesh: its TCP connections are captured, and tunnels to it are
    /// accepted.
    pub const ENROLLED: u32 = 1 << 0;
    /// The pod accepts no plaintext TCP from other nodes (`mtls: Strict`).
    pub const STRICT: u32 = 1 << 1;
    /// The pod sends no plaintext TCP to other pods (`outbound: Required`).
    pub const REQUIRED: u32 = 1 << 2;
    /// UDP between the pod and workloads of other nodes is denied (`udp: SameNode`).
    pub const UDP_SAME_NODE: u32 = 1 << 3;
    /// UDP between the pod and other workloads is denied (`udp: Deny`).
    pub const UDP_DENY: u32 = 1 << 4;
    /// Denied packets are dropped silently; without it the sender gets an error or a reset.
    pub const SILENT: u32 = 1 << 5;
    /// The gate is attached to the pod's interface and proves the source addresses of packets.
    pub const GATED: u32 = 1 << 6;
    /// Policies in audit mode select the pod: allowed traffic is also evaluated by the shadow of its
    /// policy set.
    pub const AUDITED: u32 = 1 << 7;
}

impl PodView {
    /// Returns whether a flag of [`PodState`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Returns whether the address is one of the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns(&self, addr: &Addr) -> bool {
        owns(&self.v4, &self.v6, addr)
    }
}

/// Returns whether an address is one of a pod's two addresses.
#[inline(always)]
fn owns(v4: &Addr, v6: &Addr, addr: &Addr) -> bool {
    !addr.is_none() && (*v4 == *addr || *v6 == *addr)
}
