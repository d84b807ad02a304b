// SPDX-License-Identifier: Apache-2.0
//! The metrics page: encoding of families, and the formats that scrapers read.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet,
};
use prometheus_client::registry::Registry;

use super::describe::Description;

/// Labels of a sample: names and values.
pub type Pairs<'a> = &'a [(&'a str, &'a str)];

/// A family that is being written.
pub struct Family<'a>(pub(super) MetricEncoder<'a>);

impl fmt::Debug for Family<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Family")
    }
}

impl Family<'_> {
    /// Writes a sample of a counter.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn counter(&mut self, labels: Pairs<'_>, value: impl EncodeCounterValue) -> fmt::Result {
        if labels.is_empty() {
            return self.0.encode_counter::<NoLabelSet, _, u64>(&value, None);
        }
        self.0
            .encode_family(&labels)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    /// Writes a sample of a counter, unless it is 0: for large fixed sets of labels.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn counter_unless_0(&mut self, labels: Pairs<'_>, value: u64) -> fmt::Result {
        if value == 0 {
            return Ok(());
        }
        self.counter(labels, value)
    }

    /// Writes a sample of a gauge.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn gauge(&mut self, labels: Pairs<'_>, value: impl EncodeGaugeValue) -> fmt::Result {
        if labels.is_empty() {
            return self.0.encode_gauge(&value);
        }
        self.0.encode_family(&labels)?.encode_gauge(&value)
    }
}

/// Starts a family of the page.
///
/// # Errors
/// When the page cannot be written.
pub fn family<'s>(
    encoder: &'s mut DescriptorEncoder<'_>,
    description: &'s Description,
) -> Result<Family<'s>, fmt::Error> {
    // The library appends `_total` to the names of counters.
    let name = description.name.trim_end_matches("_total");
    let kind = description.kind.metric_type();
    encoder
        .encode_descriptor(name, description.help, None, kind)
        .map(Family)
}

/// Writes a page of metrics.
///
/// # Panics
/// Never: writing to a `String` succeeds.
#[must_use]
pub fn page(collector: impl Collector, format: Format) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(collector));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)
        .expect("a String takes everything");
    match format {
        Format::OpenMetrics => text,
        Format::Prometheus => prometheus(&text),
    }
}

/// The formats of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The Prometheus text format, 0.0.4.
    Prometheus,
}

impl Format {
    /// Chooses the format for an `Accept` header. Prometheus names OpenMetrics first if it can read it.
    #[must_use]
    pub fn negotiate(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// Returns the page's `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Converts a page to the Prometheus text format: descriptions of counters are named as their samples,
/// and there is no end marker.
fn prometheus(open_metrics: &str) -> String {
    let mut counters = std::collections::BTreeSet::new();
    for line in open_metrics.lines() {
        if let Some(name) = line
            .strip_prefix("# TYPE ")
            .and_then(|l| l.strip_suffix(" counter"))
        {
            counters.insert(name);
        }
    }
    let mut text = String::with_capacity(open_metrics.len() + 4096);
    for line in open_metrics.lines() {
        if line == "# EOF" {
            continue;
        }
        let described = line
            .strip_prefix("# HELP ")
            .map(|rest| ("# HELP ", rest))
            .or_else(|| line.strip_prefix("# TYPE ").map(|rest| ("# TYPE ", rest)))
            .and_then(|(word, rest)| rest.split_once(' ').map(|(name, rest)| (word, name, rest)))
            .filter(|(_, name, _)| counters.contains(name));
        match described {
            Some((word, name, rest)) => text.extend([word, name, "_total ", rest]),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}
