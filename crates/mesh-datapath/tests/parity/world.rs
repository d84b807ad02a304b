// SPDX-License-Identifier: Apache-2.0
//! Random plans and packets for the parity test, with few addresses and identities so that look-ups
//! succeed.

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::pod::{ModeKey, PodState, PodView, port_mode};
use mesh_common::policy::{
    Answer, CidrKey, Direction, ListId, Lists, NO_RANK, PolicySetId, PortKey, RuleId, SelectKey,
    SetHead,
};
use mesh_common::{Addr, Endpoint, Port, Protocol};
use mesh_plan::Plan;
use mesh_plan::plan::{LocalPod, Prefix, masked};

/// A small deterministic generator (SplitMix64, Steele, Lea and Flood 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[usize::try_from(self.below(of.len() as u64)).expect("a small number")]
    }
}

/// A random plan, and the peers of its packets.
pub(crate) struct World {
    pub(crate) plan: Plan,
    remotes: Vec<Addr>,
}

/// The TCP flag SYN.
pub(crate) const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// A TCP segment without payload or a datagram between the first pod and a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) local: Endpoint,
    pub(crate) remote: Endpoint,
    pub(crate) protocol: Protocol,
    /// The flags of TCP.
    pub(crate) flags: u8,
    pub(crate) source: Port,
    to_pod: bool,
}

const PORTS: [u16; 6] = [80, 81, 443, 8080, 15008, 60000];
const PROTOCOLS: [Protocol; 4] = [
    Protocol::TCP,
    Protocol::UDP,
    Protocol::SCTP,
    Protocol::OTHER,
];

fn v4(c: u8, d: u8) -> Addr {
    Addr::from_v4_word(u32::from_ne_bytes([10, 1, c, d]))
}

fn v6(c: u8, d: u8) -> Addr {
    let mut octets = [0; 16];
    (octets[0], octets[1], octets[13], octets[15]) = (0xfd, 1, c, d);
    Addr::from_octets(octets)
}

fn workload(number: u64) -> IdentityId {
    IdentityId(IdentityId::FIRST_WORKLOAD.0 + number)
}

impl World {
    pub(crate) fn random(random: &mut Random) -> Self {
        let mut plan = Plan::default();
        let mut remotes = vec![
            v4(0, 2),
            v6(0, 2),
            v4(5, 5),
            v6(5, 5),
            Addr::from_v4_word(u32::from_ne_bytes([8, 8, 8, 8])),
        ];
        for bits in [96 + 16, 16] {
            let base = if bits > 96 { v4(0, 0) } else { v6(0, 0) };
            plan.pod_cidrs.insert(Prefix {
                bits,
                data: masked(base, bits),
            });
        }
        for number in 1..=10 {
            let flags = Peer::POD
                | *random.pick(&[0, Peer::ENROLLED, Peer::ENROLLED | Peer::READY])
                | if random.one_in(3) { Peer::STRICT } else { 0 };
            let addr = if random.one_in(3) {
                v6(1, number)
            } else {
                v4(1, number)
            };
            let id = workload(random.below(5));
            plan.peers.insert(addr, Peer { id, flags, pad: 0 });
            remotes.push(addr);
        }
        for (last, id) in [(1, IdentityId::HOST), (2, IdentityId::REMOTE_NODE)] {
            let addr = Addr::from_v4_word(u32::from_ne_bytes([192, 168, 0, last]));
            plan.peers.insert(
                addr,
                Peer {
                    id,
                    flags: 0,
                    pad: 0,
                },
            );
            remotes.push(addr);
        }
        let lists: Vec<ListId> = (1..=8).map(ListId).collect();
        for list in &lists {
            answers(&mut plan, *list, random);
        }
        for set in (10..14).map(PolicySetId) {
            policy_set(&mut plan, set, &lists, &remotes, random);
        }
        for modes in 1..3 {
            for port in PORTS {
                if random.one_in(2) {
                    let mode = if random.one_in(2) {
                        port_mode::STRICT
                    } else {
                        port_mode::PERMISSIVE
                    };
                    plan.port_modes
                        .insert(ModeKey::new(modes, Port::new(port)), mode);
                }
            }
        }
        for number in 1..=2 {
            let view = view(number, random);
            let pod = LocalPod {
                view,
                ..LocalPod::default()
            };
            plan.pods.insert(format!("pod-{number}"), pod);
        }
        Self { plan, remotes }
    }

