// SPDX-License-Identifier: Apache-2.0
//! Turns two plans into ordered operations, such that a reader between any two of them sees the old
//! or the new verdict.
//!
//! 1. Content without references is added: ports, address blocks, pairs, set heads, port modes,
//!    backends.
//! 2. Services switch, by one write each.
//! 3. Peers and pods switch: a peer's identity after the pairs that mention it, a pod's set after
//!    the set's content.
//! 4. Content that has no references any more is removed, in the reverse order.
//!
//! When peers change their identity and pods their set in one step, a reader could see an old set
//! with a new identity, a pair that is in neither plan. Such peers go over a *bridge*: an identity
//! for this transition only, which has the lists of the old identity in old sets and the lists of
//! the new identity in new sets.
//!
//! No prefix of the operations exceeds the capacity of a map, if neither plan does. Where the additions
//! would not fit beside what is to be removed, services that are gone are removed first; for any other
//! map, the pods that change are isolated, and removals come before additions.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::pod::PodView;
use mesh_common::policy::{Direction, Lists, PolicySetId, SelectKey};
use mesh_common::service::{Service, ServiceKey};
use mesh_common::{Addr, Port};

use crate::compile::Limits;
use crate::digest::Ids;
use crate::index;
use crate::plan::{Entry, Key, LocalPod, MapOp, Plan};
use crate::ranges::{self, Ranges};
use crate::shared::Shared;

/// The operations that lead from one plan to the next: additions, then switches, then removals.
/// `old` is the content of the kernel's maps; its names are not used, its pods are (without them,
/// their earlier state counts as unknown).
#[must_use]
pub fn diff(old: &Plan, new: &Plan) -> Vec<MapOp> {
    diff_within(old, new, &Limits::of_maps())
}

/// As [`diff`], for maps of other capacities; only tests change them.
pub(crate) fn diff_within(old: &Plan, new: &Plan, capacities: &Limits) -> Vec<MapOp> {
    let ops = gradual(old, new, capacities);
    if fits(old, &ops, capacities) {
        ops
    } else {
        through_isolation(old, new)
    }
}

/// Returns `true` if every prefix of the operations fits into the maps.
fn fits(old: &Plan, ops: &[MapOp], capacities: &Limits) -> bool {
    // Almost always there is room even for all additions without any removal.
    let additions = ops.iter().filter(|op| matches!(op, MapOp::Put(_)));
    if capacities.have_room(old, additions.count()) {
        return true;
    }
    let mut state = old.clone();
    ops.iter().all(|op| {
        apply(&mut state, op);
        matches!(op, MapOp::Remove(_)) || capacities.have_room(&state, 0)
    })
}

/// Isolates the pods that change, removes, and then adds: fits where [`gradual`] does not. If owners of addresses
/// change, all pods with policy are isolated, because an address is unknown in between.
fn through_isolation(old: &Plan, new: &Plan) -> Vec<MapOp> {
    let (mut ops, mut additions, mut removals) = (Vec::new(), Vec::new(), Vec::new());
    let owners_change = old.peers != new.peers || old.pod_cidrs != new.pod_cidrs;
    let is_isolated = |before: PodView, after: PodView| {
        before != after || (owners_change && before.set != PolicySetId::NONE)
    };
    let put = |uid: &String, view| MapOp::Put(Entry::Pod(uid.clone(), view));
    let mut switches = Vec::new();
    for (uid, pod) in &new.pods {
        let before = old.pods.get(uid).map(|before| before.view);
        if let Some(before) = before.filter(|before| is_isolated(*before, pod.view)) {
            let isolated = PodView {
                set: PolicySetId::ISOLATED,
                ..before
            };
            ops.push(put(uid, isolated));
            switches.push(put(uid, pod.view));
        } else if before.is_none() {
            switches.push(put(uid, pod.view));
        }
    }
    content(old, new, &mut additions, &mut removals);
    services(old, new, usize::MAX, &mut additions, &mut removals);
    let gone = gone_addresses(old, new).into_iter();
    ops.extend(gone.chain(removals).map(MapOp::Remove));
    ops.append(&mut additions);
    put_peers(old, new, &BTreeMap::new(), &mut ops);
    put_pod_cidrs(old, new, &mut ops);
    ops.append(&mut switches);
    ops
}

