// SPDX-License-Identifier: Apache-2.0
//! Each case lists the sockets of a namespace, and the expected decision about the first one.

use std::net::IpAddr;

use mesh_common::identity::IdentityId;
use mesh_common::policy::{PolicySetId, SetHead};
use mesh_common::service::{Service, ServiceKey};
use mesh_plan::Plan;

use super::*;

const ESTABLISHED: u8 = state::ESTABLISHED;
const CLOSE_WAIT: u8 = 8;
const OWN: &str = "10.1.0.1:40000";
const SERVED: &str = "10.1.0.1:80";
const PEER: &str = "10.2.0.1:80";
const CLIENT: &str = "10.2.0.1:40000";
const VIP: &str = "10.96.0.1:80";

fn addr(text: &str) -> mesh_common::Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

fn plan(peer: u32) -> Index {
    Index::new(bare(peer))
}

fn bare(peer: u32) -> Plan {
    let mut plan = Plan::default();
    let peer = Peer {
        id: IdentityId(400),
        flags: peer,
        pad: 0,
    };
    plan.peers.insert(addr("10.2.0.1"), peer);
    plan.services
        .insert(ServiceKey::marker(addr("10.96.0.1")), Service::default());
    plan.sets.insert(
        PolicySetId(9),
        SetHead {
            flags: SetHead::ISOLATED_EGRESS | SetHead::ISOLATED_INGRESS,
            ..SetHead::default()
        },
    );
    plan
}

fn pod(flags: u32, set: u64) -> PodView {
    PodView {
        flags,
        set: PolicySetId(set),
        id: IdentityId(300),
        v4: addr("10.1.0.1"),
        ..PodView::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    Kept,
    Old,
    Ended,
}
use Becomes::{Ended, Kept, Old};

fn first(plan: &Index, pod: &PodView, sockets: &[Socket]) -> Becomes {
    let how = (true, pod.has(MEMBER));
    becomes(&judge(plan, pod, sockets, how, NOTHING), sockets)
}

/// Answers of a kernel that knows none of the sockets.
const NOTHING: Ask<'_> = Ask {
    is_tunnel: &|_| false,
    is_node_peer: &|_| false,
};

fn becomes(judgement: &Judgement, sockets: &[Socket]) -> Becomes {
    if judgement.denied.iter().any(|(s, _)| *s == sockets[0]) {
        Ended
    } else if judgement.old.iter().any(|(l, ..)| *l == sockets[0].local) {
        Old
    } else {
        Kept
    }
}

fn tcp(state: u8, ends: [&str; 2], mark: u32) -> Socket {
    Socket::imagined(Protocol::TCP, state, ends, mark)
}

const MEMBER: u32 = PodState::ENROLLED;
const STRICT: u32 = PodState::ENROLLED | PodState::STRICT;
const REQUIRED: u32 = PodState::ENROLLED | PodState::REQUIRED;
const SILENT: u32 = PodState::SILENT | PodState::GATED;
const READY: u32 = Peer::POD | Peer::ENROLLED | Peer::READY;

