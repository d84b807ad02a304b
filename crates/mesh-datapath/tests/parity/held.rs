// SPDX-License-Identifier: Apache-2.0
//! A kernel whose maps hold the plan of a node. The maps are written, read back, and queried with
//! packets; a test can also damage them to show that it would notice.

use std::collections::BTreeMap;

use aya::maps::{self, lpm_trie::LpmTrie};
use mesh_common::identity::Peer;
use mesh_common::maps::DropRate;
use mesh_common::pod::{GatePod, LocalAddr, ModeKey, PodIndex, PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, Direction, ListId, Lists, PolicySetId, PortKey, SelectKey, SetHead,
};
use mesh_common::{Addr, Endpoint, Port, Protocol};
use mesh_plan::plan::{LocalPod, Prefix};
use mesh_plan::{Index, Plan};

use super::world::Packet;
use super::{Kernel, LINK, Outcome, fill, map, received, sent};

/// The maps that decisions read, except `PODS`.
pub(super) const MAPS: [&str; 8] = [
    "POLICY_SETS",
    "POLICY_SELECT",
    "POLICY_CIDRS",
    "POLICY_PORTS",
    "PEERS",
    "POD_CIDRS",
    "PORT_MODES",
    "PODS_BY_ADDR",
];

/// A loaded kernel object of one node, and the content of its maps.
pub(super) struct Node {
    kernel: Kernel,
    plan: Plan,
    /// The UIDs of the pods by index; the maps do not have them.
    uids: Vec<String>,
    /// The content of the maps that decisions read. A pod has the addresses of `PODS_BY_ADDR`.
    pub(super) back: Index,
    packets: u16,
}

impl Node {
    /// Loads the object and writes a plan. All pods have a gate and deny silently, so that their gate
    /// also decides TCP; for other pods sk_lookup calls the same function.
    pub(super) fn new(mut plan: Plan) -> Self {
        for pod in plan.pods.values_mut() {
            pod.view.flags |= PodState::GATED | PodState::SILENT;
        }
        let mut node = Self {
            kernel: Kernel::load(),
            uids: plan.pods.keys().cloned().collect(),
            plan,
            back: Index::default(),
            packets: 0,
        };
        node.write();
        node
    }

    /// Writes the plan, also to repair damaged maps.
    pub(super) fn write(&mut self) {
        fill(&mut self.kernel, &self.plan, &[]);
        for (index, pod) in (0..).map(PodIndex).zip(self.plan.pods.values()) {
            write(&mut self.kernel, index, pod.view);
            let mut by_addr: maps::HashMap<_, Addr, LocalAddr> =
                map(&mut self.kernel.object, "PODS_BY_ADDR");
            for addr in [pod.view.v4, pod.view.v6] {
                let at = LocalAddr { index, link: 0 };
                if !addr.is_none() {
                    by_addr
                        .insert(addr, at, 0)
                        .expect("the map has a free entry");
                }
            }
        }
        self.back = Index::new(read_back(&mut self.kernel, &self.uids));
    }

    /// Returns the UIDs of the pods by index.
    pub(super) fn uids(&self) -> &[String] {
        &self.uids
    }

    /// Returns a pod's view in the map `PODS`.
    pub(super) fn view(&self, uid: &str) -> PodView {
        state(&self.kernel, self.index(uid)).view
    }

    fn index(&self, uid: &str) -> PodIndex {
        let slot = self.uids.iter().position(|other| other == uid);
        let slot = slot.expect("a pod of this node");
        PodIndex(u32::try_from(slot).expect("few pods"))
    }

    /// Sends a first packet through a pod's gate and returns the outcome, which must be that of
    /// `mesh_common::path` over the maps' content, with the same reason and rule.
    pub(super) fn gate(
        &mut self,
        uid: &str,
        direction: Direction,
        [local, remote]: [Endpoint; 2],
        protocol: Protocol,
    ) -> Outcome {
        let index = self.index(uid);
        let state = state(&self.kernel, index);
        let object = &mut self.kernel.object;
        let mut by_link: maps::HashMap<_, u32, GatePod> = map(object, "PODS_BY_LINK");
        let at_gate = GatePod::new(index, &state);
        by_link
            .insert(LINK, at_gate, 0)
            .expect("the map has a free entry");
        // The rate limit of events is not tested here.
        let mut rates: maps::HashMap<_, PodIndex, DropRate> = map(object, "DROP_RATE");
        let _absent = rates.remove(&index);
        self.packets += 1;
        // Each packet has another source port: flows are not tested here.
        let source = Port::new(20_000 + self.packets);
        let to_pod = direction == Direction::Ingress;
        let packet = Packet::first(local, remote, protocol, source).directed(to_pod);
        let (name, expected) = match direction {
            Direction::Egress => ("gate_from_pod", sent(&self.back, &state.view, &packet)),
            Direction::Ingress => ("gate_to_pod", received(&self.back, &state.view, &packet, 0)),
        };
        let outcome = self.kernel.run(name, &packet, 0);
        assert_eq!(outcome, expected, "{name} of {uid}: {packet:?}");
        outcome
    }

