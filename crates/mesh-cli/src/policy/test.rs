// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy test`: runs truth tables.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use mesh_api::truth::{Check, Expected, Known, Table};
use mesh_plan::evaluate::{Connection, Verdicts};

use super::table;
use super::world::{World, evidence, number};
use crate::Outcome;
use crate::args::{Evidence, Protocol, Test};

/// Runs every table of every file.
pub(crate) fn run(args: &Test, out: &mut impl Write) -> Result<Outcome> {
    let mut checks = 0;
    let mut wrong = 0;
    let mut invalid = 0;
    for file in &args.files {
        let mut shown = 0;
        for (i, table) in table::read(file)?.iter().enumerate() {
            let name = table
                .name
                .clone()
                .unwrap_or_else(|| format!("table {}", i + 1));
            let place = format!("{}: {name}", file.display());
            let (rows, unusable) = one(table, file, &place, args, out)?;
            checks += table.checks.len();
            wrong += rows.len();
            invalid += unusable;
            for row in rows.iter().take(args.show.saturating_sub(shown)) {
                write!(out, "{row}")?;
            }
            shown += rows.len();
        }
        if shown > args.show {
            writeln!(out, "{}: {} more", file.display(), shown - args.show)?;
        }
    }
    match invalid {
        0 => writeln!(out, "{checks} checks, {wrong} wrong")?,
        _ => writeln!(out, "{checks} checks, {wrong} wrong, {invalid} invalid")?,
    }
    ensure!(checks > 0, "no checks found");
    ensure!(invalid == 0, "{invalid} invalid checks");
    Ok(if wrong == 0 {
        Outcome::Good
    } else {
        Outcome::Bad
    })
}

/// The failed checks of a table, and the number of invalid ones.
fn one(
    table: &Table,
    file: &Path,
    place: &str,
    args: &Test,
    out: &mut impl Write,
) -> Result<(Vec<String>, usize)> {
    let objects = table::objects(table, file).with_context(|| place.to_owned())?;
    let world = World::imagined(objects);
    if !args.quiet {
        for note in &world.notes {
            writeln!(io::stderr(), "{place}: {note}")?;
        }
    }
    let mut wrong = Vec::new();
    let mut invalid = 0;
    for (i, check) in table.checks.iter().enumerate() {
        let row = || format!("{place}: check {}", i + 1);
        match difference(&world, check) {
            Ok(Some(text)) => wrong.push(format!("{}: {text}", row())),
            Err(error) => {
                invalid += 1;
                writeln!(io::stderr(), "{}: {error:#}", row())?;
            }
            Ok(None) if !args.all => {}
            Ok(None) => {
                let name = check.name.as_deref().unwrap_or("-");
                let said = [check.expect, check.expect_ingress, check.expect_egress];
                let said = said.into_iter().flatten().next().map_or("", Expected::word);
                writeln!(out, "holds: {}: {name}: {said}", row())?;
            }
        }
    }
    Ok((wrong, invalid))
}

/// The difference between a check and the decision, in lines; `None` = the check passes.
fn difference(world: &World, check: &Check) -> Result<Option<String>> {
    let (from, to) = (world.party(&check.from)?, world.party(&check.to)?);
    let protocol = Protocol::from(check.protocol);
    let port = World::port(to, protocol, &check.port)?;
    let connection = world.connection(from, to, (number(protocol), port))?;
    // Only a tunnel carries a certificate, and only TCP is tunneled.
    ensure!(
        check.evidence != Known::Tls || protocol == Protocol::Tcp || connection.on_one_node(),
        "evidence: tls: {protocol} from another node is not tunneled: its peer is known by address only"
    );
    let verdicts = world
        .evaluator
        .verdicts(&connection, evidence(Evidence::from(check.evidence)));
    let got = |verdict: Option<mesh_common::verdict::Verdict>| {
        Expected::of(verdict.is_none_or(|verdict| verdict.allowed))
    };
    let rows = [
        ("", check.expect, Expected::of(verdicts.allowed())),
        ("ingress ", check.expect_ingress, got(verdicts.ingress)),
        ("egress ", check.expect_egress, got(verdicts.egress)),
    ];
    if rows.iter().all(|(_, expected, _)| expected.is_none()) {
        anyhow::bail!("needs expect, expectIngress or expectEgress");
    }
    let wrong: Vec<_> = rows
        .iter()
        .filter_map(|(what, expected, got)| {
            let expected = (*expected)?;
            (expected != *got)
                .then(|| format!("expected {what}{}, got {}", expected.word(), got.word()))
        })
        .collect();
    if wrong.is_empty() {
        return Ok(None);
    }
    let title = check
        .name
        .as_ref()
        .map(|name| format!("{name}: "))
        .unwrap_or_default();
    let head = format!(
        "{title}{} -> {} {protocol} {} by {}: {}\n",
        check.from,
        check.to,
        check.port,
        check.evidence.word(),
        wrong.join("; ")
    );
    Ok(Some(head + &reasons(world, &connection, &verdicts)))
}

fn reasons(world: &World, connection: &Connection<'_>, verdicts: &Verdicts) -> String {
    let mut text = String::new();
    for (direction, pod, verdict) in [
        ("egress", connection.from, &verdicts.egress),
        ("ingress", connection.to, &verdicts.ingress),
    ] {
        let words = match verdict {
            Some(verdict) => world.words(pod, verdict),
            None => "no policy is evaluated there".to_owned(),
        };
        text += &format!("    {direction}: {words}\n");
    }
    if let Some(reason) = verdicts.refused {
        text += &format!("    refused regardless of policy ({})\n", reason.label());
    }
    text
}