    /// Returns the views of the node's two pods; packets are from or to the first.
    pub(crate) fn views(&self) -> Vec<PodView> {
        self.plan.pods.values().map(|pod| pod.view).collect()
    }

    pub(crate) fn packet(&self, random: &mut Random, number: u32) -> Packet {
        let addr = *random.pick(&self.remotes);
        let view = self.views()[0];
        let own = if addr.is_v4() { view.v4 } else { view.v6 };
        let protocol = *random.pick(&[Protocol::TCP, Protocol::UDP, Protocol::SCTP]);
        let service = Port::new(*random.pick(&PORTS));
        let source = Port::new(20_000 + u16::try_from(number).expect("few packets"));
        let later = *random.pick(&[ACK, SYN | ACK, RST, RST | ACK]);
        // The direction decides later which endpoint is the server.
        Packet {
            local: Endpoint::new(own, service),
            remote: Endpoint::new(addr, service),
            protocol,
            flags: if random.one_in(3) { later } else { SYN },
            source,
            to_pod: false,
        }
    }
}

impl Packet {
    /// Makes a TCP segment.
    pub(crate) fn segment(local: Endpoint, remote: Endpoint, source: Port, flags: u8) -> Self {
        Self {
            local,
            remote,
            protocol: Protocol::TCP,
            flags,
            source,
            to_pod: false,
        }
    }

    /// Makes the first packet of a connection or flow.
    pub(crate) fn first(
        local: Endpoint,
        remote: Endpoint,
        protocol: Protocol,
        source: Port,
    ) -> Self {
        Self {
            protocol,
            ..Self::segment(local, remote, source, SYN)
        }
    }

    /// Returns whether this is a SYN that opens a connection.
    pub(crate) fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Returns whether this is a reset without payload.
    pub(crate) fn resets(&self) -> bool {
        self.flags & RST != 0
    }

    /// Returns the packet in a direction.
    pub(crate) fn directed(self, to_pod: bool) -> Self {
        Self { to_pod, ..self }
    }

    /// Returns the frame: Ethernet, IP, and the first bytes of the transport header.
    pub(crate) fn frame(&self) -> Vec<u8> {
        let (mut from, to) = if self.to_pod {
            (self.remote, self.local)
        } else {
            (self.local, self.remote)
        };
        from.port = self.source;
        let mut transport = Vec::new();
        transport.extend_from_slice(&from.port.0.to_ne_bytes());
        transport.extend_from_slice(&to.port.0.to_ne_bytes());
        if self.protocol == Protocol::TCP {
            transport.extend_from_slice(&[
                0,
                0,
                0,
                1,
                0,
                0,
                0,
                0,
                5 << 4,
                self.flags,
                255,
                255,
                0,
                0,
                0,
                0,
            ]);
        } else {
            // The length of UDP. The gate ignores SCTP's verification tag (RFC 9260, 3.1).
            transport.extend_from_slice(&[0, 8, 0, 0]);
        }
        let length = u16::try_from(transport.len()).expect("a short packet");
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if from.addr.is_v4() {
            frame.extend_from_slice(&[8, 0, 0x45, 0]);
            frame.extend_from_slice(&(length + 20).to_be_bytes());
            frame.extend_from_slice(&[0, 0, 0, 0, 64, self.protocol.0, 0, 0]);
            frame.extend_from_slice(&from.addr.octets()[12..]);
            frame.extend_from_slice(&to.addr.octets()[12..]);
        } else {
            frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend_from_slice(&length.to_be_bytes());
            frame.extend_from_slice(&[self.protocol.0, 64]);
            frame.extend_from_slice(&from.addr.octets());
            frame.extend_from_slice(&to.addr.octets());
        }
        frame.extend_from_slice(&transport);
        frame
    }
}

