// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! UDP flows: replies to what was allowed pass, within a bound for each pod.

use mesh_common::counter::Counter;
use mesh_common::flow::{FLOW_WAYS, FLOWS_PER_POD, Flow, FlowSlot, FlowTuple};
use mesh_common::path::Path;
use mesh_common::pod::PodIndex;
use mesh_common::policy::PolicySetId;
use mesh_common::{Endpoint, Port};

use crate::report::{add, now};
use crate::tables::{self, FLOWS};

/// The flow of a pod's port with another end.
#[inline(always)]
pub(crate) fn tuple(remote: &Endpoint, local_port: Port) -> FlowTuple {
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

/// Whether the datagram belongs to a live flow that was allowed under the pod's present policy; if
/// so the flow lives on, and `bytes` are added to it.
#[inline(always)]
pub(crate) fn refresh(pod: PodIndex, tuple: &FlowTuple, way: Way, bytes: u64) -> bool {
    mesh_flow_refresh(pod.0, tuple, way.flag(), bytes) == LIVE
}

const LIVE: u64 = 1;
const NONE: u64 = 0;

/// [`refresh`] as a global function (see `decision`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_refresh(pod: u32, tuple: *const FlowTuple, way: u32, bytes: u64) -> u64 {
    // SAFETY: null, or of this type: the verifier holds callers to it.
    let Some(tuple) = (unsafe { tuple.as_ref() }) else {
        return NONE;
    };
    let pod = PodIndex(pod);
    let Some(state) = tables::pod(pod) else {
        return NONE;
    };
    let set = state.view.set;
    let time_ns = now();
    for i in 0..FLOW_WAYS {
        let Some(flow) = FLOWS.get_ptr_mut(slot(pod, tuple, i)) else {
            continue;
        };
        // SAFETY: the element lives until the program ends.
        let flow = unsafe { &mut *flow };
        if flow.tuple != *tuple {
            continue;
        }
        if PolicySetId(flow.set) != set || !flow.alive(time_ns) {
            return NONE;
        }
        flow.last_ns = time_ns;
        flow.flags |= way;
        if bytes > 0 {
            flow.bytes += bytes;
            add(Counter::UnencryptedBytes(flow.clear_reason()), bytes);
        }
        return LIVE;
    }
    NONE
}

/// Opens a flow that was just allowed: in a free slot, or in place of the oldest of its ways. If
/// the table is full, the next datagram is decided again.
#[inline(always)]
pub(crate) fn open(pod: PodIndex, tuple: &FlowTuple, way: Way, path: &Path) {
    let flags = match way {
        Way::FromPod => Flow::FROM_POD | Flow::EGRESS,
        Way::ToPod | Way::LookUp => Flow::TO_POD,
    };
    let flags = u64::from(flags) << 32 | path.clear as u64;
    let _ = mesh_flow_open(pod.0, tuple, path.verdict.rule.0, flags);
}

/// [`open`] as a global function (see `decision`); `flags` has the flow's flags above, the reason
/// why it is in clear below.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_flow_open(pod: u32, tuple: *const FlowTuple, rule: u64, flags: u64) -> u64 {
    // SAFETY: null, or of this type: the verifier holds callers to it.
    let Some(tuple) = (unsafe { tuple.as_ref() }) else {
        return NONE;
    };
    let pod = PodIndex(pod);
    let Some(state) = tables::pod(pod) else {
        return NONE;
    };
    let mut best = slot(pod, tuple, 0);
    let mut oldest = u64::MAX;
    for way in 0..FLOW_WAYS {
        let candidate = slot(pod, tuple, way);
        let age = match FLOWS.get_ptr(candidate) {
            None => 0,
            // SAFETY: the element lives until the program ends.
            Some(flow) if unsafe { (*flow).tuple == *tuple } => {
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
        set: state.view.set.0,
        last_ns: now(),
        bytes: 0,
        rule,
        tuple: *tuple,
        flags: (flags >> 32) as u32,
        clear: flags as u32,
    };
    u64::from(FLOWS.insert(best, flow, 0).is_ok())
}
