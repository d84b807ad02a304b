// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Identities of peers, and the evidence for them.

abi_id! {
    /// Identifies a set of workloads with the same namespace, service account, named ports and labels
    /// that policy uses. The number is a hash of exactly these, so its meaning never changes, every
    /// node has the same number, and no allocator is needed. Numbers below
    /// [`IdentityId::FIRST_WORKLOAD`] are reserved for entities.
    pub struct IdentityId(pub u64);
}

impl IdentityId {
    /// The wildcard of a policy set: peers without an entry of their own.
    pub const ANY: Self = Self(0);
    /// This node: traffic that originates in its host network namespace.
    pub const HOST: Self = Self(1);
    /// Another node. Masqueraded clients can be behind its address.
    pub const REMOTE_NODE: Self = Self(2);
    /// An endpoint of the Kubernetes API server.
    pub const KUBE_APISERVER: Self = Self(3);
    /// An address outside the cluster.
    pub const WORLD: Self = Self(4);
    /// An address in a pod CIDR that no known pod has.
    pub const UNKNOWN: Self = Self(5);
    /// This node, under an address that is also a Kubernetes API server's.
    pub const HOST_API_SERVER: Self = Self(6);
    /// The lowest number of a workload identity.
    pub const FIRST_WORKLOAD: Self = Self(256);

    /// Returns whether this is this node, with or without an API server.
    #[inline(always)]
    #[must_use]
    pub const fn is_host(self) -> bool {
        self.0 == Self::HOST.0 || self.0 == Self::HOST_API_SERVER.0
    }

    /// Returns whether this is a workload and not a reserved entity.
    #[inline(always)]
    #[must_use]
    pub const fn is_workload(self) -> bool {
        self.0 >= Self::FIRST_WORKLOAD.0
    }
}

/// The evidence for a peer's identity, from weakest to strongest.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// No workload is known to have the address.
    None = 0,
    /// The address is that of a pod in the cluster's snapshot.
    Address = 1,
    /// The peer is a pod of this node: its socket is in the pod's network namespace, and the gate
    /// prevents address spoofing.
    Node = 2,
    /// The peer's certificate of an mTLS tunnel proves the identity.
    Tls = 3,
}

impl Evidence {
    /// Returns whether the evidence satisfies an Allow rule that names service accounts.
    #[inline(always)]
    #[must_use]
    pub const fn is_proof(self) -> bool {
        matches!(self, Self::Node | Self::Tls)
    }

    /// Returns the label in flow records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Address => "address",
            Self::Node => "node",
            Self::Tls => "tls",
        }
    }
}

abi! {
    /// Value of the map `PEERS`, keyed by [`crate::Addr`]: the cluster's knowledge of an address.
    pub struct Peer {
        /// The identity of the workload or entity that has the address.
        pub id: IdentityId,
        /// A set of `Peer::ENROLLED`, `Peer::READY` and so on.
        pub flags: u32,
        /// Always 0.
        pub pad: u32,
    }
}

impl Peer {
    /// The workload is enrolled in the mesh.
    pub const ENROLLED: u32 = 1 << 0;
    /// The workload's node reported that it accepts tunnels to the workload.
    pub const READY: u32 = 1 << 1;
    /// Some ports of the workload accept tunnels only: plaintext to it is denied.
    pub const STRICT: u32 = 1 << 2;
    /// The address is a pod's, not a node's or an API server's.
    pub const POD: u32 = 1 << 3;

    /// Returns whether all bits of `flag` are set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }
}
