// SPDX-License-Identifier: Apache-2.0
//! The group `datapath`: bulk transfers, requests on long-lived connections and short-lived
//! connections, on one node and across nodes, alternately plain and meshed.

use anyhow::{Context, Result, ensure};

use super::config;
use super::load::Shape;
use super::measure::{Orders, Sample};
use super::report::{Pair, Report, Series};
use super::testbed::{Side, Testbed};
use super::{Group, Options, Scenario};

/// Default duration of a run in seconds.
const SECONDS: f64 = 10.0;
/// Default duration of a crr run in seconds: more than half of TIME_WAIT (60 s).
const SHORT_SECONDS: f64 = 31.0;

/// A metric of the datapath benchmark.
#[derive(Debug)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    group: Group,
    shape: Shape,
    workers: u16,
    /// Binds client and server to one CPU each; the result is the median latency, not the rate.
    pub(super) pinned: bool,
}

pub(super) const METRICS: [Metric; 6] = [
    metric("bulk_1", Group::Bulk, Shape::Bulk, 1),
    metric("bulk_4", Group::Bulk, Shape::Bulk, 4),
    Metric {
        pinned: true,
        ..metric("rr_1", Group::Rr, Shape::Rr, 1)
    },
    metric("rr_16", Group::Rr, Shape::Rr, 16),
    metric("crr_1", Group::Crr, Shape::Crr, 1),
    metric("crr_16", Group::Crr, Shape::Crr, 16),
];

const fn metric(name: &'static str, group: Group, shape: Shape, workers: u16) -> Metric {
    Metric {
        name,
        group,
        shape,
        workers,
        pinned: false,
    }
}

impl Metric {
    pub(super) fn unit(&self) -> &'static str {
        match self.shape {
            Shape::Bulk => "Gbit/s",
            Shape::Rr if self.pinned => "us",
            Shape::Rr | Shape::Crr | Shape::Touch => "1/s",
        }
    }

    /// Returns the amount of work to which CPU seconds refer, as a number and a unit.
    pub(super) fn cost_of(&self) -> (f64, &'static str) {
        match self.shape {
            Shape::Bulk => (1e9, "GB"),
            Shape::Rr | Shape::Crr | Shape::Touch => (1e4, "10,000"),
        }
    }

    /// Returns the sample's value for this metric: a rate, or a latency if pinned.
    pub(super) fn value(&self, sample: &Sample) -> f64 {
        match self.shape {
            Shape::Bulk => sample.units * 8.0 / 1e9 / sample.seconds,
            Shape::Rr if self.pinned => sample.p50_us,
            Shape::Rr | Shape::Crr | Shape::Touch => sample.units / sample.seconds,
        }
    }

    /// Returns mesh to plain for throughput, plain to mesh for time: 1 means no cost.
    pub(super) fn ratio(&self, pair: &Pair) -> f64 {
        let (plain, mesh) = (self.value(&pair.plain), self.value(&pair.mesh));
        if self.pinned {
            plain / mesh
        } else {
            mesh / plain
        }
    }

    fn orders(&self, options: &Options) -> Orders {
        let default = match self.shape {
            Shape::Crr => SHORT_SECONDS,
            Shape::Bulk | Shape::Rr | Shape::Touch => SECONDS,
        };
        Orders {
            shape: self.shape,
            workers: self.workers,
            seconds: options.seconds.unwrap_or(default),
            cpus: self.pinned.then_some((0, 1)),
            ahead: options.ahead,
        }
    }
}

fn wanted(options: &Options) -> Result<Vec<(Scenario, &'static Metric)>> {
    let asked = |metric: &&Metric| {
        let group =
            matches!(options.group, Group::All | Group::Datapath) || options.group == metric.group;
        let named = options.metric.is_empty() || options.metric.iter().any(|m| m == metric.name);
        group && named
    };
    let metrics: Vec<&Metric> = METRICS.iter().filter(asked).collect();
    let scenarios = Scenario::ALL
        .into_iter()
        .filter(|scenario| options.scenario.is_none_or(|asked| asked == *scenario));
    let all: Vec<_> = scenarios
        .flat_map(|scenario| metrics.iter().map(move |metric| (scenario, *metric)))
        .collect();
    ensure!(
        !all.is_empty(),
        "no such metric in this group: {:?}",
        options.metric
    );
    Ok(all)
}

/// Runs the selected metrics of the group.
pub(super) fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let wanted = wanted(options)?;
    let testbed = Testbed::start(options, say)?;
    let mut config = config::Config::of(options, &testbed)?;
    say(&config.to_string());
    let mut series: Vec<Series> = wanted
        .iter()
        .map(|(scenario, metric)| Series::new(*scenario, metric))
        .collect();
    for round in 0..options.rounds {
        for series in &mut series {
            let (metric, scenario) = (series.metric, series.scenario);
            let orders = metric.orders(options);
            let sample = |side: &Side| {
                let sample = orders.sample(side, scenario);
                sample.with_context(|| format!("{} {}", scenario.name(), metric.name))
            };
            // Alternate the order, so that a drift during a round does not favor one side.
            let pair = if round.is_multiple_of(2) {
                let plain = sample(&testbed.plain)?;
                let mesh = sample(&testbed.mesh)?;
                Pair { plain, mesh }
            } else {
                let mesh = sample(&testbed.mesh)?;
                let plain = sample(&testbed.plain)?;
                Pair { plain, mesh }
            };
            series.pairs.push(pair);
            let line = series.line(&pair);
            if options.verbose {
                say(&format!("round {} {line}", round + 1));
            }
        }
        say(&format!("round {} of {} done", round + 1, options.rounds));
    }
    config.finish(&testbed)?;
    Ok(Report::new("datapath", config, &series))
}
