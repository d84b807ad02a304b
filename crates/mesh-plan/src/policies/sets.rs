// SPDX-License-Identifier: Apache-2.0
//! Sets: the compiled policies that select a pod.

use std::collections::{BTreeMap, BTreeSet, btree_map};

use ipnet::IpNet;
use mesh_common::identity::IdentityId;
use mesh_common::policy::{
    CidrKey, Direction, ListId, Lists as ListPair, PolicySetId, RuleId, SelectKey, SetHead,
};

use super::cidrs::{self, Block};
use super::lists::{Lists, Names, REFUSED};
use super::rules::{Ranked, ranked, rule_id};
use super::select::Matcher;
use super::work::Work;
use super::{Entry, Places, Table, names};
use crate::cluster::{ClusterSnapshot, PeerMatch, Pod, Rejection, RuleAction};
use crate::compile::Options;
use crate::identities::{NamedPorts, named_ports};
use crate::plan::{IdentityName, Prefix, RuleName};

/// The content of a set: policies by their position in the table, and the pod's own named ports
/// that their ingress rules use.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Spec<'a> {
    pub(crate) enforced: Vec<usize>,
    pub(crate) audit: Vec<usize>,
    pub(crate) ports: NamedPorts<'a>,
}

impl<'a> Spec<'a> {
    /// The policy set of a pod.
    pub(crate) fn of(table: &Table<'a>, cluster: &ClusterSnapshot, pod: &'a Pod) -> Self {
        let selecting = table.selecting(cluster, pod);
        let entries = selecting
            .iter()
            .filter_map(|index| table.entries.get(*index));
        let names: BTreeSet<&str> = entries.flat_map(Entry::own_names).collect();
        let ports = named_ports(pod, &names);
        let is_audit = |index: &usize| table.entries.get(*index).is_some_and(|e| e.policy.audit);
        let (audit, enforced) = selecting.into_iter().partition(is_audit);
        Self {
            enforced,
            audit,
            ports,
        }
    }

    fn is_empty(&self) -> bool {
        self.enforced.is_empty() && self.audit.is_empty()
    }

    /// The set with its audit policies enforced.
    fn shadow(&self) -> Self {
        let mut enforced = self.enforced.clone();
        enforced.extend(&self.audit);
        enforced.sort_unstable();
        Self {
            enforced,
            audit: Vec::new(),
            ports: self.ports.clone(),
        }
    }

    fn id(&self, table: &Table<'_>, options: &Options) -> PolicySetId {
        let digests = |indices: &[usize]| -> Vec<[u8; 32]> {
            let entries = indices.iter().filter_map(|index| table.entries.get(*index));
            entries.map(|entry| entry.digest).collect()
        };
        let content = (digests(&self.enforced), digests(&self.audit), &self.ports);
        PolicySetId(options.ids.id("set", PolicySetId::ISOLATED.0 + 1, &content))
    }
}

/// A set's entries in the maps.
#[derive(Debug, Default)]
pub(crate) struct Set {
    pub(crate) head: SetHead,
    pub(crate) selects: Vec<(SelectKey, ListPair)>,
    pub(crate) cidrs: Vec<(Prefix<CidrKey>, ListId)>,
    pub(crate) lists: BTreeSet<ListId>,
    /// Its policies, by position in the table.
    pub(crate) policies: Vec<usize>,
}

/// One direction of a set.
#[derive(Debug, Default)]
struct Side {
    any: ListId,
    isolation: Option<RuleId>,
    has_cidrs: bool,
}

/// Compiles sets, each once.
pub(crate) struct SetCompiler<'c, 'i, 'a> {
    table: &'c Table<'a>,
    places: &'c Places<'a>,
    matcher: Matcher<'i, 'a>,
    options: &'c Options,
    specs: BTreeMap<PolicySetId, Spec<'a>>,
    pub(crate) lists: Lists,
    pub(crate) sets: BTreeMap<PolicySetId, Set>,
    pub(crate) rules: BTreeMap<RuleId, RuleName>,
    /// Ids with two specs.
    pub(crate) collided: BTreeSet<PolicySetId>,
    /// Sets that exceed the work limit.
    endless: BTreeSet<PolicySetId>,
    work: Work,
}

