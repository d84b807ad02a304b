// SPDX-License-Identifier: Apache-2.0
//! Mutations as data, and what they make of a source file.

use std::{collections::BTreeMap, fs, ops::Range};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::run;

/// The directory of the mutations.
const DIRECTORY: &str = "xtask/mutations";
/// The delimiters of the expression in `find` that is replaced; the rest of `find` is its context.
const MARKS: (char, char) = ('«', '»');

#[derive(Deserialize)]
struct File {
    mutation: Vec<Mutation>,
}

/// A fault that the truth tables must find.
#[derive(Deserialize)]
pub(crate) struct Mutation {
    /// A short description.
    pub(crate) name: String,
    #[serde(flatten)]
    edit: Edit,
    /// Further places, where one makes no difference alone.
    #[serde(default)]
    and: Vec<Edit>,
    /// The clauses of which a row must fail.
    #[serde(default)]
    pub(crate) clauses: Vec<String>,
}

/// An expression that is replaced by another of its type.
#[derive(Deserialize)]
struct Edit {
    /// From the root of the workspace.
    file: String,
    /// Occurs exactly once in the file; between « and », if it has them, is what is replaced.
    find: String,
    /// By this.
    replace: String,
}

/// All mutations, file by file.
pub(crate) fn read() -> Result<Vec<Mutation>> {
    let dir = run::root().join(DIRECTORY);
    let entries = dir
        .read_dir()
        .with_context(|| format!("cannot read {}", dir.display()))?;
    let mut paths: Vec<_> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    paths.sort();
    let mut all: Vec<Mutation> = Vec::new();
    for path in paths {
        let shown = || path.display().to_string();
        let text = fs::read_to_string(&path).with_context(shown)?;
        let file: File = toml::from_str(&text).with_context(shown)?;
        all.extend(file.mutation);
    }
    let mut names: Vec<&str> = all.iter().map(|mutation| mutation.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two mutations are called {:?}", twice[0]);
    }
    Ok(all)
}

/// By file: the expressions that are replaced, by which mutations (counted from 1), with what.
pub(crate) type Edits<'a> = BTreeMap<&'a str, Vec<(u32, &'a str, &'a str)>>;

/// A replacement in a file.
pub(crate) fn edits(mutations: &[Mutation]) -> Edits<'_> {
    let mut edits = Edits::new();
    for (mutation, number) in mutations.iter().zip(1..) {
        for edit in [&mutation.edit].into_iter().chain(&mutation.and) {
            let of_file = edits.entry(edit.file.as_str()).or_default();
            of_file.push((number, edit.find.as_str(), edit.replace.as_str()));
        }
    }
    edits
}

/// A file with all its mutations in it, each behind its switch; `switch` is the path of the function
/// that says whether a number is on.
pub(crate) fn apply(text: &str, edits: &[(u32, &str, &str)], switch: &str) -> Result<String> {
    let mut places: BTreeMap<(usize, usize), Vec<(u32, &str)>> = BTreeMap::new();
    for (number, find, replace) in edits {
        let place = locate(text, find)?;
        let of_place = places.entry((place.start, place.end)).or_default();
        of_place.push((*number, replace));
    }
    let mut made = String::new();
    let mut at = 0;
    for ((start, end), choices) in places {
        ensure!(
            at <= start,
            "two mutations overlap at {:?}",
            &text[start..end]
        );
        made += &text[at..start];
        made += "(";
        for (number, replace) in choices {
            made += &format!("if {switch}({number}) {{ {replace} }} else ");
        }
        made += &format!("{{ {} }})", &text[start..end]);
        at = end;
    }
    Ok(made + &text[at..])
}

/// Returns the range of the expression that `find` selects.
fn locate(text: &str, find: &str) -> Result<Range<usize>> {
    let (before, rest) = find.split_once(MARKS.0).unwrap_or(("", find));
    let (what, after) = rest.split_once(MARKS.1).unwrap_or((rest, ""));
    let whole = [before, what, after].concat();
    let mut found = text.match_indices(&whole).map(|(at, _)| at);
    match (found.next(), found.next()) {
        (Some(at), None) => {
            let start = at + before.len();
            Ok(start..start + what.len())
        }
        (None, _) => bail!("there is no {whole:?}"),
        (Some(_), Some(_)) => bail!("there is more than one {whole:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_expression_switches_between_mutations() {
        let text = "fn f() { a(1) + b(1) }";
        let edits = [(7, "+ «b(1)»", "2"), (8, "a(«1»)", "3"), (9, "b(1)", "4")];
        let made = apply(text, &edits, "on").expect("it applies");
        assert_eq!(
            made,
            "fn f() { a((if on(8) { 3 } else { 1 })) + (if on(7) { 2 } else if on(9) { 4 } else { b(1) }) }"
        );
        assert!(apply(text, &[(1, "1", "2")], "on").is_err(), "ambiguous");
        assert!(apply(text, &[(1, "c", "2")], "on").is_err(), "absent");
        let overlap = [(1, "a(1)", "2"), (2, "a(1) + b(1)", "3")];
        assert!(apply(text, &overlap, "on").is_err(), "overlapping");
    }

    #[test]
    fn committed_mutations_match_sources() {
        let mutations = read().expect("mutations");
        for (file, edits) in edits(&mutations) {
            let text = fs::read_to_string(run::root().join(file)).expect(file);
            let made = apply(&text, &edits, "on");
            assert!(
                made.is_ok(),
                "{file}: {:#}: the source has changed: change the mutation as well",
                made.expect_err("it is not ok")
            );
        }
    }
}
