// SPDX-License-Identifier: Apache-2.0
//! The sources from Debian's own package, which backports carry for newer releases of Rust.
//!
//! apt runs with a configuration, lists and cache of its own: the machine's sources and
//! packages stay as they are. The mirror is the one that the machine already uses.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result, bail};

use super::{Toolchain, tree::Staging};
use crate::run;

/// The Debian suite with current releases of Rust for older systems.
const SUITE: &str = "trixie-backports";
const PACKAGE: &str = "rust-src";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

pub(super) fn fetch(toolchain: &Toolchain) -> Result<()> {
    let mirror = mirror()?;
    let apt = PrivateApt::create(&mirror)?;
    apt.run("apt-get", &["update", "--quiet"])
        .with_context(|| format!("{mirror} does not give {SUITE}"))?;
    let listed = apt.run("apt-cache", &["madison", PACKAGE])?;
    let version = choose(&listed, &toolchain.release)
        .with_context(|| format!("{SUITE} has no {PACKAGE} {}", toolchain.release))?;
    apt.run(
        "apt-get",
        &["download", "--quiet", &format!("{PACKAGE}={version}")],
    )?;
    let package = fs::read_dir(&apt.dir)
        .context("cannot read what apt downloaded")?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt downloaded nothing")?;
    let staging = Staging::beside(&toolchain.library())?;
    run::capture(
        run::command("dpkg-deb")
            .arg("--extract")
            .arg(&package)
            .arg(staging.path()),
    )?;
    staging.install(&staging.path().join("usr/src"), toolchain)
}

/// Returns the mirror from which this machine gets its own release of Debian.
fn mirror() -> Result<String> {
    if run::find("apt-get").is_none() {
        bail!("this is not Debian");
    }
    let system = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = system
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no release")?
        .trim_matches('"');
    let targets = run::capture(run::command("apt-get").args([
        "indextargets",
        "--format",
        "$(RELEASE) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(release, _)| *release == codename)
        .map(|(_, uri)| uri.trim().to_owned())
        .with_context(|| format!("apt's sources do not name {codename}"))
}

/// The newest packaging of a release, of lines like ` rust-src | 1.95.0+dfsg1-2 | ...`.
fn choose(madison: &str, release: &str) -> Option<String> {
    madison
        .lines()
        .filter_map(|line| line.split('|').nth(1).map(str::trim))
        .find(|version| {
            version
                .strip_prefix(release)
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.'))
        })
        .map(str::to_owned)
}

/// An apt that knows one suite of one mirror, in a directory that goes with it.
struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    fn create(mirror: &str) -> Result<Self> {
        let this = Self {
            dir: std::env::temp_dir().join(format!("mesh-apt-{}", process::id())),
        };
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(this.dir.join(name))
                .with_context(|| format!("cannot write to {}", this.dir.display()))?;
        }
        let signed = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        fs::write(
            this.dir.join("sources.list"),
            format!("deb {signed}{mirror} {SUITE} main\n"),
        )
        .context("cannot write apt's sources")?;
        Ok(this)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = run::command(program);
        command.current_dir(&self.dir);
        for (key, value) in [
            ("Dir::Etc::SourceList", "sources.list"),
            ("Dir::State::Lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command
                .arg("-o")
                .arg(format!("{key}={}", self.dir.join(value).display()));
        }
        command
            .args([
                "-o",
                "Dir::Etc::SourceParts=-",
                "-o",
                "APT::Sandbox::User=root",
            ])
            .args(["-o", "Acquire::Languages=none"])
            .args(args);
        run::capture(&mut command)
    }
}

impl Drop for PrivateApt {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            eprintln!("{} is left behind: {err}", self.dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_name_is_matched_exactly() {
        let madison = " rust-src | 1.95.1+dfsg1-1 | m\n rust-src | 1.95.0+dfsg1-2~bpo13+1 | m\n";
        assert_eq!(
            choose(madison, "1.95.0").as_deref(),
            Some("1.95.0+dfsg1-2~bpo13+1")
        );
        assert_eq!(choose(madison, "1.95"), None);
        assert_eq!(choose(" rust-src | 1.95.01-1 | m\n", "1.95.0"), None);
    }
}
