// SPDX-License-Identifier: Apache-2.0
//! `mesh-agent check`: tries what the agent needs of this machine, and says what each missing
//! thing means.
//!
//! Everything is really done, in places of its own that are removed again: a network namespace
//! without a name, an empty cgroup, a directory of pins. No traffic of the machine is touched, and
//! an agent that runs is not disturbed.

use std::fmt;

use crate::Host;

mod kernel;
mod probes;
mod scratch;

/// What one probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is there; details.
    Present(String),
    /// It is missing; why.
    Missing(String),
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked for.
    pub what: &'static str,
    /// Whether the agent does not work without it.
    pub needed: bool,
    /// What was found.
    pub outcome: Outcome,
    /// What it means if it is missing.
    pub meaning: &'static str,
}

/// Everything that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(pub Vec<Finding>);

/// Exit code: a feature of the kernel that is needed is missing (`EX_UNAVAILABLE`, sysexits.h).
const UNAVAILABLE: u8 = 69;

impl Report {
    /// 0, or 69 if something needed is missing.
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
            0 => writeln!(f, "This machine can run the agent."),
            _ => writeln!(f, "This machine cannot run the agent: see MISSING above."),
        }
    }
}

/// Probes this machine. Blocks for some seconds at most; must not be called in a runtime's thread.
#[must_use]
pub fn run(config: &Host) -> Report {
    let mut findings = probes::machine(config);
    findings.extend(probes::sockets());
    findings.extend(kernel::programs(config));
    Report(findings)
}

#[cfg(test)]
mod tests;