fn gone_addresses(old: &Plan, new: &Plan) -> Vec<Key> {
    let cidrs = old.pod_cidrs.difference(&new.pod_cidrs);
    let mut gone: Vec<Key> = cidrs.map(|prefix| Key::PodCidr(*prefix)).collect();
    changes(
        &old.peers,
        &new.peers,
        |_, _| {},
        |addr| gone.push(Key::Peer(*addr)),
    );
    gone
}

/// The operations with every verdict either the old or the new one, if the maps have room for both plans.
fn gradual(old: &Plan, new: &Plan, capacities: &Limits) -> Vec<MapOp> {
    let mut ops = Vec::new();
    let mut removals = Vec::new();
    content(old, new, &mut ops, &mut removals);
    services(old, new, capacities.services, &mut ops, &mut removals);
    switch(old, new, capacities.selects, &mut ops);
    let gone = gone_addresses(old, new);
    ops.extend(gone.into_iter().chain(removals).map(MapOp::Remove));
    ops
}

/// Applies one operation to a plan, as to the maps. Of a pod, only the view changes.
pub fn apply(plan: &mut Plan, op: &MapOp) {
    match op {
        MapOp::Put(entry) => put(plan, entry),
        MapOp::Remove(key) => remove(plan, key),
    }
}

fn put(plan: &mut Plan, entry: &Entry) {
    match entry {
        Entry::Peer(addr, peer) => drop(plan.peers.insert(*addr, *peer)),
        Entry::PodCidr(prefix) => drop(plan.pod_cidrs.insert(*prefix)),
        Entry::Set(id, head) => drop(plan.sets.insert(*id, *head)),
        Entry::Select(key, lists) => drop(plan.selects.insert(*key, *lists)),
        Entry::Cidr(prefix, list) => drop(plan.cidrs.insert(*prefix, *list)),
        Entry::Port(prefix, answer) => drop(plan.ports.insert(*prefix, *answer)),
        Entry::PortMode(key, mode) => drop(plan.port_modes.insert(*key, *mode)),
        Entry::Service(key, service) => drop(plan.services.insert(*key, *service)),
        Entry::Backend(key, backend) => drop(plan.backends.insert(*key, *backend)),
        Entry::Pod(uid, view) => {
            let pod = plan.pods.entry(uid.clone()).or_default();
            pod.view = *view;
        }
    }
}

fn remove(plan: &mut Plan, key: &Key) {
    match key {
        Key::Peer(addr) => drop(plan.peers.remove(addr)),
        Key::PodCidr(prefix) => drop(plan.pod_cidrs.remove(prefix)),
        Key::Set(id) => drop(plan.sets.remove(id)),
        Key::Select(key) => drop(plan.selects.remove(key)),
        Key::Cidr(prefix) => drop(plan.cidrs.remove(prefix)),
        Key::Port(prefix) => drop(plan.ports.remove(prefix)),
        Key::PortMode(key) => drop(plan.port_modes.remove(key)),
        Key::Service(key) => drop(plan.services.remove(key)),
        Key::Backend(key) => drop(plan.backends.remove(key)),
    }
}

