// SPDX-License-Identifier: Apache-2.0
//! The result of the group `kube`.

use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::objects::ObjectCounts;
use crate::bench::Options;
use crate::bench::config::Machine;
use crate::bench::load::Histogram;

/// A measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Group of the benchmark.
    pub group: String,
    /// Name of the metric.
    pub metric: String,
    /// Unit of `value`.
    pub unit: String,
    /// The measured value.
    pub value: f64,
}

/// The complete result of the group.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    config: Config,
    /// The measured values.
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, Serialize)]
struct Config {
    machine: Machine,
    objects: ObjectCounts,
    /// Duration of the pod changes without connections; `None` means 30.
    seconds: Option<f64>,
    pod_changes_per_second: u32,
    changes_timed: u16,
    enforced: &'static str,
}

impl Report {
    pub(super) fn of(options: &Options, objects: ObjectCounts) -> Result<Self> {
        let config = Config {
            machine: Machine::this()?,
            objects,
            seconds: options.seconds,
            pod_changes_per_second: super::RATE,
            changes_timed: super::CHANGES,
            enforced: "a client in a pod of the node connects every 2 ms and sees the change",
        };
        Ok(Self {
            config,
            rows: Vec::new(),
        })
    }

    pub(super) fn add(&mut self, metric: &str, unit: &str, value: f64) {
        self.rows.push(Row {
            group: "kube".to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            value,
        });
    }

    pub(super) fn latency(&mut self, what: &str, found: &Histogram) {
        for (name, part) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
            let value = found.micros(part) / 1000.0;
            self.add(&format!("{what}_enforced_{name}"), "ms", value);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            writeln!(f, "{:32} {:>10.2} {}", row.metric, row.value, row.unit)?;
        }
        write!(f, "{}; {:?}", self.config.machine, self.config.objects)
    }
}
