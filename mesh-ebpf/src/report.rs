// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Counters and events. Counters never lose; events are bounded per pod and their loss is counted.

use core::ptr;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use mesh_common::counter::Counter;
use mesh_common::event::{DROPS_PER_POD_SECOND, Event, kind};
use mesh_common::maps::DropRate;
use mesh_common::path::Path;
use mesh_common::pod::PodIndex;
use mesh_common::{Direction, Endpoint, Protocol, Reason, Verdict};

use crate::tables::{COUNTERS, DROP_RATE, EVENTS};

/// Which hook has decided, in the log.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Hook {
    Connect = 0,
    Sendmsg = 1,
    Inbound = 2,
    Accepted = 3,
    GateFromPod = 4,
    GateToPod = 5,
}

/// Logs what a hook decided, through aya-log. Nothing without the feature `trace`.
#[inline(always)]
pub(crate) fn trace(hook: Hook, pod: PodIndex, with: &Endpoint, path: &Path) {
    #[cfg(feature = "trace")]
    let _ = mesh_trace(hook as u32, pod.0, with, path);
    #[cfg(not(feature = "trace"))]
    let _ = (hook as u32, pod, with, path);
}

/// Whether decisions are logged; the loader decides.
#[cfg(feature = "trace")]
#[unsafe(no_mangle)]
static TRACING: u32 = 0;

/// [`trace`] as a global function (see `decision`).
#[cfg(feature = "trace")]
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_trace(hook: u32, pod: u32, with: *const Endpoint, path: *const Path) -> u64 {
    use mesh_common::path::Outbound;
    // SAFETY: a value that the loader has set, and that the compiler may not know.
    if unsafe { core::ptr::read_volatile(&raw const TRACING) } == 0 {
        return 0;
    }
    // SAFETY: null, or of these types: the verifier holds callers to it.
    let (Some(with), Some(path)) = (unsafe { (with.as_ref(), path.as_ref()) }) else {
        return 1;
    };
    let action = match path.action {
        Outbound::Direct => 0u8,
        Outbound::Tunnel => 1,
        Outbound::Refuse => 2,
    };
    aya_log_ebpf::info!(
        &(),
        "hook {} pod {} with {:i} port {}: action {} reason {} rule {:x}",
        hook,
        pod,
        with.addr.octets(),
        with.port.get(),
        action,
        path.verdict.reason as u8,
        path.verdict.rule.0
    );
    0
}

/// Adds to a counter.
#[inline(always)]
pub(crate) fn add(counter: Counter, amount: u64) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter.index()) {
        // SAFETY: this CPU's own element.
        unsafe { *value += amount };
    }
}

/// Counts a verdict.
#[inline(always)]
pub(crate) fn count(direction: Direction, verdict: &Verdict) {
    add(
        Counter::Verdict(direction, verdict.allowed, verdict.reason),
        1,
    );
}

/// Now, CLOCK_MONOTONIC.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Who is refused what: packed, as a global function has five arguments at most.
#[derive(Clone, Copy)]
pub(crate) struct Refused(u64);

impl Refused {
    /// `kind` is one of [`mesh_common::event::kind`].
    #[inline(always)]
    pub(crate) fn new(pod: PodIndex, direction: Direction, protocol: Protocol, kind: u8) -> Self {
        let what = u64::from(kind) << 16 | (direction as u64) << 8 | u64::from(protocol.0);
        Self(what << 32 | u64::from(pod.0))
    }

    #[inline(always)]
    fn pod(self) -> PodIndex {
        PodIndex(self.0 as u32)
    }

    #[inline(always)]
    fn protocol(self) -> u8 {
        (self.0 >> 32) as u8
    }

    #[inline(always)]
    fn direction(self) -> u8 {
        (self.0 >> 40) as u8
    }

    #[inline(always)]
    fn kind(self) -> u8 {
        (self.0 >> 48) as u8
    }
}

/// Counts a refusal and sends its event, unless the pod has used up its share of this second.
#[inline(always)]
pub(crate) fn refused(
    who: Refused,
    local: Option<&Endpoint>,
    remote: Option<&Endpoint>,
    service: Option<&Endpoint>,
    verdict: &Verdict,
) {
    // Not a reference to a constant: the verifier wants what it passes on to be writable.
    let pointer = |at: Option<&Endpoint>| at.map_or(ptr::null(), ptr::from_ref);
    let _ = mesh_report(
        who.0,
        pointer(local),
        pointer(remote),
        pointer(service),
        verdict,
    );
}

/// [`refused`] as a global function (see `decision`).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_report(
    who: u64,
    local: *const Endpoint,
    remote: *const Endpoint,
    service: *const Endpoint,
    verdict: *const Verdict,
) -> u64 {
    // SAFETY: null, or of this type: the verifier holds callers to it.
    let Some(verdict) = (unsafe { verdict.as_ref() }) else {
        return 1;
    };
    let who = Refused(who);
    let direction = match who.direction() {
        0 => Direction::Ingress,
        _ => Direction::Egress,
    };
    // What is audited has passed, and was counted as such.
    if who.kind() != AUDIT {
        count(direction, verdict);
    }
    let time_ns = now();
    if over_rate(who.pod(), time_ns) {
        add(Counter::SuppressedEvents, 1);
        return 1;
    }
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        add(Counter::LostEvents, 1);
        return 0;
    };
    // Field by field: a whole event would first be built on the stack.
    let event = entry.as_mut_ptr();
    // SAFETY: reserved memory of this type; every field is written.
    unsafe {
        (*event).time_ns = time_ns;
        (*event).start_ns = time_ns;
        (*event).rule = verdict.rule.0;
        (*event).sent = 0;
        (*event).received = 0;
        (*event).local = or_none(local);
        (*event).remote = or_none(remote);
        (*event).service = or_none(service);
        (*event).pod = who.pod().0;
        (*event).rtt_us = 0;
        (*event).retransmits = 0;
        (*event).kind = who.kind();
        (*event).direction = who.direction();
        (*event).protocol = who.protocol();
        (*event).reason = verdict.reason as u8;
        (*event).clear = Reason::NoPolicy as u8;
        (*event).closed_by = 0;
        (*event).spare = 0;
        (*event).spare_end = 0;
    }
    entry.submit(BPF_RB_NO_WAKEUP.into());
    0
}

#[inline(always)]
fn or_none(at: *const Endpoint) -> Endpoint {
    // SAFETY: null or valid.
    unsafe { at.as_ref() }.copied().unwrap_or(Endpoint::NONE)
}

/// The kind of a hook's refusal.
pub(crate) const DENIED: u8 = kind::DENIED;
/// The kind of what passed, and policies in audit mode would have refused.
pub(crate) const AUDIT: u8 = kind::AUDIT;
/// The kind of a drop at the gate.
pub(crate) const DROPPED: u8 = kind::DROPPED;

/// Whether a pod has used up its events of this second. Two CPUs may count past each other: the
/// bound is against floods, not exact.
#[inline(always)]
fn over_rate(pod: PodIndex, time_ns: u64) -> bool {
    let second = time_ns / 1_000_000_000;
    let Some(rate) = DROP_RATE.get_ptr_mut(pod) else {
        let _ = DROP_RATE.insert(pod, DropRate { second, count: 1 }, 0);
        return false;
    };
    // SAFETY: the element lives until the program ends.
    let rate = unsafe { &mut *rate };
    if rate.second != second {
        rate.second = second;
        rate.count = 0;
    }
    rate.count += 1;
    rate.count > u64::from(DROPS_PER_POD_SECOND)
}
