// SPDX-License-Identifier: Apache-2.0
//! Locations of the Kubernetes programs: KUBEBUILDER_ASSETS, or a build of the module `apiserver`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::process::Cmd;

/// Directory with `etcd`, `kube-apiserver` and `kubectl`, as controller tests elsewhere use it.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// Paths of the Kubernetes servers and kubectl.
#[derive(Clone, Debug)]
pub struct Programs {
    /// A multi-call program that contains all of them.
    all: PathBuf,
    assets: Option<PathBuf>,
}

impl Programs {
    /// Finds the programs; builds them if there is no build yet, which takes minutes.
    ///
    /// # Errors
    /// Go is not installed, or the build fails.
    pub fn find() -> Result<Self> {
        static ALL: OnceLock<PathBuf> = OnceLock::new();
        let assets = std::env::var_os(ASSETS).map(PathBuf::from);
        let complete = assets.as_ref().is_some_and(|dir| {
            let mut needed = ["etcd", "kube-apiserver", "kubectl"].iter();
            needed.all(|name| dir.join(name).is_file())
        });
        let all = match ALL.get() {
            Some(all) => all.clone(),
            // The build is needed only for programs that the directory lacks.
            None if complete => PathBuf::from("kube"),
            None => ALL.get_or_init_with(|| built("apiserver", "."))?,
        };
        Ok(Self { all, assets })
    }

    /// Returns a command that runs one of the programs.
    #[must_use]
    pub fn command(&self, name: &str) -> Cmd {
        let asset = self.assets.as_ref().map(|dir| dir.join(name));
        match asset.filter(|path| path.is_file()) {
            Some(path) => Cmd::new(path),
            None => Cmd::new(&self.all).args([name]),
        }
    }

    /// Returns the multi-call program, whose first argument is the name of a program.
    #[must_use]
    pub fn all(&self) -> &Path {
        &self.all
    }
}

/// Replacement for `OnceLock::get_or_try_init`, which is not stable.
trait OrInit<T> {
    fn get_or_init_with(&self, make: impl FnOnce() -> Result<T>) -> Result<T>;
}

impl<T: Clone> OrInit<T> for OnceLock<T> {
    fn get_or_init_with(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let made = make()?;
        Ok(self.get_or_init(|| made).clone())
    }
}

/// Returns the path of `helm`, built from its module if there is no build yet.
///
/// # Errors
/// Go is not installed, or the build fails.
pub fn helm() -> Result<PathBuf> {
    built("helm", "helm.sh/helm/v4/cmd/helm")
}

/// Runs the build script, which waits for a concurrent build and does nothing if one exists.
fn built(module: &str, package: &str) -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("apiserver/build.sh");
    let output = Command::new(&script)
        .args([module, package])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", script.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{} {module}: {}: {said}", script.display(), output.status);
    }
    let path = String::from_utf8(output.stdout)?;
    Ok(PathBuf::from(path.trim()))
}
