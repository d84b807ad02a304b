// SPDX-License-Identifier: Apache-2.0
//! A plan with indexes for the look-ups that a decision makes: user space decides a connection
//! over it as the kernel programs do over the maps.
//!
//! Longest-prefix matches are binary searches over sorted ranges, addresses of local pods a hash
//! table; everything else is looked up in the plan itself.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::path::Peers;
use mesh_common::pod::{ModeKey, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, Policies, PolicySetId, PortKey, SelectKey, SetHead,
};
use mesh_common::service::{BackendKey, Service, ServiceKey, Services};
use mesh_common::{Addr, Endpoint, Protocol};

use crate::plan::Plan;
use crate::ranges::{self, Ranges};

/// The CIDRs of a set in one direction.
type Side = (PolicySetId, u32);
/// The ports of a list for one protocol.
type PortList = (ListId, Protocol);

/// A plan with indexes. Dereferences to the plan.
#[derive(Clone, Debug, Default)]
pub struct Index {
    plan: Plan,
    local: HashMap<Addr, PodView>,
    pod_cidrs: Arc<Ranges<u128, ()>>,
    cidrs: Arc<HashMap<Side, Ranges<u128, ListId>>>,
    ports: Arc<HashMap<PortList, Ranges<u16, Answer>>>,
}

impl Index {
    /// Indexes a plan.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self::after(plan, &Self::default())
    }

    /// Indexes the plan that follows another. The indexes of collections that both plans share
    /// (see [`crate::shared`]) are shared, too.
    #[must_use]
    pub fn after(plan: Plan, before: &Self) -> Self {
        let mut local = HashMap::with_capacity(2 * plan.pods.len());
        for pod in plan.pods.values() {
            for addr in [pod.view.v4, pod.view.v6]
                .into_iter()
                .filter(|a| !a.is_none())
            {
                // Of several pods with one address the first counts.
                local.entry(addr).or_insert(pod.view);
            }
        }
        Self {
            local,
            pod_cidrs: match plan.pod_cidrs.is(&before.plan.pod_cidrs) {
                true => Arc::clone(&before.pod_cidrs),
                false => Arc::new(pod_cidrs(&plan)),
            },
            cidrs: match plan.cidrs.is(&before.plan.cidrs) {
                true => Arc::clone(&before.cidrs),
                false => Arc::new(cidrs(&plan)),
            },
            ports: match plan.ports.is(&before.plan.ports) {
                true => Arc::clone(&before.ports),
                false => Arc::new(ports(&plan)),
            },
            plan,
        }
    }

    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The identity that the cluster knows behind an address.
    #[must_use]
    pub fn identity(&self, addr: &Addr) -> IdentityId {
        match self.plan.peers.get(addr) {
            Some(peer) => peer.id,
            None if self.in_pod_cidr(addr) => IdentityId::UNKNOWN,
            None => IdentityId::WORLD,
        }
    }
}

/// The plan's blocks of pods' addresses.
pub(crate) fn pod_cidrs(plan: &Plan) -> Ranges<u128, ()> {
    let range = |prefix: &crate::plan::Prefix<Addr>| {
        let (first, last) = ranges::block(prefix.data, prefix.bits);
        (first, last, ())
    };
    Ranges::of(plan.pod_cidrs.iter().map(range).collect())
}

fn cidrs(plan: &Plan) -> HashMap<Side, Ranges<u128, ListId>> {
    let mut sides: HashMap<Side, Vec<_>> = HashMap::new();
    for (prefix, list) in &plan.cidrs {
        let bits = prefix.bits.saturating_sub(CidrKey::FIXED_BITS);
        let (first, last) = ranges::block(prefix.data.addr, bits);
        let side = (prefix.data.set(), prefix.data.direction());
        sides.entry(side).or_default().push((first, last, *list));
    }
    let flat = sides.into_iter();
    flat.map(|(side, blocks)| (side, Ranges::of(blocks)))
        .collect()
}

/// The answers of every list, by port.
pub(crate) fn ports(plan: &Plan) -> HashMap<PortList, Ranges<u16, Answer>> {
    let mut lists: HashMap<PortList, Vec<_>> = HashMap::new();
    for (prefix, answer) in &plan.ports {
        let bits = prefix.bits.saturating_sub(PortKey::FIXED_BITS);
        let (first, last) = ranges::ports(prefix.data.port.get(), bits);
        let list = (prefix.data.list(), prefix.data.protocol());
        lists.entry(list).or_default().push((first, last, *answer));
    }
    let flat = lists.into_iter();
    flat.map(|(list, ports)| (list, Ranges::of(ports)))
        .collect()
}

impl From<Plan> for Index {
    fn from(plan: Plan) -> Self {
        Self::new(plan)
    }
}

impl Deref for Index {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.plan
    }
}

/// Equal plans have equal indexes.
impl PartialEq for Index {
    fn eq(&self, other: &Self) -> bool {
        self.plan == other.plan
    }
}

impl Policies for Index {
    fn head(&self, set: PolicySetId) -> Option<SetHead> {
        self.plan.sets.get(&set).copied()
    }

    fn select(&self, key: &SelectKey) -> Option<Lists> {
        self.plan.selects.get(key).copied()
    }

