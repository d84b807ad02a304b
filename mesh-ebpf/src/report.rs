// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Counters and events. Counters never lose; events are bounded per pod and their loss is counted.

use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use mesh_common::counter::Counter;
use mesh_common::event::{DROPS_PER_POD_SECOND, Event, kind};
use mesh_common::maps::DropRate;
use mesh_common::pod::PodIndex;
use mesh_common::{Direction, Endpoint, Protocol, Reason, Verdict};

use crate::tables::{COUNTERS, DROP_RATE, EVENTS};

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

/// Who is refused what.
pub(crate) struct Refused {
    pub(crate) pod: PodIndex,
    pub(crate) direction: Direction,
    pub(crate) protocol: Protocol,
    pub(crate) local: Endpoint,
    pub(crate) remote: Endpoint,
    pub(crate) service: Endpoint,
    pub(crate) kind: u8,
}

/// Counts a refusal and sends its event, unless the pod has used up its share of this second.
#[inline(never)]
pub(crate) fn refused(who: &Refused, verdict: &Verdict) {
    count(who.direction, verdict);
    let time_ns = now();
    if over_rate(who.pod, time_ns) {
        add(Counter::SuppressedEvents, 1);
        return;
    }
    let Some(mut event) = EVENTS.reserve::<Event>(0) else {
        add(Counter::LostEvents, 1);
        return;
    };
    let _ = event.write(Event {
        time_ns,
        start_ns: time_ns,
        rule: verdict.rule.0,
        sent: 0,
        received: 0,
        local: who.local,
        remote: who.remote,
        service: who.service,
        pod: who.pod.0,
        rtt_us: 0,
        retransmits: 0,
        kind: who.kind,
        direction: who.direction as u8,
        protocol: who.protocol.0,
        reason: verdict.reason as u8,
        clear: Reason::NoPolicy as u8,
        closed_by: 0,
        spare: [0; 10],
    });
    event.submit(BPF_RB_NO_WAKEUP.into());
}

/// The kind of a hook's refusal.
pub(crate) const DENIED: u8 = kind::DENIED;
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