    /// Swaps the policy sets of two pods.
    pub(super) fn swap_policy(&mut self, [a, b]: [&str; 2]) {
        let [a, b] = [a, b].map(|uid| self.index(uid));
        let [mut first, mut second] = [a, b].map(|index| state(&self.kernel, index).view);
        std::mem::swap(&mut first.set, &mut second.set);
        write(&mut self.kernel, a, first);
        write(&mut self.kernel, b, second);
        self.back = Index::new(read_back(&mut self.kernel, &self.uids));
    }

    /// Removes all entries of one of [`MAPS`].
    pub(super) fn empty(&mut self, name: &str) {
        let object = &mut self.kernel.object;
        macro_rules! empty {
            ($kind:ident, $key:ty, $value:ty) => {{
                let mut table: $kind<_, $key, $value> = map(object, name);
                let keys: Result<Vec<_>, _> = table.keys().collect();
                for key in keys.expect("the map is read") {
                    table.remove(&key).expect("it was there");
                }
            }};
        }
        use maps::HashMap;
        match name {
            "POLICY_SETS" => empty!(HashMap, PolicySetId, SetHead),
            "POLICY_SELECT" => empty!(HashMap, SelectKey, Lists),
            "POLICY_CIDRS" => empty!(LpmTrie, CidrKey, ListId),
            "POLICY_PORTS" => empty!(LpmTrie, PortKey, Answer),
            "PEERS" => empty!(HashMap, Addr, Peer),
            "POD_CIDRS" => empty!(LpmTrie, Addr, u32),
            "PORT_MODES" => empty!(HashMap, ModeKey, u8),
            "PODS_BY_ADDR" => empty!(HashMap, Addr, LocalAddr),
            other => unreachable!("{other} is none of the maps that decide"),
        }
        self.back = Index::new(read_back(&mut self.kernel, &self.uids));
    }
}

fn state(kernel: &Kernel, index: PodIndex) -> PodState {
    let pods = kernel.object.map("PODS").expect("the object has pods");
    let pods: maps::HashMap<_, PodIndex, PodState> = pods.try_into().expect("a hash");
    pods.get(&index, 0).expect("the pod's state")
}

fn write(kernel: &mut Kernel, index: PodIndex, view: PodView) {
    let state = PodState {
        revision: 1,
        view,
        revision_end: 1,
        ..PodState::default()
    };
    let mut pods: maps::HashMap<_, PodIndex, PodState> = map(&mut kernel.object, "PODS");
    pods.insert(index, state, 0)
        .expect("the map has a free entry");
}

/// Returns the content of the maps as a plan without names.
fn read_back(kernel: &mut Kernel, uids: &[String]) -> Plan {
    macro_rules! hash {
        ($name:literal) => {{
            let table: maps::HashMap<_, _, _> = map(&mut kernel.object, $name);
            let entries: Result<_, _> = table.iter().collect();
            entries.expect("the map is read")
        }};
    }
    macro_rules! prefixes {
        ($name:literal) => {{
            let table: LpmTrie<_, _, _> = map(&mut kernel.object, $name);
            let entry = |item: Result<(maps::lpm_trie::Key<_>, _), _>| {
                let (key, value) = item.expect("the map is read");
                let (bits, data) = (key.prefix_len(), key.data());
                (Prefix { bits, data }, value)
            };
            table.iter().map(entry).collect()
        }};
    }
    let by_addr: BTreeMap<Addr, LocalAddr> = hash!("PODS_BY_ADDR");
    let states: BTreeMap<PodIndex, PodState> = hash!("PODS");
    assert_eq!(states.len(), uids.len(), "a state for each pod");
    let found = |index: PodIndex, addr: Addr| match by_addr.get(&addr) {
        Some(at) if at.index == index => addr,
        Some(_) | None => Addr::NONE,
    };
    let pod = |(index, state): (PodIndex, PodState)| {
        let slot = usize::try_from(index.0).expect("few pods");
        let view = PodView {
            v4: found(index, state.view.v4),
            v6: found(index, state.view.v6),
            ..state.view
        };
        let pod = LocalPod {
            view,
            ..LocalPod::default()
        };
        (uids[slot].clone(), pod)
    };
    let pod_cidrs: BTreeMap<Prefix<Addr>, u32> = prefixes!("POD_CIDRS");
    Plan {
        pods: states.into_iter().map(pod).collect(),
        peers: hash!("PEERS"),
        sets: hash!("POLICY_SETS"),
        selects: hash!("POLICY_SELECT"),
        port_modes: hash!("PORT_MODES"),
        cidrs: prefixes!("POLICY_CIDRS"),
        ports: prefixes!("POLICY_PORTS"),
        pod_cidrs: pod_cidrs.into_keys().collect(),
        ..Plan::default()
    }
}
