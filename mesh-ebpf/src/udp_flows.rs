// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The UDP flow table: replies to allowed datagrams pass. Each pod has a fixed number of flows.

use mesh_common::counter::Counter;
use mesh_common::flow::{FLOW_WAYS, FLOWS_PER_POD, Flow, FlowSlot, FlowTuple};
use mesh_common::pod::PodIndex;
use mesh_common::{Direction, Endpoint, Port};

use crate::decision::{self, Ask, Decision};
use crate::report::{add, now};
use crate::tables::{self, FLOWS};

/// The traffic by which a flow is looked up.
#[derive(Clone, Copy)]
pub(crate) enum Seen {
    /// A datagram from the pod.
    FromPod,
    /// A datagram to the pod.
    ToPod,
    /// No datagram that is known to be one: a socket look-up can be for an ICMP error as well.
    LookUp,
}

impl Seen {
    #[inline(always)]
    fn flag(self) -> u32 {
        match self {
            Self::FromPod => Flow::FROM_POD,
            Self::ToPod => Flow::TO_POD,
            Self::LookUp => 0,
        }
    }
}

/// Returns whether the traffic of `ask` belongs to a live flow that the current config allows. If so,
/// the flow's idle time starts again, and `bytes` are added to it.
///
/// After a change of config the flow is decided again, in the direction in which it was opened,
/// whichever direction this datagram has. So a change that does not concern the flow leaves it and its
/// replies alone, and a change that denies it ends it. `decision` is working memory, because the stack
/// has no room for a second one: it is [`Decision::UNDECIDED`] before, and also after `false`.
#[inline(always)]
pub(crate) fn refresh(ask: &mut Ask, decision: &mut Decision, seen: Seen, bytes: u64) -> bool {
    let mut flags = 0;
    match mesh_flow_refresh(ask, seen.flag(), bytes, &mut flags) {
        LIVE => return true,
        STALE => {}
        _ => return false,
    }
    if flags & Flow::EGRESS != 0 {
        decision::outbound(ask, decision);
    } else {
        let origin = ask.origin;
        ask.origin = Flow::origin(flags);
        decision::inbound(ask, decision);
        ask.origin = origin;
    }
    if decision.refuses() {
        let _ = mesh_flow_remove(ask);
        *decision = Decision::UNDECIDED;
        return false;
    }
    let _ = mesh_flow_insert(ask, decision, flags);
    mesh_flow_refresh(ask, seen.flag(), bytes, &mut flags) == LIVE
}

/// Inserts the flow of a datagram that `decision` allows, in a free slot or in place of the oldest flow of
/// its slots. If the table is full, the next datagram is decided again.
#[inline(always)]
pub(crate) fn open(ask: &Ask, decision: &Decision, direction: Direction) {
    let flags = match direction {
        Direction::Egress => Flow::FROM_POD | Flow::EGRESS,
        Direction::Ingress => Flow::TO_POD | Flow::from_origin(ask.origin),
    };
    let _ = mesh_flow_insert(ask, decision, flags);
}

/// The return value of a look-up without a live flow.
const NONE: u64 = 0;
/// The return value of a look-up that refreshed a live flow.
const LIVE: u64 = 1;
/// The return value of a look-up that found a live flow of another config generation.
const STALE: u64 = 2;

/// Returns the tuple of the flow of a pod's port with a peer.
#[inline(always)]
fn tuple(remote: &Endpoint, local_port: Port) -> FlowTuple {
    FlowTuple {
        remote: *remote,
        local_port,
        family6: u8::from(!remote.addr.is_v4()),
        pad: 0,
    }
}

/// Returns one of the slots of a tuple; `way` is below [`FLOW_WAYS`].
#[inline(always)]
fn slot(pod: PodIndex, tuple: &FlowTuple, way: u32) -> FlowSlot {
    FlowSlot {
        pod: pod.0,
        slot: (tuple.slot() + way) & (FLOWS_PER_POD - 1),
    }
}

/// Returns the live flow of a tuple and its slot.
#[inline(always)]
fn find(pod: PodIndex, tuple: &FlowTuple, time_ns: u64) -> Option<(FlowSlot, &'static mut Flow)> {
    for way in 0..FLOW_WAYS {
        let at = slot(pod, tuple, way);
        let Some(flow) = FLOWS.get_ptr_mut(at) else {
            continue;
        };
        // SAFETY: the element lives until the program ends.
        let flow = unsafe { &mut *flow };
        if flow.tuple == *tuple {
            return flow.alive(time_ns).then_some((at, flow));
        }
    }
    None
}

/// Refreshes the flow of an ask, or writes the flags of a stale flow to `flags`. A global function, see
/// `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_refresh(ask: *const Ask, seen: u32, bytes: u64, flags: *mut u32) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(ask), Some(flags)) = (unsafe { (ask.as_ref(), flags.as_mut()) }) else {
        return NONE;
    };
    let time_ns = now();
    let tuple = tuple(&ask.remote, ask.local_port);
    let Some((_, flow)) = find(ask.pod, &tuple, time_ns) else {
        return NONE;
    };
    if flow.generation != tables::config_generation() {
        *flags = flow.flags;
        return STALE;
    }
    flow.last_ns = time_ns;
    flow.flags |= seen;
    if bytes > 0 {
        flow.bytes += bytes;
        add(Counter::UnencryptedBytes(flow.plaintext_reason()), bytes);
    }
    LIVE
}

/// Removes the flow of an ask. A global function, see `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_remove(ask: *const Ask) -> u64 {
    // SAFETY: null, or of this type: the verifier checks it at each call.
    let Some(ask) = (unsafe { ask.as_ref() }) else {
        return NONE;
    };
    let tuple = tuple(&ask.remote, ask.local_port);
    let Some((at, _)) = find(ask.pod, &tuple, now()) else {
        return NONE;
    };
    u64::from(FLOWS.remove(at).is_ok())
}

/// Inserts or replaces the flow of an ask. A global function, see `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_insert(ask: *const Ask, decision: *const Decision, flags: u32) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(ask), Some(decision)) = (unsafe { (ask.as_ref(), decision.as_ref()) }) else {
        return NONE;
    };
    let tuple = tuple(&ask.remote, ask.local_port);
    let mut best = slot(ask.pod, &tuple, 0);
    let mut oldest = u64::MAX;
    for way in 0..FLOW_WAYS {
        let candidate = slot(ask.pod, &tuple, way);
        let last_ns = match FLOWS.get_ptr(candidate) {
            None => 0,
            // SAFETY: the element lives until the program ends.
            Some(flow) if unsafe { (*flow).tuple == tuple } => {
                best = candidate;
                break;
            }
            // SAFETY: as above.
            Some(flow) => unsafe { (*flow).last_ns },
        };
        if last_ns < oldest {
            oldest = last_ns;
            best = candidate;
        }
    }
    let flow = Flow {
        generation: decision.generation,
        last_ns: now(),
        bytes: 0,
        rule: decision.path.verdict.rule.0,
        tuple,
        flags,
        plaintext: decision.path.clear as u32,
    };
    u64::from(FLOWS.insert(best, flow, 0).is_ok())
}
