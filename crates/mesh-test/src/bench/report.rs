// SPDX-License-Identifier: Apache-2.0
//! The result of the datapath groups: rows for programs, a table for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Scenario;
use super::config::Config;
use super::datapath::Metric;
use super::measure::{Cpu, Sample};

/// Two consecutive runs, one without and one with agents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The run without agents.
    pub plain: Sample,
    /// The run with agents.
    pub mesh: Sample,
}

/// All rounds of one metric in one scenario.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) scenario: Scenario,
    pub(super) metric: &'static Metric,
    pub(super) pairs: Vec<Pair>,
}

impl Series {
    pub(super) fn new(scenario: Scenario, metric: &'static Metric) -> Self {
        let pairs = Vec::new();
        Self {
            scenario,
            metric,
            pairs,
        }
    }

    fn median(&self, of: impl Fn(&Pair) -> f64) -> f64 {
        median(self.pairs.iter().map(of).collect())
    }

    /// Formats one run as a line of text.
    pub(super) fn line(&self, pair: &Pair) -> String {
        let value = |sample| self.metric.value(sample);
        format!(
            "{:10} {:6} {:>10.2} plain {:>10.2} mesh {:6} ratio {:.3}, others used {:.0} % and {:.0} %",
            self.scenario.name(),
            self.metric.name,
            value(&pair.plain),
            value(&pair.mesh),
            self.metric.unit(),
            self.metric.ratio(pair),
            pair.plain.foreign * 100.0,
            pair.mesh.foreign * 100.0,
        )
    }

    fn row(&self, group: &str) -> Row {
        let metric = self.metric;
        let ratios: Vec<f64> = self.pairs.iter().map(|pair| metric.ratio(pair)).collect();
        let latency = |of: fn(&Sample) -> f64| {
            let latency = self.median(|pair| of(&pair.mesh));
            (latency > 0.0).then_some(latency)
        };
        let cost = |of: &dyn Fn(&Pair) -> (f64, f64)| {
            self.median(|pair| {
                let (seconds, units) = of(pair);
                seconds * metric.cost_of().0 / units
            })
        };
        Row {
            group: group.to_owned(),
            scenario: self.scenario,
            metric: metric.name.to_owned(),
            unit: metric.unit().to_owned(),
            plain: self.median(|pair| metric.value(&pair.plain)),
            mesh: self.median(|pair| metric.value(&pair.mesh)),
            ratio: median(ratios.clone()),
            ratio_min: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            ratio_max: ratios.iter().copied().fold(0.0, f64::max),
            p50_us: latency(|sample| sample.p50_us),
            p99_us: latency(|sample| sample.p99_us),
            cpu_s_per_unit: cost(&|pair| (pair.mesh.agents.total(), pair.mesh.units)),
            rounds: self.pairs.len(),
        }
    }

    fn details(&self) -> Details {
        let per_unit = |cpu: Cpu, units: f64| {
            let part = self.metric.cost_of().0 / units;
            Cpu {
                user: cpu.user * part,
                system: cpu.system * part,
            }
        };
        let cpu = |of: &dyn Fn(&Pair) -> Cpu| Cpu {
            user: self.median(|pair| of(pair).user),
            system: self.median(|pair| of(pair).system),
        };
        Details {
            scenario: self.scenario,
            metric: self.metric.name.to_owned(),
            unit_of_cost: self.metric.cost_of().1.to_owned(),
            plain_p50_us: self.median(|pair| pair.plain.p50_us),
            plain_p99_us: self.median(|pair| pair.plain.p99_us),
            plain_lab: cpu(&|pair| per_unit(pair.plain.lab, pair.plain.units)),
            mesh_lab: cpu(&|pair| per_unit(pair.mesh.lab, pair.mesh.units)),
            agents: cpu(&|pair| per_unit(pair.mesh.agents, pair.mesh.units)),
            foreign: self.median(|pair| pair.plain.foreign.max(pair.mesh.foreign)),
            rounds: self.pairs.clone(),
        }
    }
}

/// Returns the median: the mean of the middle two for an even number, 0 for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.get(middle) {
        None => 0.0,
        Some(upper) if values.len() % 2 == 1 => *upper,
        Some(upper) => f64::midpoint(values[middle - 1], *upper),
    }
}

/// Medians of one metric in one scenario over all rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Group of the benchmark.
    pub group: String,
    /// Placement of client and server.
    pub scenario: Scenario,
    /// Name of the metric.
    pub metric: String,
    /// Unit of `plain` and `mesh`.
    pub unit: String,
    /// Value without the mesh.
    pub plain: f64,
    /// Value with the mesh.
    pub mesh: f64,
    /// Median of the rounds' ratios: mesh to plain for throughput, plain to mesh for time.
    pub ratio: f64,
    /// Smallest ratio of a round.
    pub ratio_min: f64,
    /// Largest ratio of a round.
    pub ratio_max: f64,
    /// Median latency with the mesh in microseconds, from request (crr: connect) to response.
    pub p50_us: Option<f64>,
    /// 99th percentile of the latency with the mesh in microseconds.
    pub p99_us: Option<f64>,
    /// CPU seconds of all agents per 1 GB (10^9 bytes), 10,000 requests or 10,000 connections.
    pub cpu_s_per_unit: f64,
    /// Number of rounds.
    pub rounds: usize,
}

