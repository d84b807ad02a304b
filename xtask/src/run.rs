// SPDX-License-Identifier: Apache-2.0
//! Starts other programs in the root of the workspace and reports their failures.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
}

/// A program that runs in the root of the workspace.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The cargo that runs this program.
pub(crate) fn cargo<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Command {
    let mut cargo = command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args);
    cargo
}

/// Runs a command with the input and output of xtask.
pub(crate) fn show(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", line(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", line(command));
    }
    Ok(())
}

/// Runs a command silently and returns its standard output; the error of a failed one carries the end
/// of its standard error.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{} failed: {}: {}",
            line(command),
            output.status,
            last_lines(&said)
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} did not print UTF-8", line(command)))
}

/// Runs a command silently and returns its output, whether or not it succeeded.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", line(command)))
}

/// Command line as a user would type it.
pub(crate) fn line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// Path of a program in the search path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.and_then(|uids| uids.split_whitespace().nth(1)) == Some("0")
}

/// Runs a part and prints its result and duration.
pub(crate) fn timed<T>(name: &str, part: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = part();
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("{name}: {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
    result
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_end_of_program_output() {
        let err = capture(command("sh").args(["-c", "echo why it broke >&2; exit 3"]))
            .expect_err("it exits with 3");
        let text = format!("{err:#}");
        assert!(
            text.contains("why it broke") && text.contains('3'),
            "{text}"
        );
    }

    #[test]
    fn last_lines_are_at_most_four_nonempty() {
        assert_eq!(last_lines("a\nb\n\nc\nd\ne\n"), "b | c | d | e");
        assert_eq!(last_lines(""), "");
    }
}