impl<'c, 'i, 'a> SetCompiler<'c, 'i, 'a> {
    pub(crate) fn new(
        table: &'c Table<'a>,
        places: &'c Places<'a>,
        matcher: Matcher<'i, 'a>,
        options: &'c Options,
    ) -> Self {
        Self {
            table,
            places,
            matcher,
            options,
            specs: BTreeMap::new(),
            lists: Lists::default(),
            sets: BTreeMap::new(),
            rules: BTreeMap::new(),
            collided: BTreeSet::new(),
            endless: BTreeSet::new(),
            work: Work::default(),
        }
    }

    /// The policy set of a pod.
    pub(crate) fn set_of(&mut self, cluster: &ClusterSnapshot, pod: &'a Pod) -> PolicySetId {
        let spec = Spec::of(self.table, cluster, pod);
        self.set(spec)
    }

    fn set(&mut self, spec: Spec<'a>) -> PolicySetId {
        if spec.is_empty() {
            return PolicySetId::NONE;
        }
        let id = spec.id(self.table, self.options);
        match self.specs.entry(id) {
            btree_map::Entry::Occupied(known) => {
                if *known.get() != spec {
                    self.collided.insert(id);
                }
            }
            btree_map::Entry::Vacant(entry) => {
                entry.insert(spec.clone());
                let shadow = if spec.audit.is_empty() {
                    PolicySetId::NONE
                } else {
                    self.set(spec.shadow())
                };
                let set = self.compile(id, &spec, shadow);
                self.sets.insert(id, set);
            }
        }
        id
    }

    fn compile(&mut self, id: PolicySetId, spec: &Spec<'a>, shadow: PolicySetId) -> Set {
        let mut set = Set {
            policies: spec.enforced.iter().chain(&spec.audit).copied().collect(),
            ..Set::default()
        };
        self.work.begin(self.options.limits.steps);
        let ingress = self.side(id, spec, Direction::Ingress, &mut set);
        let egress = self.side(id, spec, Direction::Egress, &mut set);
        if self.work.is_spent() {
            self.endless.insert(id);
            return Set {
                policies: set.policies,
                ..Set::default()
            };
        }
        let mut flags = 0;
        let mut flag = |set: bool, bit: u32| flags |= if set { bit } else { 0 };
        flag(ingress.isolation.is_some(), SetHead::ISOLATED_INGRESS);
        flag(egress.isolation.is_some(), SetHead::ISOLATED_EGRESS);
        flag(ingress.has_cidrs, SetHead::CIDRS_INGRESS);
        flag(egress.has_cidrs, SetHead::CIDRS_EGRESS);
        set.head = SetHead {
            ingress_rule: ingress.isolation.unwrap_or_default(),
            egress_rule: egress.isolation.unwrap_or_default(),
            ingress_any: ingress.any,
            egress_any: egress.any,
            shadow,
            flags,
            pad: 0,
        };
        let pairs = set
            .selects
            .iter()
            .flat_map(|(_, pair)| [pair.proven, pair.by_address]);
        let blocks = set.cidrs.iter().map(|(_, list)| *list);
        let all = pairs.chain(blocks).chain([ingress.any, egress.any]);
        set.lists = all
            .filter(|list| !matches!(*list, ListId::NONE | REFUSED))
            .collect();
        set
    }

