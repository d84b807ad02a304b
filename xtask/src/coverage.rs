// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test policy --coverage`: what the truth tables prove, clause by clause.
//!
//! For every clause: rows that must come about, rows that must not, and a mutation of the compiler
//! or the decision that its rows catch. The mutations are data, in `xtask/mutations`; all of them are
//! built into one `meshctl`, in a copy of the crates it is made of, and switched on one at a time.

mod mutation;
mod scratch;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZero,
    panic,
    path::PathBuf,
    process::{Command, ExitCode},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::run;

/// The directory of the truth tables.
const TABLES: &str = "crates/mesh-test/truth";

/// The rows and mutations found for a clause.
#[derive(Default)]
struct Clause {
    allow: usize,
    deny: usize,
    caught: Vec<String>,
    /// The truth tables that have rows of the clause.
    tables: BTreeSet<PathBuf>,
}

/// Runs the tables against every mutation; exit code 1 if a clause lacks something.
pub(crate) fn run() -> Result<ExitCode> {
    let mutations = mutation::read()?;
    let meshctl = run::timed("mutations", || scratch::build(&mutations))?;
    let tables = tables()?;
    let mut clauses = unchanged(&meshctl, &tables)?;
    let numbered: Vec<_> = mutations.iter().zip(1..).collect();
    let caught = each(&numbered, |(mutation, number)| {
        let known = mutation.clauses.iter().filter_map(|it| clauses.get(it));
        let tables: BTreeSet<&PathBuf> = known.flat_map(|clause| &clause.tables).collect();
        let tables: Vec<PathBuf> = tables.into_iter().cloned().collect();
        failing(&meshctl, &tables, *number)
    });
    let mut missed = Vec::new();
    for (mutation, failing) in mutations.iter().zip(caught) {
        let failing = failing.with_context(|| format!("mutation {}", mutation.name))?;
        for clause in &mutation.clauses {
            match clauses.get_mut(clause) {
                None => missed.push(format!("{}: there is no clause {clause}", mutation.name)),
                Some(_) if !failing.contains(clause) => {
                    missed.push(format!("{}: {clause} does not catch it", mutation.name));
                }
                Some(known) => known.caught.push(mutation.name.clone()),
            }
        }
    }
    Ok(report(&clauses, &missed, mutations.len()))
}

fn tables() -> Result<Vec<PathBuf>> {
    let dir = run::root().join(TABLES);
    let entries = dir
        .read_dir()
        .with_context(|| format!("cannot read {}", dir.display()))?;
    let mut tables: Vec<PathBuf> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    tables.sort();
    Ok(tables)
}

fn meshctl(program: &PathBuf, tables: &[PathBuf], mutation: u32, options: &[&str]) -> Command {
    let mut command = run::command(program);
    command
        .args(["policy", "test", "--quiet"])
        .args(options)
        .args(tables)
        .env("MESH_MUTATION", mutation.to_string());
    command
}

/// The clauses, with their rows; every row must hold.
fn unchanged(program: &PathBuf, tables: &[PathBuf]) -> Result<BTreeMap<String, Clause>> {
    let mut clauses: BTreeMap<String, Clause> = BTreeMap::new();
    for table in tables {
        let one = std::slice::from_ref(table);
        let said = run::capture(&mut meshctl(program, one, 0, &["--all"]))?;
        for line in said.lines().filter(|line| line.starts_with("holds: ")) {
            let mut parts = line.rsplit(": ");
            let (Some(verdict), Some(name)) = (parts.next(), parts.next()) else {
                bail!("not a row: {line}");
            };
            let clause = clauses.entry(name.to_owned()).or_default();
            clause.tables.insert(table.clone());
            match verdict {
                "allow" => clause.allow += 1,
                "deny" => clause.deny += 1,
                _ => bail!("a row that expects nothing: {line}"),
            }
        }
    }
    ensure!(!clauses.is_empty(), "there are no rows in {TABLES}");
    Ok(clauses)
}

/// Does something for each, as many at a time as there are processors; in their order.
fn each<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = all.get(index) else {
                return done;
            };
            done.push((index, work(item)));
        }
    };
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let mut done: Vec<(usize, R)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Vec<(usize, R)>>| {
            thread
                .join()
                .unwrap_or_else(|cause| panic::resume_unwind(cause))
        };
        threads.into_iter().flat_map(join).collect()
    });
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The clauses of which a row of these tables fails under a mutation.
fn failing(program: &PathBuf, tables: &[PathBuf], number: u32) -> Result<BTreeSet<String>> {
    if tables.is_empty() {
        return Ok(BTreeSet::new());
    }
    let output = run::output(&mut meshctl(
        program,
        tables,
        number,
        &["--show", "1000000"],
    ))?;
    let said = String::from_utf8_lossy(&output.stdout);
    // A mutation that breaks the program proves nothing about the rows.
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let name = |line: &str| -> Option<String> {
        let (_, row) = line.split_once(": check ")?;
        Some(row.split(": ").nth(1)?.to_owned())
    };
    let rows = said.lines().filter(|line| !line.starts_with(' '));
    Ok(rows.filter_map(name).collect())
}

fn report(clauses: &BTreeMap<String, Clause>, missed: &[String], mutations: usize) -> ExitCode {
    let width = clauses.keys().map(String::len).max().unwrap_or(0);
    println!(
        "{:width$}  allow  deny  caught mutations of compile and decide",
        "clause"
    );
    for (name, clause) in clauses {
        let caught = match clause.caught.as_slice() {
            [] => "none".to_owned(),
            caught => caught.join(", "),
        };
        println!(
            "{name:width$}  {:5}  {:4}  {caught}",
            clause.allow, clause.deny
        );
    }
    for line in missed {
        println!("missed: {line}");
    }
    let count = |has: fn(&Clause) -> bool| clauses.values().filter(|clause| has(clause)).count();
    let allow = count(|clause| clause.allow > 0);
    let deny = count(|clause| clause.deny > 0);
    let caught = count(|clause| !clause.caught.is_empty());
    println!(
        "{} clauses: {allow} with a case that must pass, {deny} with one that must not, {caught} \
         that catch a mutation; {mutations} mutations, {} missed",
        clauses.len(),
        missed.len()
    );
    let complete = [allow, deny, caught] == [clauses.len(); 3] && missed.is_empty();
    if complete {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
