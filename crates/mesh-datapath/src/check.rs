// SPDX-License-Identifier: Apache-2.0
//! `mesh-agent check`: tests the features of this node that the agent needs, and explains the effect of each
//! missing feature.
//!
//! Each test uses the feature in a temporary network namespace, cgroup and pin directory. It affects neither the
//! node's traffic nor a running agent.

use std::fmt;

use crate::Host;

mod kernel;
mod probes;
mod scratch;

/// The result of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The feature is present, with details.
    Present(String),
    /// The feature is missing, with the cause.
    Missing(String),
}

/// A row of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The name of the feature.
    pub what: &'static str,
    /// Whether the agent requires the feature.
    pub needed: bool,
    /// The result.
    pub outcome: Outcome,
    /// The effect if the feature is missing.
    pub meaning: &'static str,
}

/// The results of all tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(pub Vec<Finding>);

/// The exit code if a required feature is missing (`EX_UNAVAILABLE`, sysexits.h).
const UNAVAILABLE: u8 = 69;

impl Report {
    /// Returns 0, or 69 if a required feature is missing.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let fatal =
            |finding: &Finding| finding.needed && matches!(finding.outcome, Outcome::Missing(_));
        if self.0.iter().any(fatal) {
            UNAVAILABLE
        } else {
            0
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|one| one.what.len()).max().unwrap_or(0);
        for finding in &self.0 {
            let (state, detail) = match &finding.outcome {
                Outcome::Present(detail) => ("ok", detail),
                Outcome::Missing(why) if finding.needed => ("MISSING", why),
                Outcome::Missing(why) => ("absent", why),
            };
            writeln!(f, "{state:8} {:width$}  {detail}", finding.what)?;
            if matches!(finding.outcome, Outcome::Missing(_)) {
                writeln!(f, "{:8} {:width$}  -> {}", "", "", finding.meaning)?;
            }
        }
        match self.exit_code() {
            0 => writeln!(f, "This node can run the agent."),
            _ => writeln!(f, "This node cannot run the agent: see MISSING above."),
        }
    }
}

/// Tests this node. Blocks for a few seconds: do not call it on a thread of an async runtime.
#[must_use]
pub fn run(config: &Host) -> Report {
    let mut findings = probes::machine(config);
    findings.extend(probes::sockets());
    findings.extend(kernel::programs(config));
    Report(findings)
}

#[cfg(test)]
mod tests;
