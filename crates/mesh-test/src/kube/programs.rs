// SPDX-License-Identifier: Apache-2.0
//! Where the Kubernetes programs are: in KUBEBUILDER_ASSETS, or built from the module `apiserver`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::process::Cmd;

/// A directory with `etcd`, `kube-apiserver` and `kubectl`, as controller tests elsewhere use it.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// The servers and kubectl.
#[derive(Clone, Debug)]
pub struct Programs {
    /// One program that is all of them.
    all: PathBuf,
    assets: Option<PathBuf>,
}

impl Programs {
    /// Finds them; builds them first if that was never done, which takes minutes.
    ///
    /// # Errors
    /// Go is missing, or the build fails.
    pub fn find() -> Result<Self> {
        static ALL: OnceLock<PathBuf> = OnceLock::new();
        let assets = std::env::var_os(ASSETS).map(PathBuf::from);
        let complete = assets.as_ref().is_some_and(|dir| {
            let mut needed = ["etcd", "kube-apiserver", "kubectl"].iter();
            needed.all(|name| dir.join(name).is_file())
        });
        let all = match ALL.get() {
            Some(all) => all.clone(),
            // Only what the directory lacks needs the build.
            None if complete => PathBuf::from("kube"),
            None => ALL.get_or_init_with(|| built("apiserver", "."))?,
        };
        Ok(Self { all, assets })
    }

    /// A command that runs one of them.
    #[must_use]
    pub fn command(&self, name: &str) -> Cmd {
        let asset = self.assets.as_ref().map(|dir| dir.join(name));
        match asset.filter(|path| path.is_file()) {
            Some(path) => Cmd::new(path),
            None => Cmd::new(&self.all).args([name]),
        }
    }

    /// The one program that is all of them, with the name of one as its first argument.
    #[must_use]
    pub fn all(&self) -> &Path {
        &self.all
    }
}

/// `OnceLock::get_or_try_init` is not stable.
trait OrInit<T> {
    fn get_or_init_with(&self, make: impl FnOnce() -> Result<T>) -> Result<T>;
}

impl<T: Clone> OrInit<T> for OnceLock<T> {
    fn get_or_init_with(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let made = make()?;
        Ok(self.get_or_init(|| made).clone())
    }
}

/// The `helm` program, built from its module if that was never done.
///
/// # Errors
/// Go is missing, or the build fails.
pub fn helm() -> Result<PathBuf> {
    built("helm", "helm.sh/helm/v4/cmd/helm")
}

/// Runs the build, which does nothing where the program is there, and waits for one that runs.
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