fn view(number: u8, random: &mut Random) -> PodView {
    let mut flags = PodState::GATED | PodState::SILENT;
    for (flag, one_in) in [
        (PodState::STRICT, 2),
        (PodState::REQUIRED, 3),
        (PodState::UDP_SAME_NODE, 4),
        (PodState::UDP_DENY, 6),
    ] {
        if random.one_in(one_in) {
            flags |= flag;
        }
    }
    if !random.one_in(4) {
        flags |= PodState::ENROLLED;
    }
    let sets = [0, 10, 11, 12, 13, 10, 11, 12, 13, 99];
    PodView {
        set: PolicySetId(*random.pick(&sets)),
        id: workload(random.below(5)),
        v4: v4(0, number),
        v6: v6(0, number),
        modes: random.below(3),
        flags,
        pad: 0,
    }
}

/// Adds a list's answers: each protocol has one for all ports, and some for single ports. Some protocols
/// are missing, as if they did not fit.
fn answers(plan: &mut Plan, list: ListId, random: &mut Random) {
    for protocol in PROTOCOLS {
        if random.one_in(40) {
            continue;
        }
        let mut put = |bits: u32, port: u16, random: &mut Random| {
            let data = PortKey::new(list, protocol, Port::new(port));
            let key = Prefix {
                bits: PortKey::FIXED_BITS + bits,
                data,
            };
            plan.ports.insert(key, answer(random));
        };
        put(0, 0, random);
        put(4, 0, random);
        put(15, 80, random);
        for port in PORTS {
            if random.one_in(3) {
                put(16, port, random);
            }
        }
    }
}

fn answer(random: &mut Random) -> Answer {
    let mut ranked = |actions: u64| {
        if random.one_in(3) {
            let action = u8::try_from(1 + random.below(actions)).expect("an action");
            let rank = u32::try_from(random.below(6)).expect("a small rank");
            (rank, action, RuleId(100 + random.below(50)))
        } else {
            (NO_RANK, 0, RuleId::NONE)
        }
    };
    let (admin_rank, admin, admin_rule) = ranked(3);
    let (baseline_rank, baseline, baseline_rule) = ranked(2);
    let namespaced = u8::try_from(random.below(3)).expect("an action");
    let namespaced_rule = if namespaced == 0 {
        RuleId::NONE
    } else {
        RuleId(200 + random.below(50))
    };
    Answer {
        admin_rule,
        namespaced_rule,
        baseline_rule,
        admin_rank,
        baseline_rank,
        admin,
        namespaced,
        baseline,
        pad: [0; 5],
    }
}

fn policy_set(
    plan: &mut Plan,
    set: PolicySetId,
    lists: &[ListId],
    remotes: &[Addr],
    random: &mut Random,
) {
    let list = |random: &mut Random| {
        if random.one_in(4) {
            ListId::NONE
        } else {
            *random.pick(lists)
        }
    };
    let head = SetHead {
        ingress_rule: RuleId(1001),
        egress_rule: RuleId(1002),
        ingress_any: list(random),
        egress_any: list(random),
        shadow: PolicySetId::NONE,
        flags: u32::try_from(random.below(16)).expect("four flags"),
        pad: 0,
    };
    plan.sets.insert(set, head);
    for direction in [Direction::Ingress, Direction::Egress] {
        let ids = (0..5).map(workload).chain((1..=5).map(IdentityId));
        for peer in ids {
            if random.one_in(2) {
                let lists = Lists {
                    proven: list(random),
                    by_address: list(random),
                };
                plan.selects
                    .insert(SelectKey::new(set, peer, direction), lists);
            }
        }
        for _ in 0..4 {
            let addr = *random.pick(remotes);
            let family = if addr.is_v4() { 96 } else { 0 };
            let bits = family + *random.pick(&[0, 8, 16, 24, 32]);
            let data = CidrKey::new(set, direction, masked(addr, bits));
            let key = Prefix {
                bits: CidrKey::FIXED_BITS + bits,
                data,
            };
            plan.cidrs.insert(key, list(random));
        }
    }
}
