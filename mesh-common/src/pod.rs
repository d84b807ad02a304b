// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! What the kernel programs know of a pod of this node.

use crate::addr::{Addr, Port};
use crate::identity::IdentityId;
use crate::policy::PolicySetId;

abi_id! {
    /// A pod's slot on this node, below [`crate::maps::MAX_PODS`]. Its listeners are in the slots
    /// `4 * index + ListenerSlot`.
    pub struct PodIndex(pub u32);
}

/// Which of a pod's listeners.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerSlot {
    /// Captured connections, IPv4.
    Outbound4 = 0,
    /// Captured connections, IPv6.
    Outbound6 = 1,
    /// Tunnels, IPv4.
    Tunnel4 = 2,
    /// Tunnels, IPv6.
    Tunnel6 = 3,
}

impl PodIndex {
    /// The slot of one of the pod's listeners in the map `LISTENERS`.
    #[inline(always)]
    #[must_use]
    pub const fn listener(self, slot: ListenerSlot) -> u32 {
        self.0 * 4 + slot as u32
    }
}

abi! {
    /// Value of the map `PODS`, keyed by [`PodIndex`]. Written as one map element, whole.
    pub struct PodState {
        /// Changes with every write; equal to `revision_end`, or the reader met a write.
        pub revision: u64,
        /// What the decisions need.
        pub view: PodView,
        /// Its network namespace.
        pub netns_cookie: u64,
        /// The MAC address of the pod's own interface, then 2 bytes 0. All 0 = not checked.
        pub mac: [u8; 8],
        /// The interface on the host's side, where the gate is; 0 = the pod has no gate.
        pub link: u32,
        /// Always 0.
        pub pad: u32,
        /// Equal to `revision`.
        pub revision_end: u64,
    }

    /// Value of the map `PODS_BY_LINK`: what the gate needs of the pod behind an interface for the
    /// segments of connections that are already open. Written right after the pod's [`PodState`],
    /// whole; nothing that opens a connection is decided by it.
    pub struct GatePod {
        /// The pod.
        pub index: PodIndex,
        /// As [`PodView::flags`].
        pub flags: u32,
        /// As [`PodState::mac`].
        pub mac: [u8; 8],
        /// As [`PodView::v4`].
        pub v4: Addr,
        /// As [`PodView::v6`].
        pub v6: Addr,
    }

    /// Value of the map `PODS_BY_ADDR`.
    pub struct LocalAddr {
        /// The pod that has the address.
        pub index: PodIndex,
        /// As [`PodState::link`].
        pub link: u32,
    }

    /// Key of the map `PORT_MODES`: a port whose mode differs from the pod's own.
    pub struct ModeKey {
        /// [`PodView::modes`].
        pub set: u64,
        /// The port.
        pub port: Port,
        /// Always 0.
        pub pad: u16,
        /// Always 0.
        pub pad_end: u32,
    }

    /// What of a pod's state the decisions of [`crate::path`] need.
    pub struct PodView {
        /// The pod's policy.
        pub set: PolicySetId,
        /// Who it is.
        pub id: IdentityId,
        /// Its IPv4 address, or [`Addr::NONE`].
        pub v4: Addr,
        /// Its IPv6 address, or [`Addr::NONE`].
        pub v6: Addr,
        /// Per-port overrides of Strict and Permissive: the `set` of [`ModeKey`]; 0 = none.
        pub modes: u64,
        /// `PodState::ENROLLED` and so on.
        pub flags: u32,
        /// Always 0.
        pub pad: u32,
    }
}

impl GatePod {
    /// What the gate needs of a pod.
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

    /// Whether a flag of [`PodState`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether the address is one of the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns(&self, addr: &Addr) -> bool {
        !addr.is_none() && (self.v4 == *addr || self.v6 == *addr)
    }
}

impl ModeKey {
    /// The key of a port.
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
    /// Plaintext is accepted on this port.
    pub const PERMISSIVE: u8 = 1;
    /// Tunnels only.
    pub const STRICT: u8 = 2;
}

impl PodState {
    /// Takes part in the mesh: its TCP is captured, tunnels to it are accepted.
    pub const ENROLLED: u32 = 1 << 0;
    /// Accepts no plaintext TCP from other nodes (`mtls: Strict`).
    pub const STRICT: u32 = 1 << 1;
    /// Sends no plaintext TCP to pods (`outbound: Required`).
    pub const REQUIRED: u32 = 1 << 2;
    /// `udp: SameNode`.
    pub const UDP_SAME_NODE: u32 = 1 << 3;
    /// `udp: Deny`.
    pub const UDP_DENY: u32 = 1 << 4;
    /// Denied packets vanish instead of being refused.
    pub const SILENT: u32 = 1 << 5;
    /// The gate is on the pod's interface: provenance of packets is proven.
    pub const GATED: u32 = 1 << 6;
    /// Policies in audit mode select it: its set has a shadow that is to be asked as well.
    pub const AUDITED: u32 = 1 << 7;
}

impl PodView {
    /// Whether a flag of [`PodState`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether the address is one of the pod's own.
    #[inline(always)]
    #[must_use]
    pub fn owns(&self, addr: &Addr) -> bool {
        !addr.is_none() && (self.v4 == *addr || self.v6 == *addr)
    }
}
