// SPDX-License-Identifier: Apache-2.0
//! A plan's policy, indexed for a great many questions.
//!
//! A longest-prefix look-up tries only the lengths that occur for its list or set.

use std::collections::{BTreeMap, HashMap};

use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, Policies, PolicySetId, PortKey, SelectKey, SetHead,
};
use mesh_common::{Addr, Port, Protocol};
use mesh_plan::Plan;
use mesh_plan::plan::masked;

type Side = (PolicySetId, u32);
type List = (ListId, Protocol);

/// The policy of one node.
pub(crate) struct Index {
    sets: BTreeMap<PolicySetId, SetHead>,
    selects: HashMap<SelectKey, Lists>,
    cidrs: HashMap<(Side, u32, Addr), ListId>,
    cidr_lengths: HashMap<Side, Vec<u32>>,
    ports: HashMap<(List, u32, u16), Answer>,
    port_lengths: HashMap<List, Vec<u32>>,
}

impl Index {
    pub(crate) fn new(plan: &Plan) -> Self {
        let mut index = Self {
            sets: (*plan.sets).clone(),
            selects: plan
                .selects
                .iter()
                .map(|(key, lists)| (*key, *lists))
                .collect(),
            cidrs: HashMap::new(),
            cidr_lengths: HashMap::new(),
            ports: HashMap::new(),
            port_lengths: HashMap::new(),
        };
        for (prefix, list) in &plan.cidrs {
            let side = (prefix.data.set(), prefix.data.direction());
            let bits = prefix.bits - CidrKey::FIXED_BITS;
            index.cidrs.insert((side, bits, prefix.data.addr), *list);
            longest_first(index.cidr_lengths.entry(side).or_default(), bits);
        }
        for (prefix, answer) in &plan.ports {
            let list = (prefix.data.list(), prefix.data.protocol());
            let bits = prefix.bits - PortKey::FIXED_BITS;
            let port = prefix.data.port.get();
            index.ports.insert((list, bits, port), *answer);
            longest_first(index.port_lengths.entry(list).or_default(), bits);
        }
        index
    }
}

fn longest_first(lengths: &mut Vec<u32>, bits: u32) {
    if let Err(at) = lengths.binary_search_by(|known| bits.cmp(known)) {
        lengths.insert(at, bits);
    }
}

fn masked_port(port: Port, bits: u32) -> u16 {
    port.get() & u16::MAX.checked_shl(16 - bits.min(16)).unwrap_or(0)
}

impl Policies for Index {
    fn head(&self, set: PolicySetId) -> Option<SetHead> {
        self.sets.get(&set).copied()
    }

    fn select(&self, key: &SelectKey) -> Option<Lists> {
        self.selects.get(key).copied()
    }

    fn cidr(&self, key: &CidrKey) -> Option<ListId> {
        let side = (key.set(), key.direction());
        self.cidr_lengths.get(&side)?.iter().find_map(|bits| {
            let addr = masked(key.addr, *bits);
            self.cidrs.get(&(side, *bits, addr)).copied()
        })
    }

    fn answer(&self, key: &PortKey) -> Option<&Answer> {
        let list = (key.list(), key.protocol());
        self.port_lengths.get(&list)?.iter().find_map(|bits| {
            let port = masked_port(key.port, *bits);
            self.ports.get(&(list, *bits, port))
        })
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::manifests::{Format, objects};
    use mesh_api::{LastGood, Object, Options, convert};
    use mesh_common::identity::{Evidence, IdentityId};
    use mesh_common::policy::{Direction, Question};

    use super::*;

    const MANIFESTS: &str = "
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x, labels: {app: a}}, spec: {nodeName: n}, status: {podIPs: [{ip: 10.0.0.1}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: x, labels: {app: b}}, spec: {nodeName: n}, status: {podIPs: [{ip: 'fd00::2'}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: 80, endPort: 1000}, {port: 53, protocol: UDP}]}, {from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {ipBlock: {cidr: '::/0'}}], ports: [{port: 443}]}], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}]}]}}
---
{apiVersion: mesh.rs/v1alpha1, kind: MeshPolicy, metadata: {name: q, namespace: x}, spec: {action: Deny, ingress: [{from: [{ipBlocks: [{cidr: 10.2.0.0/16}]}], ports: [{port: 443}]}, {from: [{serviceAccounts: ['*']}], ports: [{port: 90}]}]}}
";

    #[test]
    fn it_decides_as_the_plan_does() {
        let read = objects(MANIFESTS, Format::Yaml).unwrap();
        let read: Vec<_> = read
            .into_iter()
            .map(|value| Object {
                origin: String::new(),
                value,
            })
            .collect();
        let outcome = convert(&read, &LastGood::default(), Options { standalone: true });
        assert_eq!(outcome.rejections, []);
        let (plan, _) = mesh_plan::compile(&outcome.cluster, "n");
        let index = Index::new(&plan);
        let addresses = [
            "10.0.0.1",
            "10.1.0.1",
            "10.2.0.1",
            "11.0.0.1",
            "fd00::2",
            "2001:db8::1",
        ];
        let mut allowed = 0;
        let mut denied = 0;
        let ids: Vec<IdentityId> = plan.names.identities.keys().copied().collect();
        for pod in plan.pods.values() {
            for peer in ids.iter().chain(&[IdentityId::WORLD, IdentityId::HOST]) {
                for address in addresses {
                    for direction in [Direction::Ingress, Direction::Egress] {
                        for port in [0, 1, 53, 79, 80, 90, 443, 1000, 1001, 65535] {
                            for protocol in [Protocol::TCP, Protocol::UDP, Protocol(1)] {
                                let question = Question {
                                    set: pod.view.set,
                                    direction,
                                    peer: *peer,
                                    addr: address.parse::<std::net::IpAddr>().unwrap().into(),
                                    evidence: Evidence::Tls,
                                    protocol,
                                    port: Port::new(port),
                                };
                                let verdict = index.decide(&question);
                                assert_eq!(verdict, plan.decide(&question), "{question:?}");
                                *if verdict.allowed {
                                    &mut allowed
                                } else {
                                    &mut denied
                                } += 1;
                            }
                        }
                    }
                }
            }
        }
        assert!(allowed > 100 && denied > 100, "{allowed} {denied}");
    }
}
