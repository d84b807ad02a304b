// SPDX-License-Identifier: Apache-2.0
//! Debian's kernels, unpacked and never installed, and what starts them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::run;

/// The packages that boot a kernel, besides those of setup.
const TOOLS: [&str; 4] = ["busybox", "cpio", "kmod", "qemu-system-x86"];

/// Suites that have newer kernels than this machine's Debian.
const NEWER: &str = "trixie-backports";

/// The keys that sign Debian's packages.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
pub(super) struct Kernel {
    /// The release, as printed by `uname -r`.
    pub(super) version: String,
    /// The image.
    pub(super) image: PathBuf,
    /// `lib/modules`, with its index.
    pub(super) modules: PathBuf,
}

/// Installs what is missing.
pub(super) fn ensure() -> Result<()> {
    let programs = ["busybox", "cpio", "depmod", "qemu-system-x86_64"];
    if programs.iter().all(|program| run::find(program).is_some()) {
        return Ok(());
    }
    let mut install = run::command("apt-get");
    install
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(TOOLS)
        .env("DEBIAN_FRONTEND", "noninteractive");
    run::capture(&mut install).map(drop)
}

pub(super) fn directory() -> PathBuf {
    run::root().join("target/kernels")
}

/// The newest cloud kernel of a series, downloaded unless it is there.
pub(super) fn fetch(series: &str) -> Result<Kernel> {
    let apt = Apt::new()?;
    let names = apt.names(series)?;
    let newest = names.into_iter().max_by_key(|name| numbers(name));
    let package = newest.with_context(|| format!("Debian has no cloud kernel {series}"))?;
    let (_, version) = package.split_once("-").context("a name has parts")?;
    let (_, version) = version.split_once("-").context("a name has a version")?;
    let place = directory().join(version);
    if !place.is_dir() {
        let draft = directory().join(format!(".{version}"));
        fs::create_dir_all(&draft)?;
        let mut packages = vec![package.clone()];
        // The newest kernels are split.
        if package.starts_with("linux-binary-") {
            packages.push(format!("linux-modules-{version}"));
        }
        apt.unpack(&packages, &draft)?;
        fs::rename(&draft, &place)?;
    }
    let image = [
        place.join(format!("boot/vmlinuz-{version}")),
        place.join(format!("usr/lib/modules/{version}/vmlinuz")),
    ];
    let image = image.into_iter().find(|path| path.is_file());
    let base = ["", "usr"].map(|dir| place.join(dir));
    let base = base
        .into_iter()
        .find(|dir| dir.join("lib/modules").is_dir());
    let base = base.with_context(|| format!("{package} has no modules"))?;
    run::capture(run::command("depmod").arg("-b").arg(&base).arg(version))?;
    Ok(Kernel {
        version: version.to_owned(),
        image: image.with_context(|| format!("{package} has no image"))?,
        modules: base.join("lib/modules"),
    })
}

/// The numbers in a name, by which versions are compared.
fn numbers(name: &str) -> Vec<u64> {
    let parts = name.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

/// Apt with lists of its own: nothing that it does changes the machine.
struct Apt {
    config: PathBuf,
}

impl Apt {
    fn new() -> Result<Self> {
        let base = directory().join("apt");
        fs::create_dir_all(base.join("lists/partial"))?;
        fs::create_dir_all(base.join("archives/partial"))?;
        let sources = base.join("sources.list");
        let config = base.join("apt.conf");
        let apt = Self {
            config: config.clone(),
        };
        if sources.is_file() {
            return Ok(apt);
        }
        let mut text = String::new();
        let targets = run::capture(run::command("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(RELEASE) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ]))?;
        let mut known: Vec<Vec<&str>> = targets
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .filter(|words| words.len() == 4 && words[0] == "Debian" && words[2] == "main")
            .collect();
        known.sort();
        known.dedup();
        for words in &known {
            text += &format!("deb [signed-by={KEYS}] {} {} main\n", words[3], words[1]);
            if !words[1].contains('-') {
                text += &format!("deb [signed-by={KEYS}] {} {NEWER} main\n", words[3]);
            }
        }
        ensure!(!text.is_empty(), "apt knows no sources of Debian");
        let base = base.display();
        fs::write(
            &config,
            format!(
                "Dir::Etc::sourcelist \"{base}/sources.list\";\n\
                 Dir::Etc::sourceparts \"/dev/null\";\n\
                 Dir::State::lists \"{base}/lists\";\n\
                 Dir::Cache::archives \"{base}/archives\";\n\
                 Dir::Cache::pkgcache \"\";\nDir::Cache::srcpkgcache \"\";\n"
            ),
        )?;
        fs::write(&sources, text)?;
        let updated = run::capture(apt.command("apt-get").args(["update", "--quiet"]));
        if updated.is_err() {
            fs::remove_file(&sources)?;
        }
        updated.map(|_| apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = run::command(program);
        command.env("APT_CONFIG", &self.config);
        command
    }

    /// Packages with a kernel of a series.
    fn names(&self, series: &str) -> Result<Vec<String>> {
        let dotted = series.replace('.', "\\.");
        let pattern = format!("^linux-(image|binary)-{dotted}[.-].*-cloud-amd64$");
        let mut search = self.command("apt-cache");
        let found = run::capture(search.args(["search", "--names-only", &pattern]))?;
        let names: Vec<String> = found
            .lines()
            .filter_map(|line| line.split(' ').next().map(str::to_owned))
            .collect();
        // Where there is a binary package, that of the image is empty.
        let is_split = |name: &String| name.starts_with("linux-binary-");
        let split = names.iter().any(is_split);
        Ok(names
            .into_iter()
            .filter(|name| is_split(name) == split)
            .collect())
    }

    fn unpack(&self, packages: &[String], to: &Path) -> Result<()> {
        let mut download = self.command("apt-get");
        download.args(["download", "--quiet"]).args(packages);
        run::capture(download.current_dir(to))?;
        for entry in to.read_dir()? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                run::capture(run::command("dpkg-deb").arg("-x").arg(&file).arg(to))?;
                fs::remove_file(file)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_compare_numerically() {
        let image = |version: &str| numbers(&format!("linux-image-{version}-cloud-amd64"));
        assert!(image("6.1.0-9") < image("6.1.0-56"));
        assert!(image("6.12.97+deb12") < image("6.12.115+deb12"));
    }
}
