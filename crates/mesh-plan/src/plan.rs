// SPDX-License-Identifier: Apache-2.0
//! The desired state of one node: the content of every policy and service map, the pods to manage,
//! and the names that records and metrics use.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::pod::{ModeKey, PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, PolicySetId, PortKey, RuleId, SelectKey, SetHead,
};
use mesh_common::service::{BackendKey, Service, ServiceKey};
use mesh_common::{Addr, Endpoint};

use crate::cluster::{Labels, ObjectName, ObjectRef, Pod, Transport};
use crate::shared::Shared;

/// A longest-prefix key: the number of significant bits, and the data with all other bits 0.
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
    /// Names for records, metrics, `explain` and `dump`; they are in no map.
    pub names: Names,
}

/// The desired state of a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPod {
    /// Namespace and name.
    pub name: ObjectName,
    /// The service account; with the namespace it is the pod's SPIFFE identity.
    pub service_account: String,
    /// The addresses, at most one of each family.
    pub addresses: BTreeSet<IpAddr>,
    /// The file of the network namespace, if the source provides it.
    pub netns_path: Option<String>,
    /// The UID in the kubelet, if it differs from the UID of the object.
    pub static_uid: Option<String>,
    /// The kind of refusal that the pod's namespace specifies; `None` = the agent's setting
    /// applies.
    pub deny: Option<Deny>,
    /// The state that the hooks use: set, identity, addresses, modes and flags (without `GATED`,
    /// which depends on what could be attached).
    pub view: PodView,
}

/// The kind of refusal of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deny {
    /// Rejects it at once.
    Reject,
    /// Drops it silently.
    Drop,
}

/// Names of the numbers in maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The names of rules.
    pub rules: Shared<BTreeMap<RuleId, RuleName>>,
    /// The pods by address.
    pub workloads: Shared<BTreeMap<Addr, Arc<Pod>>>,
    /// The services by virtual endpoint; headless services by endpoint.
    pub services: Shared<BTreeMap<ServiceKey, ObjectName>>,
    /// The name of an identity.
    pub identities: Shared<BTreeMap<IdentityId, Arc<IdentityName>>>,
}

/// The name of a rule: its policy and its position.
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

/// The name of an identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdentityName {
    /// The namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod labels that policies use.
    pub labels: Labels,
    /// The namespace labels that policies use.
    pub namespace_labels: Labels,
    /// The named ports that egress rules use.
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
    /// A pod's state. One write switches the pod's policy. The key is the UID; the writer knows the
    /// index.
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

/// One operation on maps. Operations are applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Write an entry, new or changed.
    Put(Entry),
    /// Remove an entry; removing what is absent is no error.
    Remove(Key),
}

impl MapOp {
    /// Returns `true` if the operation concerns services and not policy, addresses or pods.
    #[must_use]
    pub const fn is_of_services(&self) -> bool {
        matches!(
            self,
            Self::Put(Entry::Service(..) | Entry::Backend(..))
                | Self::Remove(Key::Service(_) | Key::Backend(_))
        )
    }
}

impl Plan {
    /// Shares the memory of every collection that equals the one of an earlier plan.
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

    /// A pod's policy set with the policies in audit mode enforced; `None` = no such policy selects
    /// the pod.
    #[must_use]
    pub fn audit_set(&self, pod: &PodView) -> Option<PolicySetId> {
        let shadow = self.sets.get(&pod.set)?.shadow;
        let known = pod.has(PodState::AUDITED) && shadow != PolicySetId::NONE;
        known.then_some(shadow)
    }
}

/// An address with all bits but the first ones set to 0.
#[must_use]
pub fn masked(addr: Addr, bits: u32) -> Addr {
    let number = u128::from_be_bytes(addr.octets());
    let mask = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
    Addr::from_octets((number & mask).to_be_bytes())
}
