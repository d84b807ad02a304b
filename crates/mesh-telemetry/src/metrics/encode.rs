// SPDX-License-Identifier: Apache-2.0
//! Encoding of the agent's metrics. Counters that are 0 and belong to a large fixed set are left out.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use mesh_common::counter::Counter;
use mesh_common::{Direction, Reason};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};

use super::describe::{self, Description};
use super::exposition;
use super::exposition::family;
use super::process::process;
use super::{Metrics, Role, Totals};
use crate::record::{Close, ClosedBy, Reporter};

/// The page of the agent.
#[derive(Debug)]
pub(super) struct Page(pub(super) Metrics);

/// A counter of a row.
type Column = fn(&Totals) -> u64;

/// The labels of a service account.
fn account((namespace, name): &(String, String)) -> [(&'static str, &str); 2] {
    [("namespace", namespace), ("service_account", name)]
}

fn load(number: &AtomicU64) -> u64 {
    number.load(Relaxed)
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        self.connections(encoder)?;
        self.failures(encoder)?;
        self.retries(encoder)?;
        let mut silent = family(encoder, describe::SILENT)?;
        for (result, count) in ["held", "limit"].iter().zip(&self.0.0.silent) {
            silent.counter(&[("result", result)], load(count))?;
        }
        self.verdicts(encoder)?;
        self.audit(encoder)?;
        self.handshakes(encoder)?;
        let mut violations = family(encoder, describe::VIOLATIONS)?;
        for role in Role::ALL {
            let count = &self.0.0.violations[role as usize];
            violations.counter(&[("role", role.label())], load(count))?;
        }
        family(encoder, describe::MARKS_LOST)?.counter(&[], load(&self.0.0.marks_lost))?;
        self.usage(encoder)?;
        self.certificates(encoder)?;
        self.maps(encoder)?;
        self.state(encoder)?;
        self.losses(encoder)?;
        family(encoder, describe::BUILD)?.gauge(&[("version", env!("CARGO_PKG_VERSION"))], 1u64)?;
        process(encoder)
    }
}

impl Page {
    fn connections(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rows = self.0.connections(Instant::now());
        let columns: [(&'static Description, Column); 4] = [
            (describe::OPENED, |totals| totals.opened),
            (describe::CLOSED, |totals| totals.closed),
            (describe::SENT, |totals| totals.sent),
            (describe::RECEIVED, |totals| totals.received),
        ];
        for (description, value) in columns {
            let mut family = family(encoder, description)?;
            for (labels, totals) in &rows {
                family.counter(&labels.pairs(), value(totals))?;
            }
        }
        let kept = rows.len() as u64;
        family(encoder, describe::SERIES)?.gauge(&[], kept)?;
        let overflowed = self.0.0.connections.overflowed();
        family(encoder, describe::SERIES_OVERFLOWED)?.counter(&[], overflowed)
    }

    fn failures(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = family(encoder, describe::FAILED)?;
        let failures = Reason::ALL
            .iter()
            .map(|reason| Close::Failed(*reason))
            .chain([Close::Reset(ClosedBy::Reset), Close::Aborted]);
        for (index, close) in failures.enumerate() {
            for reporter in Reporter::ALL {
                let labels = [("reporter", reporter.label()), ("reason", close.label())];
                let count = load(&self.0.0.failures[reporter as usize][index]);
                family.counter_unless_0(&labels, count)?;
            }
        }
        Ok(())
    }

    fn verdicts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kernel = self.0.0.kernel.get();
        let mut verdicts = family(encoder, describe::VERDICTS)?;
        for counter in Counter::all() {
            let Counter::Verdict {
                direction,
                allowed,
                reason,
            } = counter
            else {
                continue;
            };
            let by_agent = load(&self.0.0.verdicts[counter.index() as usize]);
            let by_kernel = kernel.map_or(0, |kernel| kernel.counter(counter));
            for (by, count) in [("agent", by_agent), ("kernel", by_kernel)] {
                let labels = [
                    ("direction", Direction::label(direction)),
                    ("verdict", if allowed { "allowed" } else { "denied" }),
                    ("reason", reason.label()),
                    ("decided_by", by),
                ];
                verdicts.counter_unless_0(&labels, count)?;
            }
        }
        let mut unencrypted = family(encoder, describe::UNENCRYPTED)?;
        for reason in Reason::ALL {
            let bytes = kernel.map_or(0, |k| k.counter(Counter::UnencryptedBytes(*reason)));
            unencrypted.counter_unless_0(&[("reason", reason.label())], bytes)?;
        }
        Ok(())
    }

    fn retries(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = family(encoder, describe::RETRIED)?;
        for (reason, count) in Reason::ALL.iter().zip(&self.0.0.retried) {
            family.counter_unless_0(&[("reason", reason.label())], load(count))?;
        }
        Ok(())
    }

