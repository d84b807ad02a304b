// SPDX-License-Identifier: Apache-2.0
//! The workspace's test programs: built by one cargo command, listed from its messages, and run
//! without cargo.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::run;

/// The crate whose tests run one at a time.
const KERNEL_CRATE: &str = "mesh-test";

/// The test target of any other crate whose tests run one at a time.
const KERNEL_TARGET: &str = "kernel";

/// Test targets that need the Kubernetes servers. They run last: on a new machine the servers are
/// still being built when the tests start.
const KUBERNETES: [&str; 2] = ["kernel", "kubernetes"];

/// A test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// The crate's directory, where its tests run.
    pub(super) dir: PathBuf,
    /// The name of the target.
    pub(super) target: String,
    /// `lib`, `bin` or `test`.
    pub(super) kind: String,
    pub(super) executable: PathBuf,
}

impl Program {
    /// Whether the tests run one at a time, because they share the machine's kernel and measure time.
    pub(super) fn is_kernel(&self) -> bool {
        self.package() == KERNEL_CRATE || (self.kind == "test" && self.target == KERNEL_TARGET)
    }

    /// The name of the crate's directory.
    fn package(&self) -> &str {
        let name = self.dir.file_name().and_then(|name| name.to_str());
        name.unwrap_or_default()
    }

    /// The crate and the target, for people.
    pub(super) fn name(&self) -> String {
        format!("{} {} {}", self.package(), self.kind, self.target)
    }

    /// A command that runs the tests whose names contain `filter`.
    pub(super) fn command(&self, filter: Option<&str>) -> Command {
        let mut command = Command::new(&self.executable);
        command
            .current_dir(&self.dir)
            .env("CARGO_MANIFEST_DIR", &self.dir)
            .args(filter);
        if self.is_kernel() {
            // libtest gives out times on request of nightly toolchains only.
            command
                .args(["--test-threads=1", "-Zunstable-options", "--report-time"])
                .env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }
}

/// Builds all tests of the workspace and returns the test programs, in the order in which they run.
pub(super) fn build() -> Result<Vec<Program>> {
    let mut cargo = run::cargo(["test", "--workspace", "--no-run"]);
    cargo.arg("--message-format=json-render-diagnostics");
    let output = cargo
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", run::line(&cargo)))?;
    if !output.status.success() {
        bail!("{} failed: {}", run::line(&cargo), output.status);
    }
    let text = String::from_utf8(output.stdout).context("cargo did not print UTF-8")?;
    let mut programs = Vec::new();
    for line in text.lines() {
        programs.extend(program(line)?);
    }
    sort(&mut programs);
    Ok(programs)
}

/// The test program in one line of cargo's messages.
fn program(line: &str) -> Result<Option<Program>> {
    let message: Value = serde_json::from_str(line)
        .with_context(|| format!("cargo printed something other than JSON: {line}"))?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return Ok(None);
    }
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let Some(executable) = text(&message["executable"]) else {
        return Ok(None);
    };
    let manifest = text(&message["manifest_path"]);
    let manifest = manifest.with_context(|| format!("no manifest in {line}"))?;
    let dir = Path::new(&manifest).parent().unwrap_or(Path::new(""));
    Ok(Some(Program {
        dir: dir.to_owned(),
        target: text(&message["target"]["name"]).unwrap_or_default(),
        kind: text(&message["target"]["kind"][0]).unwrap_or_default(),
        executable: executable.into(),
    }))
}

/// Unit tests in the order of crates, then kernel tests with those on Kubernetes last.
fn sort(programs: &mut [Program]) {
    programs.sort_by_key(|program| {
        let kubernetes = KUBERNETES.contains(&program.target.as_str());
        let kernel = program.is_kernel();
        (kernel, kernel && kubernetes, program.name())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(package: &str, kind: &str, target: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","manifest_path":"/m/{package}/Cargo.toml","target":{{"kind":["{kind}"],"name":"{target}"}},"profile":{{"test":true}},"executable":"/t/{target}"}}"#
        )
    }

    fn read(line: &str) -> Option<Program> {
        program(line).expect("a message of cargo's")
    }

    #[test]
    fn only_test_executables_are_programs() {
        let found = read(&artifact("mesh-plan", "lib", "mesh_plan")).expect("a test program");
        assert_eq!(found.name(), "mesh-plan lib mesh_plan");
        assert_eq!(found.executable, Path::new("/t/mesh_plan"));
        let plain = artifact("a", "bin", "a").replace("true", "false");
        assert_eq!(read(&plain), None);
        let library = artifact("a", "lib", "a").replace(r#""/t/a""#, "null");
        assert_eq!(read(&library), None);
        assert_eq!(read(r#"{"reason":"build-finished","success":true}"#), None);
        assert!(program("Compiling").is_err());
    }

    #[test]
    fn kernel_programs_run_after_unit_tests_and_kubernetes_last() {
        let mut programs: Vec<Program> = [
            ("mesh-agent", "test", "kernel"),
            ("mesh-agent", "lib", "mesh_agent"),
            ("mesh-test", "test", "tunnel"),
            ("mesh-test", "test", "kubernetes"),
            ("mesh-test", "lib", "mesh_test"),
            ("xtask", "bin", "xtask"),
        ]
        .iter()
        .map(|(package, kind, target)| read(&artifact(package, kind, target)).expect("a program"))
        .collect();
        sort(&mut programs);
        let names: Vec<String> = programs.iter().map(Program::name).collect();
        assert_eq!(
            names,
            [
                "mesh-agent lib mesh_agent",
                "xtask bin xtask",
                "mesh-test lib mesh_test",
                "mesh-test test tunnel",
                "mesh-agent test kernel",
                "mesh-test test kubernetes",
            ]
        );
        let kernel = programs.iter().map(Program::is_kernel);
        assert_eq!(
            kernel.collect::<Vec<_>>(),
            [false, false, true, true, true, true]
        );
    }

    #[test]
    fn kernel_programs_run_one_test_at_a_time() {
        let line = |package| {
            let program = read(&artifact(package, "test", "policy")).expect("a program");
            run::line(&program.command(Some("udp")))
        };
        assert!(line("mesh-test").starts_with("/t/policy udp --test-threads=1 "));
        assert_eq!(line("mesh-cli"), "/t/policy udp");
    }
}