#[test]
fn outbound_connections_are_kept_or_closed() {
    let direct = tcp(ESTABLISHED, [OWN, PEER], 0);
    let half_closed = tcp(CLOSE_WAIT, [OWN, PEER], 0);
    let captured = tcp(ESTABLISHED, [OWN, PEER], MARK_CAPTURE | 7);
    let connecting = tcp(state::SYN_SENT, [OWN, PEER], 0);
    let virtual_one = tcp(ESTABLISHED, [OWN, VIP], 0);
    let own = tcp(ESTABLISHED, [OWN, SERVED], 0);
    for (name, socket, flags, set, peer, expected) in [
        ("to a peer that tunnels", direct, MEMBER, 0, READY, Old),
        ("half closed", half_closed, MEMBER, 0, READY, Old),
        ("still connecting", connecting, MEMBER, 0, READY, Old),
        (
            "connecting, own Strict",
            connecting,
            STRICT,
            0,
            READY,
            Ended,
        ),
        ("own Strict", direct, STRICT, 0, READY, Ended),
        (
            "the peer's Strict",
            direct,
            MEMBER,
            0,
            READY | Peer::STRICT,
            Ended,
        ),
        ("own Required", direct, REQUIRED, 0, READY, Ended),
        (
            "Required, to a peer outside the mesh",
            direct,
            REQUIRED,
            0,
            Peer::POD,
            Ended,
        ),
        (
            "to a peer outside the mesh",
            direct,
            MEMBER,
            0,
            Peer::POD,
            Kept,
        ),
        ("captured", captured, STRICT, 0, READY, Kept),
        ("captured, denied now", captured, MEMBER, 9, READY, Kept),
        ("captured, not carried", captured, 0, 9, READY, Ended),
        ("outside, denied now", direct, 0, 9, Peer::POD, Ended),
        ("connecting, denied", connecting, 0, 9, Peer::POD, Ended),
        ("connecting, silent", connecting, SILENT, 9, Peer::POD, Kept),
        ("denied silently", direct, SILENT, 9, Peer::POD, Ended),
        ("outside, no policy", direct, 0, 0, READY, Kept),
        ("to a virtual address", virtual_one, MEMBER, 0, READY, Old),
        (
            "virtual address, Strict",
            virtual_one,
            STRICT,
            0,
            READY,
            Ended,
        ),
        ("virtual, outside", virtual_one, 0, 9, READY, Kept),
        ("to itself", own, STRICT, 9, READY, Kept),
    ] {
        let becomes = first(&plan(peer), &pod(flags, set), &[socket]);
        assert_eq!(becomes, expected, "{name}");
    }
}

#[test]
fn socket_with_a_local_reverse_is_connected_to_the_agent() {
    let app = tcp(ESTABLISHED, [OWN, PEER], 0);
    let agent = tcp(ESTABLISHED, [PEER, OWN], 0);
    let plan = plan(READY);
    assert_eq!(first(&plan, &pod(STRICT, 0), &[app]), Ended);
    assert_eq!(first(&plan, &pod(STRICT, 0), &[app, agent]), Kept);
    assert_eq!(first(&plan, &pod(STRICT, 0), &[agent, app]), Kept);
    let ends = with_the_agent(&pod(MEMBER, 0), &[app, agent]);
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0], app);
    assert_eq!(
        of_the_agent(&pod(MEMBER, 0), &[app, agent], NOTHING.is_tunnel)[0],
        agent
    );
}

#[test]
fn inbound_connections_are_kept_or_closed() {
    let listener = tcp(state::LISTEN, ["0.0.0.0:80", "0.0.0.0:0"], 0);
    let plain = tcp(ESTABLISHED, [SERVED, CLIENT], 0);
    let handed = tcp(ESTABLISHED, [SERVED, CLIENT], MARK_INBOUND);
    let host = tcp(ESTABLISHED, [SERVED, "192.0.2.1:4000"], 0);
    for (name, socket, flags, set, peer, expected) in [
        ("plain, Strict", plain, STRICT, 0, Peer::POD, Ended),
        ("plain, Permissive", plain, MEMBER, 0, Peer::POD, Kept),
        (
            "plaintext from a peer that tunnels now",
            plain,
            MEMBER,
            0,
            READY,
            Old,
        ),
        (
            "plaintext from a peer that is Strict now",
            plain,
            MEMBER,
            0,
            READY | Peer::STRICT,
            Ended,
        ),
        ("plain, denied now", plain, MEMBER, 9, Peer::POD, Ended),
        ("through a tunnel", handed, STRICT, 9, READY, Kept),
        ("from outside, Strict", host, STRICT, 0, Peer::POD, Ended),
    ] {
        let becomes = first(&plan(peer), &pod(flags, set), &[socket, listener]);
        assert_eq!(becomes, expected, "{name}");
    }
}

