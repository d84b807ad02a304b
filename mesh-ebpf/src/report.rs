// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Counters and events. No count is lost; events are limited per pod, and lost ones are counted.

use core::ptr;

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use mesh_common::counter::Counter;
use mesh_common::event::{DROPS_PER_POD_SECOND, Event, kind};
use mesh_common::maps::DropRate;
use mesh_common::path::Path;
use mesh_common::pod::PodIndex;
use mesh_common::{Direction, Endpoint, Protocol, Reason, Verdict};

use crate::decision::Ask;
use crate::tables::{COUNTERS, DROP_RATE, EVENTS};

/// The hook of a logged decision.
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

/// Logs a hook's decision through aya-log. Does nothing without the feature `trace`.
#[inline(always)]
pub(crate) fn trace(hook: Hook, ask: &Ask, path: &Path) {
    #[cfg(feature = "trace")]
    let _ = mesh_trace(hook as u32, ask, path);
    #[cfg(not(feature = "trace"))]
    let _ = (hook as u32, ask, path);
}

/// The loader's switch of the log: 0 = decisions are not logged.
#[cfg(feature = "trace")]
#[unsafe(no_mangle)]
static TRACING: u32 = 0;

/// Logs a decision. A global function, see `decision`.
#[cfg(feature = "trace")]
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_trace(hook: u32, ask: *const Ask, path: *const Path) -> u64 {
    use mesh_common::path::Outbound;
    // SAFETY: a value that the loader sets: the compiler must not assume 0.
    if unsafe { core::ptr::read_volatile(&raw const TRACING) } == 0 {
        return 0;
    }
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(ask), Some(path)) = (unsafe { (ask.as_ref(), path.as_ref()) }) else {
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
        ask.pod.0,
        ask.remote.addr.octets(),
        ask.remote.port.get(),
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
    let counter = Counter::Verdict {
        direction,
        allowed: verdict.allowed,
        reason: verdict.reason,
    };
    add(counter, 1);
}

/// Returns the time, in nanoseconds of CLOCK_MONOTONIC.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// The subject of a denied, dropped or audit event.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Subject {
    /// The pod.
    pod: PodIndex,
    /// The IP protocol.
    protocol: Protocol,
    /// The direction, seen from the pod.
    direction: Direction,
    /// One of [`mesh_common::event::kind`].
    kind: u8,
    /// Always 0.
    pad: u8,
}

impl Subject {
    /// Makes a subject; `kind` is one of [`mesh_common::event::kind`].
    #[inline(always)]
    pub(crate) fn new(pod: PodIndex, direction: Direction, protocol: Protocol, kind: u8) -> Self {
        Self {
            pod,
            protocol,
            direction,
            kind,
            pad: 0,
        }
    }
}

/// Counts a denial and sends its event, unless the pod used up its events of this second.
#[inline(always)]
pub(crate) fn refused(
    subject: &Subject,
    local: Option<&Endpoint>,
    remote: Option<&Endpoint>,
    service: Option<&Endpoint>,
    verdict: &Verdict,
) {
    // Null for none, not a reference to a constant: the verifier requires writable memory.
    let pointer = |at: Option<&Endpoint>| at.map_or(ptr::null(), ptr::from_ref);
    let _ = mesh_report(
        subject,
        pointer(local),
        pointer(remote),
        pointer(service),
        verdict,
    );
}

/// Counts and reports a denial. A global function, see `decision`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_report(
    subject: *const Subject,
    local: *const Endpoint,
    remote: *const Endpoint,
    service: *const Endpoint,
    verdict: *const Verdict,
) -> u64 {
    // SAFETY: null, or of these types: the verifier checks it at each call.
    let (Some(subject), Some(verdict)) = (unsafe { (subject.as_ref(), verdict.as_ref()) }) else {
        return 1;
    };
    // Audited traffic was allowed, and counted as such.
    if subject.kind != AUDIT {
        count(subject.direction, verdict);
    }
    let time_ns = now();
    if over_rate(subject.pod, time_ns) {
        add(Counter::SuppressedEvents, 1);
        return 1;
    }
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        add(Counter::LostEvents, 1);
        return 0;
    };
    // Written field by field: a whole event would first be built on the stack.
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
        (*event).pod = subject.pod.0;
        (*event).rtt_us = 0;
        (*event).retransmits = 0;
        (*event).kind = subject.kind;
        (*event).direction = subject.direction as u8;
        (*event).protocol = subject.protocol.0;
        (*event).reason = verdict.reason as u8;
        (*event).plaintext = Reason::NoPolicy as u8;
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

/// The event kind of a socket hook's denial.
pub(crate) const DENIED: u8 = kind::DENIED;
/// The event kind of allowed traffic that policies in audit mode would deny.
pub(crate) const AUDIT: u8 = kind::AUDIT;
/// The event kind of a drop at the gate.
pub(crate) const DROPPED: u8 = kind::DROPPED;

/// Counts an event of a pod and returns whether the pod used up its events of this second. CPUs can lose
/// counts of each other: the limit is against floods and need not be exact.
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
