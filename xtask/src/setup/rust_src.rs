// SPDX-License-Identifier: Apache-2.0
//! The sources of the Rust library in the toolchain: core is compiled from them for the kernel
//! target, so they must be of exactly rustc's version.
//!
//! Sources are asked in a fixed order; one that the user named is the only one asked. What is
//! found is checked before it takes its place, which happens by one rename.

mod debian;
mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use self::tree::Staging;
use super::Outcome;
use crate::run;

/// The location of the toolchain, and the sources that it needs.
struct Toolchain {
    sysroot: PathBuf,
    /// For example `1.95.0`.
    release: String,
}

impl Toolchain {
    fn current() -> Result<Self> {
        let verbose = run::capture(run::command("rustc").arg("-vV"))
            .context("Rust is needed first: install rustc and cargo 1.95 or later")?;
        let release = verbose
            .lines()
            .find_map(|line| line.strip_prefix("release: "))
            .context("rustc -vV names no release")?
            .to_owned();
        let sysroot = run::capture(run::command("rustc").args(["--print", "sysroot"]))?;
        Ok(Self {
            sysroot: PathBuf::from(sysroot.trim()),
            release,
        })
    }

    /// The directory that build-std searches.
    fn library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }
}

/// One place to get the sources from, as errors name it.
type Source<'a> = (&'a str, &'a dyn Fn(&Toolchain) -> Result<()>);

pub(super) fn ensure(given: Option<&Path>) -> Result<Outcome> {
    let toolchain = Toolchain::current()?;
    let library = toolchain.library();
    if tree::is_complete(&library) && !tree::is_stale(&library, &toolchain.release) {
        return Ok(Outcome::Present);
    }
    if let Some(path) = given {
        from_path(&toolchain, path)
            .with_context(|| format!("{} cannot be used", path.display()))?;
        return Ok(Outcome::Done(format!(
            "{} from {}",
            toolchain.release,
            path.display()
        )));
    }
    let sources: [Source<'_>; 3] = [
        ("rustup", &from_rustup),
        ("../shared/toolchain", &from_shared),
        ("Debian's package", &debian::fetch),
    ];
    let mut tried = Vec::new();
    for (name, fetch) in sources {
        match fetch(&toolchain) {
            Ok(()) => return Ok(Outcome::Done(format!("{} from {name}", toolchain.release))),
            Err(err) => tried.push(format!("{name}: {err:#}")),
        }
    }
    bail!(
        "no source of rust-src {release} worked ({}). Get rust-src-{release}.tar.xz on any machine \
         and run: cargo xtask setup --rust-src PATH",
        tried.join("; "),
        release = toolchain.release,
    )
}

/// A directory, or an archive that tar can read.
fn from_path(toolchain: &Toolchain, path: &Path) -> Result<()> {
    // The user's own directory, not the workspace's: other programs start there.
    let path = fs::canonicalize(path).context("it is not there")?;
    let staging = Staging::beside(&toolchain.library())?;
    if path.is_dir() {
        return staging.install(&path, toolchain);
    }
    let mut tar = run::command("tar");
    tar.arg("--extract")
        .arg("--file")
        .arg(&path)
        .arg("--directory")
        .arg(staging.path());
    run::capture(&mut tar)?;
    staging.install(staging.path(), toolchain)
}

/// The component of the toolchain, where rustup manages it and can reach its server.
fn from_rustup(toolchain: &Toolchain) -> Result<()> {
    if run::find("rustup").is_none() {
        bail!("not installed");
    }
    let name = toolchain
        .sysroot
        .file_name()
        .and_then(|name| name.to_str())
        .context("the toolchain has no name")?;
    // rustup refuses to write over files that it did not bring.
    let aside = tree::SetAside::new(&toolchain.library())?;
    let mut rustup = run::command("timeout");
    rustup
        .args([
            "60",
            "rustup",
            "component",
            "add",
            "rust-src",
            "--toolchain",
            name,
        ])
        .env("RUSTUP_MAX_RETRIES", "0")
        .env("RUST_BACKTRACE", "0");
    run::capture(&mut rustup)?;
    if !tree::is_complete(&toolchain.library()) {
        bail!("rustup added a component that is not complete");
    }
    aside.forget()
}

/// Returns the sources beside the checkout.
fn from_shared(toolchain: &Toolchain) -> Result<()> {
    let file = format!("../shared/toolchain/rust-src-{}.tar.xz", toolchain.release);
    from_path(toolchain, &run::root().join(file))
}
