// SPDX-License-Identifier: Apache-2.0
//! The desired state of one node: the content of every policy and service map, the pods that are to
//! be adopted, and the names that records and metrics need.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::path::Peers;
use mesh_common::pod::{ModeKey, PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, Policies, PolicySetId, PortKey, RuleId, SelectKey, SetHead,
};
use mesh_common::service::{BackendKey, Service, ServiceKey, Services};
use mesh_common::{Addr, Endpoint};

use crate::cluster::{Labels, ObjectName, ObjectRef, Pod, Transport};
use crate::shared::Shared;

/// A longest-prefix key: how many of the data's bits count, and the data with the others 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix<K> {
    /// Bits of `data` that must match.
    pub bits: u32,
    /// The key's data.
    pub data: K,
}

/// The desired state of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// `PEERS`.
    pub peers: Shared<BTreeMap<Addr, Peer>>,
    /// `POD_CIDRS`; prefix lengths of IPv4 are raised by 96.
    pub pod_cidrs: Shared<BTreeSet<Prefix<Addr>>>,
    /// `POLICY_SETS`.
    pub sets: Shared<BTreeMap<PolicySetId, SetHead>>,
    /// `POLICY_SELECT`.
    pub selects: Shared<BTreeMap<SelectKey, Lists>>,
    /// `POLICY_CIDRS`.
    pub cidrs: Shared<BTreeMap<Prefix<CidrKey>, ListId>>,
    /// `POLICY_PORTS`.
    pub ports: Shared<BTreeMap<Prefix<PortKey>, Answer>>,
    /// `PORT_MODES`.
    pub port_modes: Shared<BTreeMap<ModeKey, u8>>,
    /// `SERVICES`.
    pub services: Shared<BTreeMap<ServiceKey, Service>>,
    /// `BACKENDS`.
    pub backends: Shared<BTreeMap<BackendKey, Endpoint>>,
    /// The pods of this node, by UID.
    pub pods: BTreeMap<String, LocalPod>,
    /// Names, for records, metrics, `explain` and `dump`; never in a map.
    pub names: Names,
}

/// A pod of this node, as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPod {
    /// Namespace and name.
    pub name: ObjectName,
    /// Its service account: with the namespace, its SPIFFE identity.
    pub service_account: String,
    /// Its addresses, at most one of each family.
    pub addresses: BTreeSet<IpAddr>,
    /// Its namespace's file, where the source gives it.
    pub netns_path: Option<String>,
    /// The UID that the kubelet knows it by, where it is not that of its object.
    pub static_uid: Option<String>,
    /// What a refusal looks like, if its namespace says so; `None` = the agent's setting holds.
    pub deny: Option<Deny>,
    /// What the hooks decide by: set, identity, addresses, modes and flags (without `GATED`, which
    /// depends on what could be attached).
    pub view: PodView,
}

/// What a refusal looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deny {
    /// Refused at once.
    Reject,
    /// Silence.
    Drop,
}

/// Names of what maps hold as numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Rules.
    pub rules: Shared<BTreeMap<RuleId, RuleName>>,
    /// Who has an address.
    pub workloads: Shared<BTreeMap<Addr, Arc<Pod>>>,
    /// Which service has a virtual endpoint, or, for headless services, an endpoint.
    pub services: Shared<BTreeMap<ServiceKey, ObjectName>>,
    /// What an identity stands for.
    pub identities: Shared<BTreeMap<IdentityId, Arc<IdentityName>>>,
}

/// Where a rule is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleName {
    /// The policy.
    pub object: ObjectRef,
    /// The rule in it: `ingress[0]`; empty = the policy as a whole (its isolation).
    pub rule: String,
}

impl std::fmt::Display for RuleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.rule.is_empty() {
            self.object.fmt(f)
        } else {
            write!(f, "{} {}", self.object, self.rule)
        }
    }
}

/// What an identity stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdentityName {
    /// The namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The labels that some policy asks for.
    pub labels: Labels,
    /// The same of the namespace.
    pub namespace_labels: Labels,
    /// The named ports that some egress rule asks for.
    pub ports: BTreeMap<(String, Transport), u16>,
}

/// One entry of one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `PEERS`.
    Peer(Addr, Peer),
    /// `POD_CIDRS`.
    PodCidr(Prefix<Addr>),
    /// `POLICY_SETS`.
    Set(PolicySetId, SetHead),
    /// `POLICY_SELECT`.
    Select(SelectKey, Lists),
    /// `POLICY_CIDRS`.
    Cidr(Prefix<CidrKey>, ListId),
    /// `POLICY_PORTS`.
    Port(Prefix<PortKey>, Answer),
    /// `PORT_MODES`.
    PortMode(ModeKey, u8),
    /// `SERVICES`.
    Service(ServiceKey, Service),
    /// `BACKENDS`.
    Backend(BackendKey, Endpoint),
    /// A pod's state: the one write that switches its policy. The key is its UID; the writer knows
    /// its index.
    Pod(String, PodView),
}

