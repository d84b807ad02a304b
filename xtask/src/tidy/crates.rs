// SPDX-License-Identifier: Apache-2.0
//! Checks that the workspace's crates are what ARCHITECTURE.md says: which there are, which of them
//! each depends on, and which may contain unsafe code.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::File;

/// The file with the table, and the heading of the section that has it.
const DOCUMENT: &str = "ARCHITECTURE.md";
const HEADING: &str = "## Crates";

/// Crates that may contain unsafe code, each with the reason. All others forbid it.
const UNSAFE: &[(&str, &str)] = &[
    ("mesh-sys", "the system calls that no library wraps"),
    (
        "mesh-common",
        "the ABI, whose types are marked for aya's maps",
    ),
    ("mesh-ebpf", "kernel programs"),
];

/// The line that forbids it, at the root of each program and library.
const FORBID: &str = "#![forbid(unsafe_code)]";

/// A crate's dependencies within the workspace.
type Crates = BTreeMap<String, BTreeSet<String>>;

/// Findings of the whole tree; none before the document has the section.
pub(super) fn check(files: &[File]) -> Vec<String> {
    let Some(document) = files.iter().find(|file| file.path == DOCUMENT) else {
        return vec![format!("{DOCUMENT} is missing")];
    };
    let Some(documented) = documented(&document.text) else {
        return Vec::new();
    };
    let manifests = match manifests(files) {
        Ok(manifests) => manifests,
        Err(finding) => return vec![finding],
    };
    let mut findings = compare(&documented, &dependencies(&manifests));
    findings.extend(unsafe_code(files, &manifests));
    findings
}

/// Returns the rows of the table, which ends at the next heading; none without the section.
fn documented(text: &str) -> Option<Crates> {
    let mut lines = text.lines().skip_while(|line| line.trim_end() != HEADING);
    lines.next()?;
    let section = lines.take_while(|line| !line.starts_with('#'));
    Some(section.filter_map(row).collect())
}

/// The crate and its dependencies in a row `| `crate` | what it is | `dep`, `dep` |`. Of a row that
/// names two crates, as of the header, nothing is taken.
fn row(line: &str) -> Option<(String, BTreeSet<String>)> {
    let mut cells = line.strip_prefix('|')?.split('|');
    let name = cells.next()?.trim();
    let name = name.strip_prefix('`')?.strip_suffix('`')?;
    let third = cells.nth(1)?;
    let names = third.split('`').skip(1).step_by(2);
    Some((name.to_owned(), names.map(str::to_owned).collect()))
}

/// A crate of the workspace: its directory, with a `/` at the end, and its manifest.
struct Manifest<'a> {
    name: String,
    dir: &'a str,
    table: Table,
}

/// The manifests of the workspace's crates, without those of other workspaces in the tree.
fn manifests(files: &[File]) -> Result<Vec<Manifest<'_>>, String> {
    let mut found = Vec::new();
    for file in files {
        let Some(dir) = file.path.strip_suffix("Cargo.toml") else {
            continue;
        };
        let table: Table = toml::from_str(&file.text)
            .map_err(|error| format!("{}: invalid TOML: {error}", file.path))?;
        let name = table.get("package").and_then(|package| package.get("name"));
        if let Some(Value::String(name)) = name
            && !table.contains_key("workspace")
        {
            let name = name.clone();
            found.push(Manifest { name, dir, table });
        }
    }
    Ok(found)
}

/// Returns each crate's dependencies on crates of the workspace, for any target. Dependencies of tests,
/// fuzzing and build scripts are free.
fn dependencies(manifests: &[Manifest<'_>]) -> Crates {
    let all: BTreeSet<&str> = manifests.iter().map(|it| it.name.as_str()).collect();
    let of = |manifest: &Manifest<'_>| {
        let targets = manifest.table.get("target").and_then(Value::as_table);
        let targets = targets.into_iter().flatten();
        let targets = targets.filter(|(cfg, _)| *cfg != "cfg(fuzzing)");
        let names = std::iter::once(manifest.table.get("dependencies"))
            .chain(targets.map(|(_, target)| target.get("dependencies")))
            .filter_map(|table| table?.as_table())
            .flat_map(Table::keys)
            .filter(|name| all.contains(name.as_str()));
        (manifest.name.clone(), names.cloned().collect())
    };
    manifests.iter().map(of).collect()
}

fn compare(documented: &Crates, real: &Crates) -> Vec<String> {
    let mut findings = Vec::new();
    let names: BTreeSet<&String> = documented.keys().chain(real.keys()).collect();
    for name in names {
        match (documented.get(name), real.get(name)) {
            (Some(documented), Some(real)) => {
                let missing = real.difference(documented).map(|other| {
                    format!("{DOCUMENT}: {name} depends on {other}, which the table does not say")
                });
                let extra = documented.difference(real).map(|other| {
                    format!(
                        "{DOCUMENT}: the table says that {name} depends on {other}, which it does not"
                    )
                });
                findings.extend(missing.chain(extra));
            }
            (Some(_), None) => findings.push(format!(
                "{DOCUMENT}: the table has {name}, which is not a crate of the workspace"
            )),
            (None, _) => findings.push(format!("{DOCUMENT}: the table lacks the crate {name}")),
        }
    }
    findings
}