/// CPU seconds per 1 GB, 10,000 requests or 10,000 connections, as medians, and all rounds.
#[derive(Clone, Debug, Serialize)]
struct Details {
    scenario: Scenario,
    metric: String,
    unit_of_cost: String,
    plain_p50_us: f64,
    plain_p99_us: f64,
    /// CPU time of the whole lab without agents, i.e. of the applications.
    plain_lab: Cpu,
    /// CPU time of the whole lab with agents.
    mesh_lab: Cpu,
    /// CPU time of the agents.
    agents: Cpu,
    /// Share of the machine that processes outside the lab used, 0 to 1.
    foreign: f64,
    rounds: Vec<Pair>,
}

/// The complete result of the benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    config: Config,
    /// One row for each metric and scenario.
    pub rows: Vec<Row>,
    details: Vec<Details>,
}

impl Report {
    pub(super) fn new(group: &str, config: Config, series: &[Series]) -> Self {
        Self {
            config,
            rows: series.iter().map(|series| series.row(group)).collect(),
            details: series.iter().map(Series::details).collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:10} {:6} {:6} {:>10} {:>10}  {:>5} {:13}  {:>15} {:>15}",
            "scenario",
            "metric",
            "unit",
            "plain",
            "mesh",
            "ratio",
            "(min to max)",
            "p50/p99 plain",
            "p50/p99 mesh us"
        )?;
        for (row, details) in self.rows.iter().zip(&self.details) {
            let latency = |p50: f64, p99: f64| format!("{p50:.0}/{p99:.0}");
            writeln!(
                f,
                "{:10} {:6} {:6} {:>10.1} {:>10.1}  {:.3} ({:.3} to {:.3}) {:>15} {:>15}",
                row.scenario.name(),
                row.metric,
                row.unit,
                row.plain,
                row.mesh,
                row.ratio,
                row.ratio_min,
                row.ratio_max,
                latency(details.plain_p50_us, details.plain_p99_us),
                latency(row.p50_us.unwrap_or(0.0), row.p99_us.unwrap_or(0.0)),
            )?;
        }
        writeln!(
            f,
            "\nCPU seconds per GB, 10,000 requests or 10,000 connections, user + system:\n\
             {:10} {:6} {:>6}  {:>15} {:>15} {:>15}  {:>13}",
            "scenario", "metric", "per", "plain, all", "mesh, all", "of it agents", "others' share"
        )?;
        for details in &self.details {
            let cpu = |cpu: Cpu| format!("{:.3} + {:.3}", cpu.user, cpu.system);
            writeln!(
                f,
                "{:10} {:6} {:>6}  {:>15} {:>15} {:>15}  {:>11.0} %",
                details.scenario.name(),
                details.metric,
                details.unit_of_cost,
                cpu(details.plain_lab),
                cpu(details.mesh_lab),
                cpu(details.agents),
                details.foreign * 100.0,
            )?;
        }
        write!(f, "\n{}", self.config.rss())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::datapath::METRICS;

    #[test]
    fn median_of_odd_and_even_counts() {
        for (values, expected) in [
            (vec![], "0"),
            (vec![3.0], "3"),
            (vec![5.0, 1.0], "3"),
            (vec![9.0, 1.0, 2.0], "2"),
        ] {
            assert_eq!(median(values).to_string(), expected);
        }
    }

    fn sample(units: f64, p50_us: f64, agents: f64) -> Sample {
        Sample {
            units,
            seconds: 2.0,
            p50_us,
            p99_us: p50_us * 2.0,
            agents: Cpu {
                user: agents / 4.0,
                system: agents * 3.0 / 4.0,
            },
            ..Sample::default()
        }
    }

    fn row(metric: &str, pairs: &[(Sample, Sample)]) -> Row {
        let metric = METRICS.iter().find(|m| m.name == metric).expect("a metric");
        let mut series = Series::new(Scenario::CrossNode, metric);
        let pairs = pairs.iter().map(|(plain, mesh)| (*plain, *mesh));
        series.pairs = pairs.map(|(plain, mesh)| Pair { plain, mesh }).collect();
        series.row("datapath")
    }

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found}, not {expected}");
    }

    #[test]
    fn ratio_compares_mesh_to_plain_and_cost_is_agent_cpu() {
        let row = row(
            "bulk_1",
            &[
                (sample(4e9, 0.0, 0.0), sample(1e9, 0.0, 0.5)),
                (sample(4e9, 0.0, 0.0), sample(2e9, 0.0, 2.0)),
                (sample(8e9, 0.0, 0.0), sample(6e9, 0.0, 1.2)),
            ],
        );
        near(row.plain, 16.0);
        near(row.mesh, 8.0);
        near(row.ratio, 0.5);
        near(row.ratio_min, 0.25);
        near(row.ratio_max, 0.75);
        near(row.cpu_s_per_unit, 0.5);
        assert_eq!((row.p50_us, row.rounds), (None, 3));
    }

    #[test]
    fn pinned_requests_are_compared_by_duration() {
        let row = row("rr_1", &[(sample(1e5, 50.0, 0.0), sample(1e4, 100.0, 0.5))]);
        near(row.ratio, 0.5);
        near(row.plain, 50.0);
        near(row.p99_us.expect("a latency"), 200.0);
        near(row.cpu_s_per_unit, 0.5);
    }
}
