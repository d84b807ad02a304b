// SPDX-License-Identifier: Apache-2.0
//! Compares decisions of the kernel with those of user space: random plans in real maps, random packets
//! through the gate's two programs (BPF_PROG_TEST_RUN), and the same questions to `mesh_common::path`
//! over the plan.
//!
//! Prints the number of packets by reason. Needs root.

mod cost;
mod held;
mod switch;
mod tables;
mod world;

use std::collections::BTreeMap;

use aya::maps::RingBuf;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, maps};
use mesh_common::event::{self, Event};
use mesh_common::path::{self, Arrival, Origin, Outbound, Path};
use mesh_common::pod::{GatePod, LocalAddr, PodIndex, PodState, PodView};
use mesh_common::settings::TUNNEL_PORT;
use mesh_common::{Protocol, Reason};
use mesh_plan::{Index, Plan};
use world::{Packet, Random, World};
use zerocopy::FromBytes as _;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-bpf"));

const PLANS: u32 = 200;
const PACKETS_PER_PLAN: u32 = 150;
const TCX_NEXT: u32 = u32::MAX;
const TCX_DROP: u32 = 2;
/// The index of the loopback interface, which test packets use.
const LINK: u32 = 1;

/// The outcome of a packet at the gate, expected or found.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    passed: bool,
    /// The reason and rule of a drop.
    drop: Option<(Reason, u64)>,
}

impl Outcome {
    const PASSED: Self = Self {
        passed: true,
        drop: None,
    };

    fn dropped(reason: Reason, rule: u64) -> Self {
        Self {
            passed: false,
            drop: Some((reason, rule)),
        }
    }
}

/// The loaded object with its programs and maps.
struct Kernel {
    object: Ebpf,
    events: RingBuf<maps::MapData>,
}

impl Kernel {
    fn load() -> Self {
        let mut object = Ebpf::load(OBJECT).expect("the object loads");
        for name in ["gate_from_pod", "gate_to_pod"] {
            gate(&mut object, name)
                .load()
                .expect("the verifier takes the gate");
        }
        let events = object.take_map("EVENTS").expect("the object has events");
        Self {
            object,
            events: RingBuf::try_from(events).expect("a ring"),
        }
    }

    fn run(&mut self, name: &str, packet: &Packet, entered: u32) -> Outcome {
        // The rate limit of events is not tested here.
        let mut rates: maps::HashMap<_, PodIndex, mesh_common::maps::DropRate> =
            map(&mut self.object, "DROP_RATE");
        let _absent = rates.remove(&PodIndex(0));
        let frame = packet.frame();
        let context = context(entered);
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result = gate(&mut self.object, name)
            .test_run(options)
            .expect("the program runs");
        let mut last = None;
        while let Some(item) = self.events.next() {
            last = Some(Event::read_from_bytes(&item).expect("an event"));
        }
        match (result.return_value, last) {
            (TCX_NEXT, None) => Outcome::PASSED,
            // A policy in audit mode would drop the packet.
            (TCX_NEXT, Some(event)) if event.kind == event::kind::AUDIT => Outcome::PASSED,
            (TCX_DROP, Some(event)) => {
                let reason = Reason::from_code(event.reason).expect("a known reason");
                Outcome::dropped(reason, event.rule)
            }
            (verdict, event) => {
                assert_eq!(verdict, TCX_DROP, "{name} passes and reports {event:?}");
                unreachable!("{name} drops and reports nothing")
            }
        }
    }
}

fn gate<'a>(object: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    let program = object.program_mut(name).expect("the object has the gate");
    program.try_into().expect("the gate is a classifier")
}

fn map<'a, M: TryFrom<&'a mut maps::Map, Error = maps::MapError>>(
    object: &'a mut Ebpf,
    name: &str,
) -> M {
    let map = object.map_mut(name).expect("the object has the map");
    M::try_from(map).expect("the map has its type")
}

/// Returns a `struct __sk_buff` (linux/bpf.h) with the interface by which the packet entered.
fn context(entered: u32) -> [u8; 192] {
    const INGRESS_IFINDEX: usize = 36;
    const IFINDEX: usize = 40;
    let mut bytes = [0; 192];
    bytes[INGRESS_IFINDEX..][..4].copy_from_slice(&entered.to_ne_bytes());
    bytes[IFINDEX..][..4].copy_from_slice(&LINK.to_ne_bytes());
    bytes
}

/// Returns the gate's expected outcome for a packet that the pod sends.
fn sent(plan: &Index, view: &PodView, packet: &Packet) -> Outcome {
    let to = packet.remote;
    let peer = path::who(plan, &to.addr);
    let enrolled = view.flags & PodState::ENROLLED != 0;
    let concerned = enrolled || view.set != mesh_common::policy::PolicySetId::NONE;
    if !concerned {
        return Outcome::PASSED;
    }
    if packet.protocol == Protocol::TCP && !packet.opens() {
        let tunnelled = path::tunnels(view, &peer);
        // Without payload, a segment of the tunnel port can be the agent's, before or after the tunnel.
        let of_tunnel = packet.source == TUNNEL_PORT || to.port == TUNNEL_PORT;
        return if tunnelled && !of_tunnel && !packet.resets() {
            Outcome::dropped(Reason::Bypass, 0)
        } else {
            Outcome::PASSED
        };
    }
    let Path {
        action, verdict, ..
    } = path::outbound(plan, view, view.set, to, packet.protocol);
    match action {
        Outbound::Direct => Outcome::PASSED,
        Outbound::Refuse => Outcome::dropped(verdict.reason, verdict.rule.0),
        Outbound::Tunnel => Outcome::dropped(Reason::Bypass, 0),
    }
}

