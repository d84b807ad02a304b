// SPDX-License-Identifier: Apache-2.0
//! The Kubernetes servers of the tests, built from their Go modules in the background: it takes
//! minutes, and nothing waits for it before the first test that needs them.

use std::{
    env,
    fs::File,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::Outcome;
use crate::run;

const SCRIPT: &str = "crates/mesh-test/apiserver/build.sh";

/// The oldest version of Go that `go.mod` of the servers accepts, as in the script.
const GO: &str = "Go 1.24 or later";

/// The installation directory of Go's own archive, which the script searches too.
const USUAL: &str = "/usr/local/go/bin";

pub(super) fn ensure() -> Result<Outcome> {
    if env::var_os("KUBEBUILDER_ASSETS").is_some() {
        return Ok(Outcome::Present);
    }
    if run::capture(run::command(run::root().join(SCRIPT)).arg("--find")).is_ok() {
        return Ok(Outcome::Present);
    }
    // Nothing but the tests on Kubernetes needs them, and those fail without.
    if run::find("go").is_none() && !Path::new(USUAL).is_dir() {
        return Ok(Outcome::Done(format!(
            "left out: they are built with {GO}, which is neither in PATH nor in {USUAL}"
        )));
    }
    let log = env::temp_dir().join(format!("mesh-servers-{}.log", std::process::id()));
    start(&log)?;
    Ok(Outcome::Done(format!(
        "being built in the background, log in {}",
        log.display()
    )))
}

/// Starts the build with low priority. Programs that need the servers wait for the script's lock.
fn start(log: &Path) -> Result<()> {
    let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut build = Command::new("nice");
    build
        .arg(run::root().join(SCRIPT))
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0);
    build
        .spawn()
        .with_context(|| format!("cannot start {}", run::line(&build)))?;
    Ok(())
}