/// The key of an [`Entry`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// `PEERS`.
    Peer(Addr),
    /// `POD_CIDRS`.
    PodCidr(Prefix<Addr>),
    /// `POLICY_SETS`.
    Set(PolicySetId),
    /// `POLICY_SELECT`.
    Select(SelectKey),
    /// `POLICY_CIDRS`.
    Cidr(Prefix<CidrKey>),
    /// `POLICY_PORTS`.
    Port(Prefix<PortKey>),
    /// `PORT_MODES`.
    PortMode(ModeKey),
    /// `SERVICES`.
    Service(ServiceKey),
    /// `BACKENDS`.
    Backend(BackendKey),
}

/// One operation on maps, in the order in which they are to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Write an entry, new or changed.
    Put(Entry),
    /// Remove an entry; removing what is absent is no error.
    Remove(Key),
}

impl Plan {
    /// Becomes one in memory with what is equal in the plan before it.
    pub fn unite(&mut self, before: &Self) {
        let Self {
            peers,
            pod_cidrs,
            sets,
            selects,
            cidrs,
            ports,
            port_modes,
            services,
            backends,
            pods: _,
            names,
        } = self;
        peers.unite(&before.peers);
        pod_cidrs.unite(&before.pod_cidrs);
        sets.unite(&before.sets);
        selects.unite(&before.selects);
        cidrs.unite(&before.cidrs);
        ports.unite(&before.ports);
        port_modes.unite(&before.port_modes);
        services.unite(&before.services);
        backends.unite(&before.backends);
        names.rules.unite(&before.names.rules);
        names.workloads.unite(&before.names.workloads);
        names.services.unite(&before.names.services);
        names.identities.unite(&before.names.identities);
    }

    /// A pod as it would be if the policies in audit mode that select it were enforced; `None` =
    /// there are none.
    #[must_use]
    pub fn audited(&self, pod: &PodView) -> Option<PodView> {
        let shadow = self.sets.get(&pod.set)?.shadow;
        let known = pod.has(PodState::AUDITED) && shadow != PolicySetId::NONE;
        known.then_some(PodView {
            set: shadow,
            ..*pod
        })
    }
}

impl Policies for Plan {
    fn head(&self, set: PolicySetId) -> Option<SetHead> {
        self.sets.get(&set).copied()
    }

    fn select(&self, key: &SelectKey) -> Option<Lists> {
        self.selects.get(key).copied()
    }

    fn cidr(&self, key: &CidrKey) -> Option<ListId> {
        (0..=128u32).rev().find_map(|length| {
            let data = key.with_addr(masked(key.addr, length));
            self.cidrs
                .get(&Prefix {
                    bits: CidrKey::FIXED_BITS + length,
                    data,
                })
                .copied()
        })
    }

    fn answer(&self, key: &PortKey) -> Option<&Answer> {
        (0..=16u32).rev().find_map(|length| {
            let mask = u16::MAX.checked_shl(16 - length).unwrap_or(0);
            let port = mesh_common::Port::new(key.port.get() & mask);
            let data = key.with_port(port);
            self.ports.get(&Prefix {
                bits: PortKey::FIXED_BITS + length,
                data,
            })
        })
    }
}

impl Peers for Plan {
    fn peer(&self, addr: &Addr) -> Option<Peer> {
        self.peers.get(addr).copied()
    }

    fn local(&self, addr: &Addr) -> Option<PodView> {
        self.pods
            .values()
            .map(|pod| pod.view)
            .find(|view| view.owns(addr))
    }

    fn in_pod_cidr(&self, addr: &Addr) -> bool {
        (0..=128u32).any(|length| {
            self.pod_cidrs.contains(&Prefix {
                bits: length,
                data: masked(*addr, length),
            })
        })
    }

    fn port_mode(&self, key: &ModeKey) -> Option<u8> {
        self.port_modes.get(key).copied()
    }
}

impl Services for Plan {
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        self.services.get(key).copied()
    }

    fn backend(&self, key: &BackendKey) -> Option<Endpoint> {
        self.backends.get(key).copied()
    }
}

/// An address with all but its first bits 0.
#[must_use]
pub fn masked(addr: Addr, bits: u32) -> Addr {
    let number = u128::from_be_bytes(addr.octets());
    let mask = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
    Addr::from_octets((number & mask).to_be_bytes())
}