/// Compares two maps: `put` gets new and changed entries, `remove` the keys of removed ones.
fn changes<'a, K: Ord, V: PartialEq>(
    old: &'a Shared<BTreeMap<K, V>>,
    new: &'a Shared<BTreeMap<K, V>>,
    mut changed: impl FnMut(&'a K, &'a V),
    mut gone: impl FnMut(&'a K),
) {
    if old.is(new) {
        return;
    }
    let mut old = old.iter().peekable();
    let mut new = new.iter().peekable();
    loop {
        let order = match (old.peek(), new.peek()) {
            (Some((a, _)), Some((b, _))) => a.cmp(b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return,
        };
        let before = (order != Ordering::Greater).then(|| old.next()).flatten();
        let after = (order != Ordering::Less).then(|| new.next()).flatten();
        match (before, after) {
            (Some((key, _)), None) => gone(key),
            (Some((_, was)), Some((key, is))) if was != is => changed(key, is),
            (None, Some((key, is))) => changed(key, is),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
}

/// Adds and removes immutable content. Heads are removed first: a set without a head denies.
fn content(old: &Plan, new: &Plan, ops: &mut Vec<MapOp>, removals: &mut Vec<Key>) {
    let (mut ports, mut cidrs, mut selects, mut sets) = (vec![], vec![], vec![], vec![]);
    let mut add = |entry| ops.push(MapOp::Put(entry));
    changes(
        &old.ports,
        &new.ports,
        |key, answer| add(Entry::Port(*key, *answer)),
        |key| ports.push(Key::Port(*key)),
    );
    changes(
        &old.cidrs,
        &new.cidrs,
        |key, list| add(Entry::Cidr(*key, *list)),
        |key| cidrs.push(Key::Cidr(*key)),
    );
    changes(
        &old.selects,
        &new.selects,
        |key, lists| add(Entry::Select(*key, *lists)),
        |key| selects.push(Key::Select(*key)),
    );
    changes(
        &old.sets,
        &new.sets,
        |id, head| add(Entry::Set(*id, *head)),
        |id| sets.push(Key::Set(*id)),
    );
    let mut modes = Vec::new();
    changes(
        &old.port_modes,
        &new.port_modes,
        |key, mode| add(Entry::PortMode(*key, *mode)),
        |key| modes.push(Key::PortMode(*key)),
    );
    for part in [sets, selects, cidrs, ports, modes] {
        removals.extend(part);
    }
}

/// A marker is added after the ports of its address and removed before them: in between, the
/// address would have no port. Removes as many services before the additions as the capacity requires.
fn services(
    old: &Plan,
    new: &Plan,
    capacity: usize,
    ops: &mut Vec<MapOp>,
    removals: &mut Vec<Key>,
) {
    let mut backends = Vec::new();
    changes(
        &old.backends,
        &new.backends,
        |key, backend| ops.push(MapOp::Put(Entry::Backend(*key, *backend))),
        |key| backends.push(Key::Backend(*key)),
    );
    let is_marker = |key: &ServiceKey| key.port == Port(0);
    let mut put: Vec<(bool, &ServiceKey, &Service)> = Vec::new();
    let mut gone: Vec<(bool, &ServiceKey)> = Vec::new();
    changes(
        &old.services,
        &new.services,
        |key, service| put.push((is_marker(key), key, service)),
        |key| gone.push((!is_marker(key), key)),
    );
    put.sort_by_key(|(marker, ..)| *marker);
    gone.sort_by_key(|(other, _)| *other);
    let added = put
        .iter()
        .filter(|(_, key, _)| !old.services.contains_key(key));
    let peak = old.services.len() + added.count();
    let surplus = peak.saturating_sub(capacity).min(gone.len());
    let early = gone.drain(..surplus);
    ops.extend(early.map(|(_, key)| MapOp::Remove(Key::Service(*key))));
    let entry = |(_, key, service): (bool, &ServiceKey, &Service)| Entry::Service(*key, *service);
    ops.extend(put.into_iter().map(entry).map(MapOp::Put));
    removals.extend(gone.into_iter().map(|(_, key)| Key::Service(*key)));
    removals.extend(backends);
}

/// Switches peers and pods.
fn switch(old: &Plan, new: &Plan, selects: usize, ops: &mut Vec<MapOp>) {
    let Some(crossing) = Crossing::of(old, new) else {
        put_peers(old, new, &BTreeMap::new(), ops);
        put_pod_cidrs(old, new, ops);
        put_pods(old, new, |_, after| after, ops);
        return;
    };
    let Some(pairs) = crossing.pairs(old, new, selects) else {
        // The bridges do not fit: the pods are isolated during the switch.
        let isolated = |before: PodView, _| PodView {
            set: PolicySetId::ISOLATED,
            ..before
        };
        put_known_pods(old, new, isolated, ops);
        put_peers(old, new, &BTreeMap::new(), ops);
        put_pod_cidrs(old, new, ops);
        put_pods(old, new, |_, after| after, ops);
        return;
    };
    let pair = |(key, lists): (&SelectKey, &Lists)| MapOp::Put(Entry::Select(*key, *lists));
    ops.extend(pairs.iter().map(pair));
    let bridge = |before: PodView, after: PodView| Move::new(before.id, after.id).bridge();
    put_known_pods(
        old,
        new,
        |before, after| PodView {
            id: bridge(before, after),
            ..before
        },
        ops,
    );
    for (addr, step) in &crossing.peers {
        let peer = new.peers.get(addr).or_else(|| old.peers.get(addr));
        let bridged = Peer {
            id: step.bridge(),
            flags: peer.map_or(0, |peer| peer.flags),
            pad: 0,
        };
        ops.push(MapOp::Put(Entry::Peer(*addr, bridged)));
    }
    put_peers(old, new, &crossing.peers, ops);
    put_pod_cidrs(old, new, ops);
    put_pods(
        old,
        new,
        |before, after| PodView {
            id: before.map_or(after.id, |before| bridge(before, after)),
            ..after
        },
        ops,
    );
    put_known_pods(old, new, |_, after| after, ops);
    for addr in crossing.peers.keys() {
        ops.push(match new.peers.get(addr) {
            Some(peer) => MapOp::Put(Entry::Peer(*addr, *peer)),
            None => MapOp::Remove(Key::Peer(*addr)),
        });
    }
    ops.extend(pairs.keys().map(|key| MapOp::Remove(Key::Select(*key))));
}

fn put_pod_cidrs(old: &Plan, new: &Plan, ops: &mut Vec<MapOp>) {
    let added = new.pod_cidrs.difference(&old.pod_cidrs);
    ops.extend(added.map(|prefix| MapOp::Put(Entry::PodCidr(*prefix))));
}

fn put_peers(old: &Plan, new: &Plan, but: &BTreeMap<Addr, Move>, ops: &mut Vec<MapOp>) {
    let put = |addr: &Addr, peer: &Peer| {
        if !but.contains_key(addr) {
            ops.push(MapOp::Put(Entry::Peer(*addr, *peer)));
        }
    };
    changes(&old.peers, &new.peers, put, |_| {});
}

/// Puts pods that are new or whose state changes.
fn put_pods(
    old: &Plan,
    new: &Plan,
    view: impl Fn(Option<PodView>, PodView) -> PodView,
    ops: &mut Vec<MapOp>,
) {
    for (uid, pod) in &new.pods {
        let before = old.pods.get(uid).map(|before| before.view);
        if before != Some(pod.view) {
            ops.push(MapOp::Put(Entry::Pod(uid.clone(), view(before, pod.view))));
        }
    }
}

/// Puts pods that stay and whose state changes after `view` is applied.
fn put_known_pods(
    old: &Plan,
    new: &Plan,
    view: impl Fn(PodView, PodView) -> PodView,
    ops: &mut Vec<MapOp>,
) {
    let known = |before: Option<PodView>, after| before.map_or(after, |b| view(b, after));
    let mut puts = Vec::new();
    put_pods(old, new, known, &mut puts);
    ops.extend(puts.into_iter().filter(|op| match op {
        MapOp::Put(Entry::Pod(uid, _)) => old.pods.contains_key(uid),
        MapOp::Put(_) | MapOp::Remove(_) => true,
    }));
}

/// A change of identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Move {
    from: IdentityId,
    to: IdentityId,
}

impl Move {
    const fn new(from: IdentityId, to: IdentityId) -> Self {
        Self { from, to }
    }

    /// The bridge between the two identities; the identity itself if it does not change.
    fn bridge(self) -> IdentityId {
        if self.from == self.to {
            return self.to;
        }
        let first = IdentityId::FIRST_WORKLOAD.0;
        IdentityId(Ids::default().id("bridge", first, &(self.from, self.to)))
    }

    /// Whether a bridge can stand in. A decision depends on more than the lists of the host's
    /// identity.
    fn is_bridgeable(self) -> bool {
        self.from != self.to && !self.from.is_host() && !self.to.is_host()
    }
}

/// A transition in which peers change their identity while pods change their set.
struct Crossing {
    /// Addresses in `PEERS` that change their identity.
    peers: BTreeMap<Addr, Move>,
    /// All changes, including those of this node's pods.
    moves: BTreeSet<Move>,
}

impl Crossing {
    fn of(old: &Plan, new: &Plan) -> Option<Self> {
        let unknown = old.pods.is_empty() && !old.sets.is_empty();
        let switches = |(uid, pod): &(&String, &LocalPod)| {
            let before = old.pods.get(*uid);
            before.map_or(unknown, |before| before.view.set != pod.view.set)
        };
        let mut switching = new.pods.iter().filter(switches).map(|(_, pod)| pod.view);
        let first = switching.next()?;
        let alone = switching.next().is_none();
        let mut peers = BTreeMap::new();
        let mut gone = Vec::new();
        let (before, after) = (Identities::of(old), Identities::of(new));
        let mut changed = |addr: &Addr| {
            let step = Move::new(before.get(addr), after.get(addr));
            if step.is_bridgeable() {
                peers.insert(*addr, step);
            }
        };
        changes(
            &old.peers,
            &new.peers,
            |addr, _| changed(addr),
            |addr| gone.push(*addr),
        );
        gone.iter().for_each(changed);
        let of_pods = new.pods.iter().filter_map(|(uid, pod)| {
            let before = old.pods.get(uid)?;
            Some((pod.view, Move::new(before.view.id, pod.view.id)))
        });
        let of_pods: Vec<_> = of_pods.filter(|(_, step)| step.is_bridgeable()).collect();
        // A single pod that changes has no peer with a new identity but itself.
        if alone
            && peers.keys().all(|addr| first.owns(addr))
            && of_pods.iter().all(|(view, _)| *view == first)
        {
            return None;
        }
        let moves: BTreeSet<Move> = peers
            .values()
            .copied()
            .chain(of_pods.iter().map(|(_, step)| *step))
            .collect();
        (!moves.is_empty()).then_some(Self { peers, moves })
    }

    /// The pairs of every set with the bridges; `None` = they do not fit into the map.
    fn pairs(&self, old: &Plan, new: &Plan, capacity: usize) -> Option<BTreeMap<SelectKey, Lists>> {
        let free = capacity
            .checked_sub(old.selects.len())?
            .checked_sub(new.selects.len())?;
        let mut pairs = BTreeMap::new();
        let sets: BTreeSet<PolicySetId> = old.sets.keys().chain(new.sets.keys()).copied().collect();
        for set in sets {
            let (plan, is_new) = match new.sets.contains_key(&set) {
                true => (new, true),
                false => (old, false),
            };
            for step in &self.moves {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let key = |peer| SelectKey::new(set, peer, direction);
                    let peer = if is_new { step.to } else { step.from };
                    // A peer without a pair has the set's list for all others, and so has its
                    // bridge.
                    if let Some(lists) = plan.selects.get(&key(peer)) {
                        pairs.insert(key(step.bridge()), *lists);
                    }
                }
                if pairs.len() > free {
                    return None;
                }
            }
        }
        Some(pairs)
    }
}

/// The identities of addresses in a plan.
struct Identities<'a> {
    plan: &'a Plan,
    pod_cidrs: Ranges<u128, ()>,
}

impl<'a> Identities<'a> {
    fn of(plan: &'a Plan) -> Self {
        Self {
            plan,
            pod_cidrs: index::pod_cidrs(plan),
        }
    }

    fn get(&self, addr: &Addr) -> IdentityId {
        match self.plan.peers.get(addr) {
            Some(peer) => peer.id,
            None if self.pod_cidrs.get(ranges::number(*addr)).is_some() => IdentityId::UNKNOWN,
            None => IdentityId::WORLD,
        }
    }
}
