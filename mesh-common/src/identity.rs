// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Who an address is, and how well that is known.

abi_id! {
    /// The number of a set of equal workloads: same namespace, service account, labels that policy
    /// uses and named ports. It is a hash of exactly these, so it never changes its meaning, is the
    /// same on every node, and needs no allocator; numbers below [`IdentityId::FIRST_WORKLOAD`] are
    /// entities.
    pub struct IdentityId(pub u64);
}

impl IdentityId {
    /// Nobody in particular: the entry of a policy set for peers without an entry of their own.
    pub const ANY: Self = Self(0);
    /// This node: traffic that was made in the node's own namespace.
    pub const HOST: Self = Self(1);
    /// Another node. May hide masqueraded clients.
    pub const REMOTE_NODE: Self = Self(2);
    /// The Kubernetes API server's endpoints.
    pub const KUBE_APISERVER: Self = Self(3);
    /// An address that is no pod's and no node's.
    pub const WORLD: Self = Self(4);
    /// An address inside a pod CIDR that no known pod has.
    pub const UNKNOWN: Self = Self(5);
    /// This node, by an address that is also an API server's.
    pub const HOST_API_SERVER: Self = Self(6);
    /// Hashes are raised above this.
    pub const FIRST_WORKLOAD: Self = Self(256);

    /// Whether this is this node, by whichever address.
    #[inline(always)]
    #[must_use]
    pub const fn is_host(self) -> bool {
        self.0 == Self::HOST.0 || self.0 == Self::HOST_API_SERVER.0
    }

    /// Whether this stands for a workload, not for an entity.
    #[inline(always)]
    #[must_use]
    pub const fn is_workload(self) -> bool {
        self.0 >= Self::FIRST_WORKLOAD.0
    }
}

/// How a peer's identity is known, from worst to best.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// No workload is known behind the address.
    None = 0,
    /// The address belongs to a pod that the cluster knows.
    Address = 1,
    /// Another pod of this node: its namespace made the socket, and the gate holds its address.
    Node = 2,
    /// The certificate of the tunnel.
    Tls = 3,
}

impl Evidence {
    /// Whether it is good enough for an Allow that names service accounts.
    #[inline(always)]
    #[must_use]
    pub const fn is_proof(self) -> bool {
        matches!(self, Self::Node | Self::Tls)
    }

    /// The label in records.
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
    /// What the cluster knows of an address: the value of the map `PEERS`.
    pub struct Peer {
        /// The workloads it belongs to, or an entity.
        pub id: IdentityId,
        /// `Peer::ENROLLED` and so on.
        pub flags: u32,
        /// Always 0.
        pub pad: u32,
    }
}

impl Peer {
    /// The workload takes part in the mesh.
    pub const ENROLLED: u32 = 1 << 0;
    /// Its node has reported that tunnels to it are accepted.
    pub const READY: u32 = 1 << 1;
    /// Some of its ports accept tunnels only: never reach it in clear.
    pub const STRICT: u32 = 1 << 2;
    /// The address is a pod's (not a node's or an API server's).
    pub const POD: u32 = 1 << 3;

    /// Whether all bits of `flag` are set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }
}
