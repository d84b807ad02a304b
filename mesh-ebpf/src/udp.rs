// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! UDP flows: replies to what was allowed pass, within a bound for each pod.

use mesh_common::counter::Counter;
use mesh_common::flow::{FLOW_WAYS, FLOWS_PER_POD, Flow, FlowSlot, FlowTuple};
use mesh_common::path::{Outbound, Path};
use mesh_common::pod::PodIndex;
use mesh_common::{Endpoint, Port};

use crate::decision::{self, Ask, UNDECIDED};
use crate::report::{add, now};
use crate::tables::{self, FLOWS};

/// The flow of a pod's port with another end.
#[inline(always)]
fn tuple(remote: &Endpoint, local_port: Port) -> FlowTuple {
    FlowTuple {
        remote: *remote,
        local_port,
        family6: u8::from(!remote.addr.is_v4()),
        pad: 0,
    }
}

/// Which way a datagram goes.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    /// From the pod.
    FromPod,
    /// To the pod.
    ToPod,
    /// Only looked up: an ICMP error looks for its socket as a datagram does, and is no answer.
    LookUp,
}

impl Way {
    #[inline(always)]
    fn flag(self) -> u32 {
        match self {
            Self::FromPod => Flow::FROM_POD,
            Self::ToPod => Flow::TO_POD,
            Self::LookUp => 0,
        }
    }
}

#[inline(always)]
fn slot(pod: PodIndex, tuple: &FlowTuple, way: u32) -> FlowSlot {
    FlowSlot {
        pod: pod.0,
        slot: (tuple.slot() + way) & (FLOWS_PER_POD - 1),
    }
}

/// Whether the datagram belongs to a live flow that the present facts allow; if so the flow lives
/// on, and `bytes` are added to it.
///
/// After a change of facts it is decided again as what it was opened as, whichever way the datagram
/// goes: what the change does not concern goes on, replies too, and what it refuses is no flow any
/// more. `room` is what the caller would ask if there is no such flow, undecided, and stays so then:
/// there is no stack for a second decision.
#[inline(always)]
pub(crate) fn refresh(
    local_port: Port,
    way: Way,
    bytes: u64,
    (ask, path): (&mut Ask, &mut Path),
) -> bool {
    let ports = u32::from(local_port.0) << 16 | way.flag();
    let answer = mesh_flow_refresh(ask.pod.0, &ask.remote, ports, bytes);
    if answer & STALE == 0 {
        return answer == LIVE;
    }
    let flags = answer as u32;
    let facts = if flags & Flow::EGRESS != 0 {
        decision::outbound(ask, path)
    } else {
        let (origin, port) = (ask.origin, ask.local_port);
        (ask.origin, ask.local_port) = (Flow::origin(flags), local_port);
        let facts = decision::inbound(ask, path);
        (ask.origin, ask.local_port) = (origin, port);
        facts
    };
    if matches!(path.action, Outbound::Refuse) {
        let _ = mesh_flow_end(ask.pod.0, &ask.remote, ports);
        *path = UNDECIDED;
        return false;
    }
    keep(ask, (local_port, flags), (path, facts));
    mesh_flow_refresh(ask.pod.0, &ask.remote, ports, bytes) == LIVE
}

const NONE: u64 = 0;
const LIVE: u64 = 1;
/// Allowed under facts that have changed; its flags are below.
const STALE: u64 = 1 << 32;

/// The live flow of a tuple, and where it is.
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

/// [`refresh`] but for the decision, as a global function (see `decision`). `ports` has the pod's
/// port above, the flag of the way below.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_refresh(pod: u32, remote: *const Endpoint, ports: u32, bytes: u64) -> u64 {
    // SAFETY: null, or of this type: the verifier holds callers to it.
    let Some(remote) = (unsafe { remote.as_ref() }) else {
        return NONE;
    };
    let time_ns = now();
    let tuple = tuple(remote, Port((ports >> 16) as u16));
    let Some((_, flow)) = find(PodIndex(pod), &tuple, time_ns) else {
        return NONE;
    };
    if flow.facts != tables::facts() {
        return STALE | u64::from(flow.flags);
    }
    flow.last_ns = time_ns;
    flow.flags |= ports & 0xffff;
    if bytes > 0 {
        flow.bytes += bytes;
        add(Counter::UnencryptedBytes(flow.clear_reason()), bytes);
    }
    LIVE
}

/// Ends a flow that is refused now.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_end(pod: u32, remote: *const Endpoint, ports: u32) -> u64 {
    // SAFETY: null, or of this type: the verifier holds callers to it.
    let Some(remote) = (unsafe { remote.as_ref() }) else {
        return NONE;
    };
    let tuple = tuple(remote, Port((ports >> 16) as u16));
    let Some((at, _)) = find(PodIndex(pod), &tuple, now()) else {
        return NONE;
    };
    u64::from(FLOWS.remove(at).is_ok())
}

/// Opens a flow that was just allowed, by a decision with its revision of facts: in a free slot, or
/// in place of the oldest of its ways. If the table is full, the next datagram is decided again.
#[inline(always)]
pub(crate) fn open(ask: &Ask, local_port: Port, way: Way, decided: (&Path, u64)) {
    let flags = match way {
        Way::FromPod => Flow::FROM_POD | Flow::EGRESS,
        Way::ToPod | Way::LookUp => Flow::TO_POD | Flow::from_origin(ask.origin),
    };
    keep(ask, (local_port, flags), decided);
}

#[inline(always)]
fn keep(ask: &Ask, (local_port, flags): (Port, u32), (path, facts): (&Path, u64)) {
    let flags = u64::from(flags) << 32 | u64::from(local_port.0) << 16 | path.clear as u64;
    let _ = mesh_flow_keep(ask.pod.0, &ask.remote, path.verdict.rule.0, flags, facts);
}

/// [`keep`] as a global function (see `decision`); `flags` has the flow's flags above, then the
/// pod's port, and the reason why it is in clear below.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_keep(
    pod: u32,
    remote: *const Endpoint,
    rule: u64,
    flags: u64,
    facts: u64,
) -> u64 {
    // SAFETY: null, or of this type: the verifier holds callers to it.
    let Some(remote) = (unsafe { remote.as_ref() }) else {
        return NONE;
    };
    let pod = PodIndex(pod);
    let tuple = tuple(remote, Port((flags >> 16) as u16));
    let mut best = slot(pod, &tuple, 0);
    let mut oldest = u64::MAX;
    for way in 0..FLOW_WAYS {
        let candidate = slot(pod, &tuple, way);
        let age = match FLOWS.get_ptr(candidate) {
            None => 0,
            // SAFETY: the element lives until the program ends.
            Some(flow) if unsafe { (*flow).tuple == tuple } => {
                best = candidate;
                break;
            }
            // SAFETY: as above.
            Some(flow) => unsafe { (*flow).last_ns },
        };
        if age < oldest {
            oldest = age;
            best = candidate;
        }
    }
    let flow = Flow {
        facts,
        last_ns: now(),
        bytes: 0,
        rule,
        tuple,
        flags: (flags >> 32) as u32,
        clear: (flags & 0xffff) as u32,
    };
    u64::from(FLOWS.insert(best, flow, 0).is_ok())
}