/// Returns the gate's expected outcome for a packet to the pod.
fn received(plan: &Index, view: &PodView, packet: &Packet, entered: u32) -> Outcome {
    let enrolled = view.flags & PodState::ENROLLED != 0;
    let concerned = enrolled || view.set != mesh_common::policy::PolicySetId::NONE;
    let from = packet.remote.addr;
    let tcp = packet.protocol == Protocol::TCP;
    let undecided = tcp && (packet.local.port == TUNNEL_PORT || !packet.opens());
    if !concerned || undecided {
        return Outcome::PASSED;
    }
    let is_host = plan.peers.get(&from).is_some_and(|p| p.id.is_host());
    let origin = if entered != 0 && is_host {
        Origin::Translated
    } else {
        Origin::Address
    };
    let arrival = Arrival {
        from: &from,
        origin,
        protocol: packet.protocol,
        port: packet.local.port,
    };
    let Path {
        action, verdict, ..
    } = path::inbound(plan, view, view.set, arrival);
    match action {
        Outbound::Refuse => Outcome::dropped(verdict.reason, verdict.rule.0),
        Outbound::Direct | Outbound::Tunnel => Outcome::PASSED,
    }
}

/// Writes a plan and its pods to the maps.
fn fill(kernel: &mut Kernel, plan: &Plan, views: &[PodView]) {
    let object = &mut kernel.object;
    macro_rules! hash {
        ($name:literal, $entries:expr) => {
            let mut table: maps::HashMap<_, _, _> = map(object, $name);
            for (key, value) in $entries {
                table
                    .insert(*key, *value, 0)
                    .expect("the map takes the entry");
            }
        };
    }
    macro_rules! prefixes {
        ($name:literal, $entries:expr) => {
            let mut table: maps::lpm_trie::LpmTrie<_, _, _> = map(object, $name);
            for (key, value) in $entries {
                let key = maps::lpm_trie::Key::new(key.bits, key.data);
                table
                    .insert(&key, value, 0)
                    .expect("the map takes the entry");
            }
        };
    }
    hash!("PEERS", &plan.peers);
    hash!("POLICY_SETS", &plan.sets);
    hash!("POLICY_SELECT", &plan.selects);
    hash!("PORT_MODES", &plan.port_modes);
    prefixes!("POD_CIDRS", plan.pod_cidrs.iter().map(|key| (key, 1u32)));
    prefixes!(
        "POLICY_CIDRS",
        plan.cidrs.iter().map(|(key, value)| (key, *value))
    );
    prefixes!(
        "POLICY_PORTS",
        plan.ports.iter().map(|(key, value)| (key, *value))
    );
    for (index, view) in (0..).map(PodIndex).zip(views) {
        let state = PodState {
            revision: 1,
            view: *view,
            link: if index == PodIndex(0) { LINK } else { 0 },
            revision_end: 1,
            ..PodState::default()
        };
        hash!("PODS", &[(index, state)]);
        let local = LocalAddr {
            index,
            link: state.link,
        };
        hash!("PODS_BY_ADDR", &[(view.v4, local), (view.v6, local)]);
        if state.link != 0 {
            hash!("PODS_BY_LINK", &[(state.link, GatePod::new(index, &state))]);
        }
    }
}

#[test]
fn kernel_and_user_space_decide_alike() {
    let mut random = Random::new(0x6d65_7368);
    let mut reasons: BTreeMap<&str, u32> = BTreeMap::new();
    let (mut passed, mut total) = (0u32, 0u32);
    for plan in 0..PLANS {
        let world = World::random(&mut random);
        let views = world.views();
        let mut kernel = Kernel::load();
        fill(&mut kernel, &world.plan, &views);
        let index = Index::new(world.plan.clone());
        for number in 0..PACKETS_PER_PLAN {
            // Each datagram has another source port: flows are not tested here.
            let packet = world.packet(&mut random, number);
            let (name, entered, expected) = if random.one_in(2) {
                ("gate_from_pod", 0, sent(&index, &views[0], &packet))
            } else {
                let entered = if random.one_in(2) { 0 } else { LINK };
                (
                    "gate_to_pod",
                    entered,
                    received(&index, &views[0], &packet, entered),
                )
            };
            let to_pod = name == "gate_to_pod";
            let found = kernel.run(name, &packet.directed(to_pod), entered);
            assert_eq!(
                found, expected,
                "plan {plan}, {name}, {packet:?}, {:?}",
                views[0]
            );
            total += 1;
            passed += u32::from(found.passed);
            let label = found.drop.map_or("passed", |(reason, _)| reason.label());
            *reasons.entry(label).or_default() += 1;
        }
    }
    println!("{total} packets over {PLANS} plans: {passed} passed; {reasons:?}");
    assert!(
        passed * 5 >= total,
        "{passed} of {total} passed: less than a fifth"
    );
    assert!(
        (total - passed) * 5 >= total,
        "{} of {total} dropped",
        total - passed
    );
}
