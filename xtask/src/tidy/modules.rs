// SPDX-License-Identifier: Apache-2.0
//! Finds source files that no crate compiles: a test in such a file never fails.

use std::collections::BTreeSet;

use super::File;

/// Rust files below a crate's `src`, `tests`, `benches` or `examples` that no `mod` reaches.
pub(super) fn orphans(files: &[File]) -> Vec<String> {
    let crates: Vec<&str> = files
        .iter()
        .filter_map(|file| file.path.strip_suffix("/Cargo.toml"))
        .collect();
    let sources: Vec<&File> = files
        .iter()
        .filter(|file| file.has_extension("rs"))
        .collect();
    let mut reached: BTreeSet<String> = BTreeSet::new();
    let mut open: Vec<(&File, bool)> = sources
        .iter()
        .filter(|file| crates.iter().any(|dir| is_root(&file.path, dir)))
        .map(|file| (*file, true))
        .collect();
    while let Some((file, root)) = open.pop() {
        if !reached.insert(file.path.clone()) {
            continue;
        }
        for child in children(file, root) {
            if let Some(found) = sources.iter().find(|source| source.path == child) {
                open.push((found, child.ends_with("/mod.rs")));
            }
        }
    }
    sources
        .iter()
        .filter(|file| !reached.contains(&file.path))
        .map(|file| format!("{}: no `mod` reaches it, so nothing compiles it", file.path))
        .collect()
}

/// Whether cargo compiles this file as a crate root.
fn is_root(path: &str, dir: &str) -> bool {
    let Some(inside) = path
        .strip_prefix(dir)
        .and_then(|rest| rest.strip_prefix('/'))
    else {
        return false;
    };
    let parts: Vec<&str> = inside.split('/').collect();
    matches!(
        parts.as_slice(),
        ["build.rs"]
            | ["src", "lib.rs" | "main.rs"]
            | ["src", "bin", _]
            | ["src", "bin", _, "main.rs"]
            | ["tests" | "benches" | "examples" | "fuzz_targets", _]
            | ["tests" | "benches" | "examples", _, "main.rs"]
    )
}

/// Returns the files that the `mod name;` lines of a file can name: `name.rs` or `name/mod.rs`.
fn children(file: &File, root: bool) -> Vec<String> {
    let (dir, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
    let stem = name.strip_suffix(".rs").unwrap_or(name);
    let below = if root {
        dir.to_owned()
    } else {
        format!("{dir}/{stem}")
    };
    let mut found = Vec::new();
    let mut path_attribute = None;
    for line in file.text.lines().map(str::trim) {
        if let Some(path) = line
            .strip_prefix("#[path = \"")
            .and_then(|rest| rest.strip_suffix("\"]"))
        {
            path_attribute = Some(join(dir, path));
            continue;
        }
        if let Some(name) = module(line) {
            match path_attribute.take() {
                Some(path) => found.push(path),
                None => {
                    found.push(format!("{below}/{name}.rs"));
                    found.push(format!("{below}/{name}/mod.rs"));
                }
            }
        }
        if !line.starts_with('#') {
            path_attribute = None;
        }
    }
    found
}

/// A path relative to `dir`, with its `..` taken out.
fn join(dir: &str, path: &str) -> String {
    let mut parts: Vec<&str> = dir.split('/').collect();
    for part in path.split('/') {
        if part == ".." {
            parts.truncate(parts.len().saturating_sub(1));
        } else {
            parts.push(part);
        }
    }
    parts.join("/")
}

/// The name in `mod name;` with any visibility and attributes on the same line.
fn module(line: &str) -> Option<&str> {
    let line = line.split("//").next()?.trim();
    let (before, name) = line.strip_suffix(';')?.rsplit_once("mod ")?;
    let name = name.trim();
    let before = before.trim();
    let visible = before.is_empty()
        || before == "pub"
        || (before.starts_with("pub(") && before.ends_with(')'))
        || before.starts_with("#[");
    let plain = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    (visible && plain).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn orphans_are_files_that_no_mod_reaches() {
        let files = [
            file("a/Cargo.toml", ""),
            file(
                "a/src/lib.rs",
                "pub mod room;\n// mod forgotten;\nmod inline { }\n",
            ),
            file("a/src/room.rs", "#[cfg(test)]\npub(crate) mod corner;\n"),
            file("a/src/room/corner.rs", ""),
            file("a/src/room/other.rs", ""),
            file("a/src/forgotten.rs", "mod corner;"),
            file("a/src/corner.rs", ""),
            file(
                "a/src/bin/demo.rs",
                "#[path = \"../shared.rs\"]\nmod shared;\n",
            ),
            file("a/src/shared.rs", ""),
            file("a/tests/it.rs", ""),
            file("a/tests/deep/case.rs", ""),
            file("a/build.rs", ""),
        ];
        let orphans = orphans(&files);
        let paths: Vec<&str> = orphans
            .iter()
            .filter_map(|line| line.split(':').next())
            .collect();
        assert_eq!(
            paths,
            [
                "a/src/room/other.rs",
                "a/src/forgotten.rs",
                "a/src/corner.rs",
                "a/tests/deep/case.rs"
            ]
        );
    }

    #[test]
    fn module_lines_are_recognized() {
        assert_eq!(module("mod a;"), Some("a"));
        assert_eq!(module("pub(crate) mod a_b; // why"), Some("a_b"));
        assert_eq!(module("mod a {"), None);
        assert_eq!(module("use of::a mod b;"), None);
    }
}