    fn side(
        &mut self,
        id: PolicySetId,
        spec: &Spec<'a>,
        direction: Direction,
        set: &mut Set,
    ) -> Side {
        let rules = ranked(self.table, &spec.enforced, direction, self.options);
        for rule in &rules {
            self.rules.entry(rule.id).or_insert_with(|| rule.name());
        }
        let own = match direction {
            Direction::Ingress => Some(&spec.ports),
            Direction::Egress => None,
        };
        let nothing = NamedPorts::new();
        let everybody: Vec<usize> = rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| rule.rule.peers.is_none())
            .map(|(index, _)| index)
            .collect();
        let mut memo = Memo::default();
        let any = memo.list(self, &rules, &everybody, own.unwrap_or(&nothing));
        for (peer, (proven, by_address)) in self.rows(&rules, &everybody, direction) {
            let theirs = self.matcher.content(peer).map(ports);
            let names = own.or(theirs.as_ref()).unwrap_or(&nothing);
            let pair = ListPair {
                proven: memo.list(self, &rules, &proven, names),
                by_address: memo.list(self, &rules, &by_address, names),
            };
            if pair.proven != any || pair.by_address != any {
                let key = SelectKey::new(id, peer, direction);
                set.selects.push((key, pair));
            }
        }
        for peer in self.matcher.collided() {
            let refused = ListPair {
                proven: REFUSED,
                by_address: REFUSED,
            };
            set.selects
                .push((SelectKey::new(id, peer, direction), refused));
        }
        let cidrs = self.cidrs(&rules, own);
        let has_cidrs = !cidrs.is_empty();
        set.cidrs.extend(cidrs.into_iter().map(|(prefix, list)| {
            let key = Prefix {
                bits: CidrKey::FIXED_BITS + prefix.bits,
                data: CidrKey::new(id, direction, prefix.data),
            };
            (key, list)
        }));
        Side {
            any,
            isolation: self.isolation(spec, direction),
            has_cidrs,
        }
    }

    /// The first policy that isolates.
    fn isolation(&mut self, spec: &Spec<'_>, direction: Direction) -> Option<RuleId> {
        let mut entries = spec
            .enforced
            .iter()
            .filter_map(|index| self.table.entries.get(*index));
        let entry = entries.find(|entry| entry.isolates(direction))?;
        let id = rule_id(self.options, entry.object, "");
        self.rules.entry(id).or_insert_with(|| RuleName {
            object: entry.object.clone(),
            rule: String::new(),
        });
        Some(id)
    }

    /// For every identity that a rule names in particular: the rules that apply if it is proven,
    /// and those that apply by address.
    fn rows(
        &mut self,
        rules: &[Ranked<'a>],
        everybody: &[usize],
        direction: Direction,
    ) -> BTreeMap<IdentityId, (Vec<usize>, Vec<usize>)> {
        let mut rows: BTreeMap<IdentityId, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
        for (index, rule) in rules.iter().enumerate() {
            for peer in rule.rule.peers.iter().flatten() {
                let needs_proof = needs_proof(peer, rule.rule.action);
                let matching = self.matcher.matching(peer);
                if !self.work.take(matching.len()) {
                    return rows;
                }
                for id in matching.iter() {
                    let row = rows.entry(*id).or_default();
                    row.0.push(index);
                    if !needs_proof {
                        row.1.push(index);
                    }
                }
            }
        }
        let names_ports = |index: &usize| rules.get(*index).is_some_and(uses_names);
        if direction == Direction::Egress && everybody.iter().any(names_ports) {
            for id in self.matcher.with_ports() {
                rows.entry(id).or_default();
            }
        }
        for (proven, by_address) in rows.values_mut() {
            for list in [proven, by_address] {
                list.extend(everybody);
                list.sort_unstable();
                list.dedup();
            }
        }
        rows
    }

    fn cidrs(
        &mut self,
        rules: &[Ranked<'a>],
        own: Option<&NamedPorts<'a>>,
    ) -> Vec<(Prefix<mesh_common::Addr>, ListId)> {
        let nothing = NamedPorts::new();
        // `None` = every port of the transport.
        let mut uses: Vec<(&Ranked<'a>, Option<NamedPorts<'a>>)> = Vec::new();
        let mut blocks = Vec::new();
        for rule in rules {
            for peer in rule.rule.peers.iter().flatten() {
                let of_peer = self.places.blocks(peer);
                blocks.extend(
                    of_peer
                        .iter()
                        .map(|(net, out)| Block::new(uses.len(), net, out)),
                );
                let is_place = matches!(peer, PeerMatch::Cidr { .. } | PeerMatch::Nodes(_));
                if own.is_none() && is_place && rule.rule.action == RuleAction::Deny {
                    uses.push((rule, None));
                    continue;
                }
                uses.push((rule, Some(own.unwrap_or(&nothing).clone())));
                if own.is_some() {
                    continue;
                }
                for (address, ports) in self.places.named(rule.rule, peer) {
                    let net = IpNet::from(address);
                    blocks.push(Block::new(uses.len(), &net, &BTreeSet::new()));
                    uses.push((rule, Some(ports)));
                }
            }
        }
        cidrs::entries(&blocks, &self.work, |matching| {
            let matching = matching.iter().filter_map(|index| uses.get(*index));
            let matching = matching.map(|(rule, ports)| match ports {
                Some(ports) => (*rule, Names::Of(ports)),
                None => (*rule, Names::Every),
            });
            self.lists.add(matching, self.options, &self.work)
        })
    }

    /// Sets that cannot be used: an id has two contents, or compiling exceeds the work limit.
    pub(crate) fn unusable(&self, rejections: &mut Vec<Rejection>) -> BTreeSet<PolicySetId> {
        let mut unusable = self.collided.clone();
        for (id, set) in &self.sets {
            if !set.lists.is_disjoint(&self.lists.collided) {
                unusable.insert(*id);
            }
        }
        unusable.extend(&self.endless);
        for id in &unusable {
            let policies = self.sets.get(id).map_or(&[][..], |set| &set.policies);
            let first = policies
                .iter()
                .find_map(|index| self.table.entries.get(*index));
            let why = if self.endless.contains(id) {
                format!(
                    "policy too large: together with the other policies of the selected pods, \
                     compiling rules, peers, CIDRs and ports needs more than {} steps",
                    self.options.limits.steps
                )
            } else {
                format!("hash collision: two policy sets have the hash {:#x}", id.0)
            };
            rejections.push(Rejection {
                object: first.map(|entry| entry.object.clone()).unwrap_or_default(),
                field: "spec".to_owned(),
                why,
                consequence: "isolates the selected pods until one of the policies changes"
                    .to_owned(),
            });
        }
        unusable
    }
}

/// Whether a rule applies to a peer known by address only. An Allow for service accounts does not.
fn needs_proof(peer: &PeerMatch, action: RuleAction) -> bool {
    let by_account = matches!(
        peer,
        PeerMatch::Pods {
            service_accounts: Some(_),
            ..
        }
    );
    by_account && action != RuleAction::Deny
}

fn ports(name: &IdentityName) -> NamedPorts<'_> {
    let ports = name.ports.iter();
    ports
        .map(|((name, transport), number)| (name.as_str(), *transport, *number))
        .collect()
}

fn uses_names(rule: &Ranked<'_>) -> bool {
    names(rule.rule).next().is_some()
}

/// The lists of this direction of this set, by rules and named ports.
#[derive(Default)]
struct Memo<'a> {
    known: BTreeMap<(Vec<usize>, NamedPorts<'a>), ListId>,
}

impl<'m> Memo<'m> {
    fn list<'a>(
        &mut self,
        compiler: &mut SetCompiler<'_, '_, 'a>,
        rules: &[Ranked<'a>],
        matching: &[usize],
        names: &NamedPorts<'m>,
    ) -> ListId {
        let matching_rules = matching.iter().filter_map(|index| rules.get(*index));
        let relevant = if matching_rules.clone().any(uses_names) {
            names.clone()
        } else {
            NamedPorts::new()
        };
        let key = (matching.to_vec(), relevant);
        if let Some(known) = self.known.get(&key) {
            return *known;
        }
        let list = compiler.lists.add(
            matching_rules.map(|rule| (rule, Names::Of(names))),
            compiler.options,
            &compiler.work,
        );
        self.known.insert(key, list);
        list
    }
}