#[test]
fn tunnels_of_the_agent_are_never_closed_by_policy() {
    let listener = tcp(state::LISTEN, ["0.0.0.0:80", "0.0.0.0:0"], 0);
    for ends in [
        ["10.1.0.1:15008", "10.2.0.1:3333"],
        ["10.1.0.1:3333", "10.2.0.1:15008"],
        [SERVED, CLIENT],
        [OWN, PEER],
    ] {
        let tunnel = tcp(ESTABLISHED, ends, 0);
        let is_tunnel = |socket: &Socket| *socket == tunnel;
        let ask = Ask {
            is_tunnel: &is_tunnel,
            ..NOTHING
        };
        let (ready, strict, how) = (plan(READY), pod(STRICT, 9), (true, true));
        let enrolled = judge(&ready, &strict, &[tunnel, listener], how, ask);
        assert_eq!(becomes(&enrolled, &[tunnel, listener]), Kept, "{ends:?}");
        // The control: an application's connection between the same endpoints. No port makes it a
        // tunnel.
        let application = first(&ready, &strict, &[tunnel, listener]);
        assert_eq!(application, Ended, "{ends:?}");
        assert_eq!(of_the_agent(&strict, &[tunnel], NOTHING.is_tunnel), []);
        assert_eq!(of_the_agent(&strict, &[tunnel], is_tunnel).len(), 1);
        // The same holds while the pod is unenrolled; a pod outside the mesh has no tunnels.
        let outside = pod(0, 9);
        let sockets = [tunnel, listener];
        for (carried, expected) in [(true, Kept), (false, Ended)] {
            let judgement = judge(&ready, &outside, &sockets, (false, carried), ask);
            let becomes = becomes(&judgement, &sockets);
            assert_eq!(becomes, expected, "{ends:?} {carried}");
        }
    }
}

#[test]
fn udp_flow_is_closed_only_if_both_directions_are_denied() {
    let socket = |state| Socket::imagined(Protocol::UDP, state, [OWN, PEER], 0);
    let plan = plan(Peer::POD);
    let connected = socket(ESTABLISHED);
    assert_eq!(first(&plan, &pod(MEMBER, 9), &[connected]), Ended);
    assert_eq!(first(&plan, &pod(MEMBER, 0), &[connected]), Kept);
    let unconnected =
        Socket::imagined(Protocol::UDP, state::CLOSE, ["10.1.0.1:53", "0.0.0.0:0"], 0);
    assert_eq!(first(&plan, &pod(MEMBER, 9), &[unconnected]), Kept);
}

#[test]
fn recorded_direction_takes_precedence_over_listeners() {
    // A set that isolates ingress, one that isolates egress; a port that is listened on, and not.
    let mut plan = bare(Peer::POD);
    for (set, flags) in [
        (1, SetHead::ISOLATED_INGRESS),
        (2, SetHead::ISOLATED_EGRESS),
    ] {
        let head = SetHead {
            flags,
            ..SetHead::default()
        };
        plan.sets.insert(PolicySetId(set), head);
    }
    let plan = Index::new(plan);
    let listener = tcp(state::LISTEN, ["0.0.0.0:80", "0.0.0.0:0"], 0);
    let [ingress, egress] = [1, 2].map(|set| pod(0, set));
    for (ends, listened) in [([SERVED, PEER], true), ([OWN, PEER], false)] {
        for direction in [None, Some(Direction::Ingress), Some(Direction::Egress)] {
            let mut socket = tcp(ESTABLISHED, ends, 0);
            socket.direction = direction;
            let arrived = match direction {
                None => listened,
                Some(direction) => direction == Direction::Ingress,
            };
            let (by_ingress, by_egress) = if arrived {
                (Ended, Kept)
            } else {
                (Kept, Ended)
            };
            let all = [socket, listener];
            assert_eq!(first(&plan, &ingress, &all), by_ingress, "{direction:?}");
            assert_eq!(first(&plan, &egress, &all), by_egress, "{direction:?}");
        }
    }
}

#[test]
fn only_sockets_of_this_node_have_node_evidence() {
    let mut plan = bare(Peer::POD);
    let node = Peer {
        id: IdentityId::HOST,
        ..Peer::default()
    };
    plan.peers.insert(addr("192.0.2.1"), node);
    let plan = Index::new(plan);
    let listener = tcp(state::LISTEN, ["0.0.0.0:80", "0.0.0.0:0"], 0);
    let arrived = tcp(ESTABLISHED, [SERVED, "192.0.2.1:4000"], 0);
    for (gated, own, expected) in [
        (true, true, Kept),
        (true, false, Ended),
        (false, true, Ended),
    ] {
        let ask = Ask {
            is_node_peer: &|socket| own && *socket == arrived,
            ..NOTHING
        };
        let strict = pod(STRICT | if gated { PodState::GATED } else { 0 }, 0);
        let sockets = [arrived, listener];
        let judgement = judge(&plan, &strict, &sockets, (false, true), ask);
        assert_eq!(becomes(&judgement, &sockets), expected, "{gated} {own}");
    }
}
