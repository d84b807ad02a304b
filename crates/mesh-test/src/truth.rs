// SPDX-License-Identifier: Apache-2.0
//! Truth tables over real connections: runs the files of `meshctl policy test` with a namespace for
//! each pod, an agent on each node, and a client and a server for every row.
//!
//! Every connection is first tried without agents and must succeed, so that a later refusal is the
//! mesh's. Rows that cannot run in a lab are reported and never count as correct.

pub mod attempt;
mod cluster;
mod rows;
mod testbed;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_api::manifests::Format;
use mesh_api::truth::{Expected, Table, tables};

use self::cluster::TableCluster;
use self::rows::{Row, Run, What};
use self::testbed::Testbed;
use crate::lab::Lab;
use crate::mesh::Mesh;

/// Attempts before a connection counts as refused: the machine may be busy, and datagrams can be
/// lost.
const TRIES: u32 = 3;
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(300);

impl AsRef<Self> for Lab {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl AsRef<Lab> for Mesh {
    fn as_ref(&self) -> &Lab {
        self
    }
}

/// Result of a table.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Number of rows.
    pub checks: usize,
    /// Number of rows with the expected result.
    pub right: usize,
    /// Rows with another result, as text.
    pub differ: Vec<String>,
    /// Rows that cannot be run, with the reason.
    pub not_run: Vec<String>,
    /// Warnings and rejections of the manifests.
    pub notes: Vec<String>,
    /// Duration of the run.
    pub took: Duration,
}

/// Reads the tables of a file.
///
/// # Errors
/// The file cannot be read or parsed.
pub fn read(file: &Path) -> Result<Vec<Table>> {
    let shown = || file.display().to_string();
    let format = file.to_str().and_then(Format::of);
    let format = format.with_context(|| format!("{}: .yaml, .yml or .json", shown()))?;
    let text = std::fs::read_to_string(file).with_context(shown)?;
    tables(&text, format).with_context(shown)
}

/// Runs a table; relative paths in it start at `file`'s directory. With `mtls`, every namespace is
/// enrolled, unless the table has its own enrollment labels; without it, none is.
///
/// # Errors
/// The table is invalid (as for `meshctl policy test`), or its lab cannot be created.
pub fn run(table: &Table, file: &Path, mtls: bool) -> Result<Report> {
    let begun = Instant::now();
    let cluster = TableCluster::of(table, file, mtls)?;
    let rows = rows::rows(&cluster, &table.checks)?;
    let runs: Vec<&Run> = rows.iter().filter_map(Row::run).collect();
    let mut report = Report {
        checks: rows.len(),
        notes: cluster.notes.clone(),
        ..Report::default()
    };
    if !runs.is_empty() {
        let lab = Testbed::build(&cluster, &runs)?;
        let without = lab.try_all(&runs)?;
        for (row, run) in rows
            .iter()
            .filter_map(|row| row.run().map(|run| (row, run)))
        {
            let tried = &without[&run.attempt.id];
            if tried.answer.is_none() || !lab.is_right(run, tried) {
                report.differ.push(format!(
                    "{}: does not come about even without the mesh: {tried:?}",
                    row.title
                ));
            }
        }
        // A connection that fails without the mesh says nothing about the mesh.
        if report.differ.is_empty() {
            judge(&lab.start()?, &rows, &mut report)?;
        }
    }
    for row in &rows {
        if let What::Leave(why) = &row.what {
            report.not_run.push(format!("{}: {why}", row.title));
        }
    }
    report.took = begun.elapsed();
    Ok(report)
}

/// Tries the rows with agents.
fn judge(testbed: &Testbed<Mesh>, rows: &[Row], report: &mut Report) -> Result<()> {
    let runs: Vec<&Run> = rows.iter().filter_map(Row::run).collect();
    let mut results = testbed.try_all(&runs)?;
    for _ in 1..TRIES {
        let answered = |run: &&Run| results[&run.attempt.id].answer.is_some();
        let missing = |run: &&Run| run.expected == Expected::Allow && !answered(run);
        if !runs.iter().any(missing) {
            break;
        }
        std::thread::sleep(PAUSE);
        // Retry refused connections, which may have been too early.
        let again: Vec<&Run> = runs.iter().copied().filter(|run| !answered(run)).collect();
        results.extend(testbed.try_all(&again)?);
    }
    for row in rows {
        let Some(run) = row.run() else { continue };
        let tried = &results[&run.attempt.id];
        let got = tried.allowed().map(Expected::of);
        if got.as_ref() == Ok(&run.expected) && testbed.is_right(run, tried) {
            report.right += 1;
            continue;
        }
        let got = match got {
            Ok(got) => got.word().to_owned(),
            Err(error) => format!("neither: {error}"),
        };
        let mut text = format!("{}: expected {}, got {got}", row.title, run.expected.word());
        if let Some(error) = &tried.error {
            text += &format!(" ({error})");
        }
        if let Some(seen) = &tried.answer {
            text += &format!(" (answered: {seen})");
        }
        report
            .differ
            .push(format!("{text}\n    compiler: {}", row.compiler));
    }
    Ok(())
}