    fn audit(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = family(encoder, describe::AUDIT)?;
        for ((direction, rule, reason), count) in self.0.0.audit.snapshot() {
            let labels = [
                ("direction", Direction::label(direction)),
                ("rule", rule.as_str()),
                ("reason", reason.label()),
            ];
            family.counter(&labels, count)?;
        }
        Ok(())
    }

    fn handshakes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let failures = self.0.0.handshake_failures.lock();
        let failures = failures.unwrap_or_else(PoisonError::into_inner).clone();
        let mut family = family(encoder, describe::HANDSHAKES)?;
        for role in Role::ALL {
            let ok = [("role", role.label()), ("result", "ok")];
            family.counter(&ok, load(&self.0.0.handshakes[role as usize]))?;
            for ((of, failure), count) in &failures {
                if *of == role {
                    let labels = [("role", role.label()), ("result", *failure)];
                    family.counter(&labels, *count)?;
                }
            }
        }
        Ok(())
    }

    fn usage(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.0.0.usage.all();
        let labels = |key: &(String, String)| {
            let (namespace, workload) = key.clone();
            [("namespace", namespace), ("workload", workload)]
        };
        let mut seconds = family(encoder, describe::WORKER_SECONDS)?;
        for (key, usage) in &all {
            let labels = labels(key);
            let labels = labels
                .each_ref()
                .map(|(name, value)| (*name, value.as_str()));
            seconds.counter(&labels, usage.seconds())?;
        }
        let mut buffers = family(encoder, describe::BUFFER_BYTES)?;
        for (key, usage) in &all {
            let labels = labels(key);
            let labels = labels
                .each_ref()
                .map(|(name, value)| (*name, value.as_str()));
            buffers.gauge(&labels, usage.buffers())?;
        }
        Ok(())
    }

    fn certificates(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.0.0.certificates.lock();
        let all = all.unwrap_or_else(PoisonError::into_inner).clone();
        let mut family = family(encoder, describe::EXPIRY)?;
        for (whose, in_use) in &all {
            family.gauge(&account(whose), in_use.expires)?;
        }
        let mut family = exposition::family(encoder, describe::REVOKED)?;
        for (whose, in_use) in &all {
            family.gauge(&account(whose), u64::from(in_use.revoked))?;
        }
        let lists = self.0.0.crls.lock();
        let lists = lists.unwrap_or_else(PoisonError::into_inner).clone();
        let mut family = exposition::family(encoder, describe::CRL_NEXT_UPDATE)?;
        for (file, at) in &lists {
            family.gauge(&[("file", file)], *at)?;
        }
        let behind = load(&self.0.0.clock_skew);
        exposition::family(encoder, describe::CLOCK_SKEW)?.gauge(&[], behind)
    }

    fn maps(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let usage = self.0.0.kernel.get().map(|kernel| kernel.map_usage());
        let usage = usage.unwrap_or_default();
        let mut entries = family(encoder, describe::MAP_ENTRIES)?;
        for (map, count, _) in &usage {
            entries.gauge(&[("map", map)], *count)?;
        }
        let mut capacity = family(encoder, describe::MAP_CAPACITY)?;
        for (map, _, most) in &usage {
            capacity.gauge(&[("map", map)], *most)?;
        }
        Ok(())
    }

    fn state(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let inner = &self.0.0;
        let apply = family(encoder, describe::PLAN_APPLY)?;
        inner.plan_apply.encode(apply.0)?;
        family(encoder, describe::REVISION)?.gauge(&[], load(&inner.revision))?;
        family(encoder, describe::STALE)?.gauge(&[], load(&inner.stale))?;
        family(encoder, describe::REJECTED)?.gauge(&[], load(&inner.rejected))?;
        let pods = *inner.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let mut family_of_pods = family(encoder, describe::PODS)?;
        for (state, count) in [
            ("enrolled", pods.enrolled),
            ("not_enrolled", pods.not_enrolled),
            ("not_protected", pods.not_protected),
            ("isolated", pods.isolated),
        ] {
            family_of_pods.gauge(&[("state", state)], count)?;
        }
        let mut conditions = family(encoder, describe::READY)?;
        for (condition, holds) in inner.readiness.conditions() {
            conditions.gauge(&[("condition", condition)], u64::from(holds))?;
        }
        Ok(())
    }

    fn losses(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kernel = |counter| self.0.0.kernel.get().map_or(0, |k| k.counter(counter));
        let mut lost = family(encoder, describe::LOST)?;
        lost.counter(&[("at", "flow_log")], load(&self.0.0.lost))?;
        lost.counter(&[("at", "kernel")], kernel(Counter::LostEvents))?;
        family(encoder, describe::SUPPRESSED)?.counter(&[], kernel(Counter::SuppressedEvents))?;
        family(encoder, describe::PANICS)?.counter(&[], load(&self.0.0.panics))
    }
}
