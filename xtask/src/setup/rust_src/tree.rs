// SPDX-License-Identifier: Apache-2.0
//! A source tree of the Rust library on disk: is it whole, of which version, and how it takes
//! its place in the toolchain.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result, bail};

use super::Toolchain;
use crate::run;

/// In a tree that this program installed: the version it is of. A toolchain that is updated in
/// place keeps a tree that its manager did not bring.
const MARKER: &str = ".mesh-setup-version";

/// The files that build-std resolves, including those that it does not compile.
const NEEDED: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "alloctests/Cargo.toml",
    "core/src/lib.rs",
    "coretests/Cargo.toml",
    "vendor",
];

pub(super) fn is_complete(library: &Path) -> bool {
    NEEDED.iter().all(|name| library.join(name).exists())
}

/// Returns whether the tree was installed by setup for another version.
pub(super) fn is_stale(library: &Path, release: &str) -> bool {
    fs::read_to_string(library.join(MARKER)).is_ok_and(|marker| marker.trim() != release)
}

/// A directory on the toolchain's own file system, removed on drop.
pub(super) struct Staging {
    dir: PathBuf,
    library: PathBuf,
}

impl Staging {
    pub(super) fn beside(library: &Path) -> Result<Self> {
        let parent = library.parent().context("the library has no parent")?;
        let dir = parent.join(format!(".mesh-setup-{}", process::id()));
        fs::create_dir_all(&dir).with_context(|| {
            format!(
                "{} cannot be written: run as the toolchain's owner",
                parent.display()
            )
        })?;
        Ok(Self {
            dir,
            library: library.to_owned(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Checks the tree that lies in or below `from` and puts it in its place.
    pub(super) fn install(&self, from: &Path, toolchain: &Toolchain) -> Result<()> {
        let found = find(from, 7).with_context(|| {
            format!(
                "{} has no whole `library` ({})",
                from.display(),
                NEEDED.join(", ")
            )
        })?;
        check_version(&found, &toolchain.release)?;
        let ready = self.dir.join("ready");
        if found.starts_with(&self.dir) {
            fs::rename(&found, &ready).context("cannot move the tree")?;
        } else {
            let mut copy = run::command("cp");
            copy.args(["--recursive", "--dereference", "--"])
                .arg(&found)
                .arg(&ready);
            run::capture(&mut copy)?;
        }
        fs::write(ready.join(MARKER), &toolchain.release).context("cannot mark the tree")?;
        let old = SetAside::new(&self.library)?;
        fs::rename(&ready, &self.library)
            .with_context(|| format!("cannot create {}", self.library.display()))?;
        old.forget()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            eprintln!("{} is left behind: {err}", self.dir.display());
        }
    }
}

/// The previous content of the tree's directory, which is restored on drop unless forgotten.
pub(super) struct SetAside {
    library: PathBuf,
    aside: Option<PathBuf>,
}

impl SetAside {
    pub(super) fn new(library: &Path) -> Result<Self> {
        let mut this = Self {
            library: library.to_owned(),
            aside: None,
        };
        if library.exists() {
            let aside = library.with_file_name(format!(".library-before-{}", process::id()));
            fs::rename(library, &aside)
                .with_context(|| format!("cannot move {} aside", library.display()))?;
            this.aside = Some(aside);
        }
        Ok(this)
    }

    /// Something better is in its place.
    pub(super) fn forget(mut self) -> Result<()> {
        match self.aside.take() {
            Some(aside) => fs::remove_dir_all(&aside)
                .with_context(|| format!("{} is left behind", aside.display())),
            None => Ok(()),
        }
    }
}

impl Drop for SetAside {
    fn drop(&mut self) {
        if let Some(aside) = &self.aside
            && let Err(err) = fs::rename(aside, &self.library)
        {
            eprintln!("{} is left behind: {err}", aside.display());
        }
    }
}

/// The whole tree that is nearest to `dir`, itself included.
fn find(dir: &Path, depth: u32) -> Option<PathBuf> {
    if is_complete(dir) {
        return Some(dir.to_owned());
    }
    let mut below: Vec<PathBuf> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| depth > 0 && path.is_dir() && !path.is_symlink())
        .collect();
    below.sort();
    below.iter().find_map(|path| find(path, depth - 1))
}

/// The library carries no version; but each release makes something stable and says since when.
fn check_version(library: &Path, release: &str) -> Result<()> {
    let mut newest = (0, 0);
    newest_since(&library.join("core/src"), &mut newest)?;
    let wanted = minor(release).with_context(|| format!("{release} is no version"))?;
    if newest != wanted {
        bail!(
            "it is of Rust {}.{}, and rustc is {release}",
            newest.0,
            newest.1
        );
    }
    Ok(())
}

fn newest_since(dir: &Path, newest: &mut (u32, u32)) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry
            .with_context(|| format!("cannot read {}", dir.display()))?
            .path();
        if path.is_dir() {
            newest_since(&path, newest)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            for line in text
                .lines()
                .filter(|line| line.trim_start().starts_with("#[stable("))
            {
                let since = line
                    .split_once("since = \"")
                    .and_then(|(_, rest)| minor(rest));
                *newest = (*newest).max(since.unwrap_or_default());
            }
        }
    }
    Ok(())
}

/// `1.95.0` and what may follow it: major and minor.
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(dir: &Path, since: &str) {
        for name in NEEDED {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().expect("it is below dir")).expect("it is ours");
            fs::write(
                path,
                format!("#[stable(feature = \"x\", since = \"{since}\")]\n"),
            )
            .expect("it is ours");
        }
    }

    #[test]
    fn rust_src_tree_is_found_checked_and_replaced() {
        let dir = std::env::temp_dir().join(format!("xtask-tree-{}", process::id()));
        let toolchain = Toolchain {
            sysroot: dir.join("root"),
            release: "1.95.0".to_owned(),
        };
        let library = toolchain.library();
        tree(&dir.join("src/usr/library"), "1.95.0");
        tree(&dir.join("newer/library"), "1.96.0");
        tree(&library, "1.94.0");
        fs::write(library.join(MARKER), "1.94.0").expect("it is ours");
        assert!(is_complete(&library) && is_stale(&library, "1.95.0"));

        let staging = Staging::beside(&library).expect("it is ours");
        let err = staging
            .install(&dir.join("newer"), &toolchain)
            .expect_err("it is newer");
        assert!(err.to_string().contains("1.96"), "{err:#}");
        assert!(
            is_stale(&library, "1.95.0"),
            "the old one is still in its place"
        );
        staging
            .install(&dir.join("src"), &toolchain)
            .expect("it fits");
        drop(staging);
        assert!(is_complete(&library) && !is_stale(&library, "1.95.0"));
        let beside = fs::read_dir(library.parent().expect("it has one")).expect("it is ours");
        assert_eq!(beside.count(), 1, "nothing is left behind");
        fs::remove_dir_all(&dir).expect("it is ours");
    }

    #[test]
    fn replaced_rust_src_tree_is_restored() {
        let dir = std::env::temp_dir().join(format!("xtask-aside-{}", process::id()));
        let library = dir.join("library");
        fs::create_dir_all(&library).expect("it is ours");
        let aside = SetAside::new(&library).expect("it is ours");
        assert!(!library.exists());
        drop(aside);
        assert!(library.exists());
        fs::remove_dir_all(&dir).expect("it is ours");
    }

    #[test]
    fn rust_versions_compare_numerically() {
        assert_eq!(minor("1.95.0"), Some((1, 95)));
        assert_eq!(minor("1.100.0-nightly"), Some((1, 100)));
        assert_eq!(minor("CURRENT"), None);
    }
}