/// Roots of crates that do not forbid unsafe code, though they have to.
fn unsafe_code(files: &[File], manifests: &[Manifest<'_>]) -> Vec<String> {
    let forbidding = manifests
        .iter()
        .filter(|manifest| !UNSAFE.iter().any(|(name, _)| *name == manifest.name));
    let mut findings = Vec::new();
    for manifest in forbidding {
        let roots = files.iter().filter(|file| {
            let inside = file.path.strip_prefix(manifest.dir);
            inside.is_some_and(is_root) && !file.text.lines().any(|line| line.trim() == FORBID)
        });
        findings.extend(roots.map(|root| format!("{}:1: lacks `{FORBID}`", root.path)));
    }
    findings
}

/// Whether cargo compiles this file of a crate as the root of a library or program.
fn is_root(path: &str) -> bool {
    let bin = path.strip_prefix("src/bin/");
    matches!(path, "src/lib.rs" | "src/main.rs")
        || bin.is_some_and(|path| {
            path.ends_with("/main.rs") || (path.ends_with(".rs") && !path.contains('/'))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
# Architecture

| `other` | a table before the section | `b` |

## Crates

| Crate | What it is | Depends on |
|---|---|---|
| `a` | the base, `no_std` | - | nobody's |
| `b` | above `a` | `a`, tokio |

## Maps

| `map` | not a crate | `b` |
";

    fn file(path: &str, text: &str) -> File {
        File {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    /// A tree that is as the table says.
    fn tree() -> Vec<File> {
        let manifest = |name: &str, rest: &str| format!("[package]\nname = \"{name}\"\n{rest}");
        let b = manifest(
            "b",
            "[dependencies]\na.workspace = true\ntokio = \"1\"\n[dev-dependencies]\nc = { path = \"../c\" }\n",
        );
        vec![
            file(DOCUMENT, TABLE),
            file("Cargo.toml", "[workspace]\nmembers = [\"a\", \"b\"]\n"),
            file("a/Cargo.toml", &manifest("a", "")),
            file("a/src/lib.rs", "//! a\n#![forbid(unsafe_code)]\n"),
            file("a/src/deeper/lib.rs", ""),
            file("b/Cargo.toml", &b),
            file("b/src/main.rs", "#![forbid(unsafe_code)]\n"),
            file("b/src/bin/tool.rs", "#![forbid(unsafe_code)]\n"),
            file("b/build.rs", ""),
            file("fuzz/Cargo.toml", &manifest("fuzz", "[workspace]\n")),
            file("fuzz/src/lib.rs", ""),
        ]
    }

    /// The findings once `path` has this text instead.
    fn findings_with(path: &str, text: &str) -> Vec<String> {
        let mut files = tree();
        let changed = files.iter_mut().find(|file| file.path == path);
        text.clone_into(&mut changed.expect("a file of the tree").text);
        check(&files)
    }

    #[test]
    fn tree_that_is_as_documented_has_no_findings() {
        assert_eq!(check(&tree()), Vec::<String>::new());
    }

    #[test]
    fn only_a_document_with_the_section_is_compared() {
        assert!(findings_with(DOCUMENT, "# Architecture\n").is_empty());
        let without: Vec<File> = tree().into_iter().skip(1).collect();
        assert_eq!(check(&without), [format!("{DOCUMENT} is missing")]);
    }

    #[test]
    fn dependencies_differ_in_either_direction() {
        let with = |dependency: &str| {
            let text = format!("[package]\nname = \"a\"\n[dependencies]\n{dependency}");
            findings_with("a/Cargo.toml", &text)
        };
        assert_eq!(
            with("b.workspace = true\n"),
            ["ARCHITECTURE.md: a depends on b, which the table does not say"]
        );
        assert_eq!(with("serde = \"1\"\n"), Vec::<String>::new());
        let for_target = |cfg: &str| {
            let text = format!(
                "[package]\nname = \"a\"\n[target.'{cfg}'.dependencies]\nb.workspace = true\n"
            );
            findings_with("a/Cargo.toml", &text)
        };
        assert_eq!(
            for_target("cfg(unix)"),
            ["ARCHITECTURE.md: a depends on b, which the table does not say"]
        );
        assert_eq!(for_target("cfg(fuzzing)"), Vec::<String>::new());
        assert_eq!(
            findings_with("b/Cargo.toml", "[package]\nname = \"b\"\n"),
            ["ARCHITECTURE.md: the table says that b depends on a, which it does not"]
        );
    }

    #[test]
    fn crates_differ_in_either_direction() {
        let table = TABLE.replace("| `a` |", "| `c` |");
        assert_eq!(
            findings_with(DOCUMENT, &table),
            [
                "ARCHITECTURE.md: the table lacks the crate a",
                "ARCHITECTURE.md: the table has c, which is not a crate of the workspace",
            ]
        );
    }

    #[test]
    fn every_root_forbids_unsafe_code() {
        for path in ["a/src/lib.rs", "b/src/main.rs", "b/src/bin/tool.rs"] {
            let text = "// #![forbid(unsafe_code)] is not here\n";
            let wanted = format!("{path}:1: lacks `#![forbid(unsafe_code)]`");
            assert_eq!(findings_with(path, text), [wanted]);
        }
    }

    #[test]
    fn listed_crates_may_contain_unsafe_code() {
        let mut files = tree();
        files.push(file(
            "mesh-sys/Cargo.toml",
            "[package]\nname = \"mesh-sys\"\n",
        ));
        files.push(file("mesh-sys/src/lib.rs", "//! System calls.\n"));
        assert_eq!(
            check(&files),
            ["ARCHITECTURE.md: the table lacks the crate mesh-sys"]
        );
    }

    #[test]
    fn invalid_manifest_is_a_finding() {
        let found = findings_with("a/Cargo.toml", "[package");
        assert!(
            found[0].starts_with("a/Cargo.toml: invalid TOML"),
            "{found:?}"
        );
    }
}
