// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask fuzz --coverage`: how much of the parsers the committed corpus reaches.
//!
//! The tests that replay the corpus through the doors of `fuzz/` are built with the compiler's own
//! instrumentation, and LLVM's tools count. The unit is the region: a part of the source between
//! two branches, each `?` and each arm among them. Counted are the functions that the corpus has
//! entered; what a file has beside its parser (how a thing is printed, say) is told by number.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::run;

/// The sources that parse bytes from outside: package, and fuzz target whose corpus covers it.
const PARSERS: &[(&str, &[(&str, &str)])] = &[
    (
        "mesh-tunnel",
        &[("frames", "tunnel/frame.rs"), ("records", "tls/records.rs")],
    ),
    (
        "mesh-controller",
        &[("csr", "sign.rs"), ("csr", "service.rs")],
    ),
    (
        "mesh-identity",
        &[
            ("csr, certificate", "spiffe.rs"),
            ("certificate", "verify.rs"),
            ("crl, certificate", "revocation.rs"),
            ("answer", "issuer/grpc.rs"),
        ],
    ),
    (
        "mesh-api",
        &[
            ("manifests", "manifests.rs"),
            ("manifests", "manifests/yaml.rs"),
            ("manifests", "convert/object.rs"),
        ],
    ),
];

/// The tests that replay the corpus and nothing else.
const TESTS: [&str; 2] = ["go_every_way", "goes_every_way"];
/// Versions of LLVM's tools that read what this compiler writes, the newest first.
const VERSIONS: [&str; 4] = ["-22", "-21", "-20", "-19"];
/// The kind of a region that is code (LLVM's CounterMappingRegion::CodeRegion).
const CODE: u64 = 0;

/// The first and last line and column of a region.
type Region = [u64; 4];

/// The regions of one file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// The highest execution count of each region of the functions that were called.
    regions: BTreeMap<Region, u64>,
    /// Functions that were not entered.
    beside: usize,
}

pub(crate) fn print() -> Result<()> {
    let dir = run::root().join("target/fuzz/coverage");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (merge, count) = (tool("llvm-profdata")?, tool("llvm-cov")?);
    for (package, files) in PARSERS {
        let program = build(&dir, package)?;
        let (raw, profile) = (dir.join("corpus.profraw"), dir.join("corpus.profdata"));
        run::show(
            run::command(&program)
                .args(TESTS)
                .env("LLVM_PROFILE_FILE", &raw),
        )?;
        run::show(
            run::command(&merge)
                .args(["merge", "-o"])
                .args([&profile, &raw]),
        )?;
        let mut export = run::command(&count);
        export
            .arg("export")
            .arg(&program)
            .arg(format!("-instr-profile={}", profile.display()));
        let all: Value = serde_json::from_str(&run::capture(&mut export)?)?;
        for (target, file) in *files {
            let found = regions(&all, &format!("{package}/src/{file}"));
            if found.regions.is_empty() {
                bail!("no function of {file} was entered: are the tests' names still {TESTS:?}?");
            }
            println!("coverage: {target}: {file}: {}", told(&found));
        }
    }
    Ok(())
}

/// One of LLVM's tools, of a version that fits.
fn tool(name: &str) -> Result<PathBuf> {
    let of = |version: &&str| run::find(&format!("{name}{version}"));
    VERSIONS.iter().find_map(of).with_context(|| {
        format!("no {name} of LLVM 19 or later: Debian has it in the package llvm-19")
    })
}

/// Builds a package's tests, instrumented, and says where they are. Only what is of this workspace
/// is compiled again.
fn build(dir: &Path, package: &str) -> Result<PathBuf> {
    let wrapper = dir.join("rustc");
    fs::write(&wrapper, "#!/bin/sh\nexec \"$@\" -Cinstrument-coverage\n")?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let mut cargo = run::cargo(["test", "--locked", "--package", package, "--lib"]);
    cargo
        .args(["--no-run", "--message-format", "json-render-diagnostics"])
        .env("RUSTC_WORKSPACE_WRAPPER", &wrapper)
        // What build scripts write is of no use.
        .env("LLVM_PROFILE_FILE", dir.join("build-%p.profraw"));
    let said = run::capture(&mut cargo)?;
    let program = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    };
    said.lines()
        .rev()
        .find_map(program)
        .context("cargo names no program of tests")
}

/// The regions of a file, of all instances of its functions.
fn regions(all: &Value, file: &str) -> Found {
    let mut found = Found::default();
    let functions = all["data"][0]["functions"].as_array();
    for function in functions.into_iter().flatten() {
        let here = function["filenames"][0].as_str();
        let test = function["name"]
            .as_str()
            .is_some_and(|name| name.contains("5tests"));
        if test || !here.is_some_and(|path| path.ends_with(file)) {
            continue;
        }
        if function["count"].as_u64() == Some(0) {
            found.beside += 1;
            continue;
        }
        for region in function["regions"].as_array().into_iter().flatten() {
            let number = |at: usize| region[at].as_u64().unwrap_or(u64::MAX);
            // Of the function's own file, and code.
            if number(5) == 0 && number(7) == CODE {
                let place = [number(0), number(1), number(2), number(3)];
                let reached = found.regions.entry(place).or_default();
                *reached = (*reached).max(number(4));
            }
        }
    }
    found
}

fn told(found: &Found) -> String {
    let never: Vec<String> = found
        .regions
        .iter()
        .filter(|(_, count)| **count == 0)
        .map(|([line, column, ..], _)| format!("{line}:{column}"))
        .collect();
    let all = found.regions.len();
    let mut text = format!("{} of {all} regions", all - never.len());
    if !never.is_empty() {
        text += &format!(", never {}", never.join(" "));
    }
    text + &format!("; {} functions beside them", found.beside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_count_entered_functions_of_all_instances() {
        let function = |name: &str, file: &str, count: u64, regions: Value| serde_json::json!({"name": name, "filenames": [file], "count": count, "regions": regions});
        let file = "/x/mesh-agent/src/a/b.rs";
        let all = serde_json::json!({"data": [{"functions": [
            function("f", file, 2, serde_json::json!([[1, 1, 2, 2, 2, 0, 0, 0], [3, 1, 3, 2, 0, 0, 0, 0]])),
            function("f2", file, 1, serde_json::json!([[3, 1, 3, 2, 1, 0, 0, 0], [4, 1, 4, 2, 0, 0, 0, 0]])),
            // A gap, and a region of another file.
            function("g", file, 1, serde_json::json!([[5, 1, 5, 2, 0, 0, 0, 3], [6, 1, 6, 2, 0, 1, 0, 0]])),
            function("h", file, 0, serde_json::json!([[7, 1, 7, 2, 0, 0, 0, 0]])),
            function("1a5tests1f", file, 1, serde_json::json!([[8, 1, 8, 2, 0, 0, 0, 0]])),
            function("i", "/x/mesh-agent/src/b.rs", 1, serde_json::json!([[9, 1, 9, 2, 0, 0, 0, 0]])),
        ]}]});
        let found = regions(&all, "mesh-agent/src/a/b.rs");
        assert_eq!(
            told(&found),
            "2 of 3 regions, never 4:1; 1 functions beside them"
        );
        assert_eq!(regions(&all, "mesh-agent/src/a/c.rs"), Found::default());
    }
}