    fn cidr(&self, key: &CidrKey) -> Option<ListId> {
        let blocks = self.cidrs.get(&(key.set(), key.direction()))?;
        blocks.get(ranges::number(key.addr)).copied()
    }

    fn answer(&self, key: &PortKey) -> Option<&Answer> {
        let ports = self.ports.get(&(key.list(), key.protocol()))?;
        ports.get(key.port.get())
    }
}

impl Peers for Index {
    fn peer(&self, addr: &Addr) -> Option<Peer> {
        self.plan.peers.get(addr).copied()
    }

    fn local(&self, addr: &Addr) -> Option<PodView> {
        self.local.get(addr).copied()
    }

    fn in_pod_cidr(&self, addr: &Addr) -> bool {
        self.pod_cidrs.get(ranges::number(*addr)).is_some()
    }

    fn port_mode(&self, key: &ModeKey) -> Option<u8> {
        self.plan.port_modes.get(key).copied()
    }
}

impl Services for Index {
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        self.plan.services.get(key).copied()
    }

    fn backend(&self, key: &BackendKey) -> Option<Endpoint> {
        self.plan.backends.get(key).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_common::policy::{Direction, Question, decide};
    use mesh_common::{Evidence, Port};

    use super::*;
    use crate::plan::{Prefix, masked};
    use crate::random::{ADDRESSES, change, world};
    use crate::support::{Random, ip};

    /// The look-ups without indexes: every length of a prefix is tried, the longest first.
    struct Plain<'a>(&'a Plan);

    impl Policies for Plain<'_> {
        fn head(&self, set: PolicySetId) -> Option<SetHead> {
            self.0.sets.get(&set).copied()
        }

        fn select(&self, key: &SelectKey) -> Option<Lists> {
            self.0.selects.get(key).copied()
        }

        fn cidr(&self, key: &CidrKey) -> Option<ListId> {
            let of = |(prefix, _): &(&Prefix<CidrKey>, &ListId)| {
                let bits = prefix.bits - CidrKey::FIXED_BITS;
                prefix.data.set() == key.set()
                    && prefix.data.direction() == key.direction()
                    && prefix.data.addr == masked(key.addr, bits)
            };
            let found = self.0.cidrs.iter().filter(of);
            found
                .max_by_key(|(prefix, _)| prefix.bits)
                .map(|(_, list)| *list)
        }

        fn answer(&self, key: &PortKey) -> Option<&Answer> {
            let of = |(prefix, _): &(&Prefix<PortKey>, &Answer)| {
                let bits = prefix.bits - PortKey::FIXED_BITS;
                let mask = !u16::MAX.checked_shr(bits).unwrap_or(0);
                prefix.data.list() == key.list()
                    && prefix.data.protocol() == key.protocol()
                    && prefix.data.port.get() == key.port.get() & mask
            };
            let found = self.0.ports.iter().filter(of);
            found
                .max_by_key(|(prefix, _)| prefix.bits)
                .map(|(_, answer)| answer)
        }
    }

    /// Every verdict of an index is that of the plan without one, also when the index is made from
    /// the one before.
    #[test]
    fn index_and_plan_decide_alike() {
        let mut r = Random(77);
        let mut seen = BTreeMap::new();
        for _ in 0..15 {
            let mut world = world(&mut r);
            let mut index = Index::default();
            for _ in 0..4 {
                let mut plan = crate::compile(&world.0, "n1").0;
                plan.unite(&index);
                index = Index::after(plan, &index);
                check(&index, &mut seen);
                world = change(&mut r, world);
            }
        }
        assert!(
            seen.values().all(|n| *n > 100) && seen.len() >= 5,
            "{seen:?}"
        );
    }

    fn check(index: &Index, seen: &mut BTreeMap<(bool, mesh_common::Reason), u32>) {
        for address in ADDRESSES {
            let addr = Addr::from(ip(address));
            let in_cidr = |prefix: &Prefix<Addr>| prefix.data == masked(addr, prefix.bits);
            let expected = index.plan.pod_cidrs.iter().any(in_cidr);
            assert_eq!(index.in_pod_cidr(&addr), expected, "{address}");
            let mut pods = index.plan.pods.values().map(|pod| pod.view);
            assert_eq!(index.local(&addr), pods.find(|view| view.owns(&addr)));
            let peer = index.identity(&addr);
            for pod in index.plan.pods.values() {
                for direction in [Direction::Ingress, Direction::Egress] {
                    for port in [0, 5, 53, 80, 85, 90, 1023, 1024, 8080, 65535] {
                        for protocol in [Protocol::TCP, Protocol::UDP, Protocol::ICMP] {
                            let question = Question {
                                set: pod.view.set,
                                direction,
                                peer,
                                addr,
                                evidence: Evidence::Tls,
                                protocol,
                                port: Port::new(port),
                            };
                            let verdict = decide(index, &question);
                            let plain = decide(&Plain(index), &question);
                            assert_eq!(verdict, plain, "{question:?}");
                            *seen.entry((verdict.allowed, verdict.reason)).or_default() += 1;
                        }
                    }
                }
            }
        }
    }
}
