// SPDX-License-Identifier: Apache-2.0
//! The Debian packages that build the workspace, and those that tests and the demo run.
//!
//! Their services are never started: the demo runs its own instances in its own namespaces.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::Outcome;
use crate::run;

const PACKAGES: &[&str] = &[
    // Build.
    "ca-certificates",
    "g++",
    "gcc",
    "git",
    "libc6-dev",
    "xz-utils",
    // The namespaces of tests and demo, and the look at them from outside.
    "ethtool",
    "iproute2",
    "iputils-ping",
    "mount",
    "nftables",
    "procps",
    "tcpdump",
    "util-linux",
    // The applications in the pods.
    "curl",
    "netcat-openbsd",
    "nginx-light",
    "openssl",
    "postgresql",
    "python3",
    "redis-server",
    // The nodes of the real cluster: container runtime, its network plugins, kube-proxy's tool.
    "containerd",
    "containernetworking-plugins",
    "iptables",
    "runc",
    // For promtool, which checks the metrics page.
    "prometheus",
];

/// Debian's invoke-rc.d asks this program whether it may start a service; 101 is no.
const POLICY: &str = "/usr/sbin/policy-rc.d";

pub(super) fn ensure() -> Result<Outcome> {
    if run::find("dpkg-query").is_none() {
        bail!(
            "this is not Debian: install by hand what provides these packages of Debian 12: {}",
            PACKAGES.join(" ")
        );
    }
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(Outcome::Present);
    }
    if !run::is_root() {
        bail!(
            "run `cargo xtask setup` as root, or as root: apt-get install {}",
            missing.join(" ")
        );
    }
    let _policy = NoServices::until_drop(Path::new(POLICY))?;
    // A third source of the machine that does not answer is not our failure: what we need is
    // decided by the installation.
    let update = run::capture(run::command("apt-get").args(["update", "--quiet"]));
    let mut install = run::command("apt-get");
    install
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(["-o", "Dpkg::Options::=--force-confold"])
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive");
    if let Err(err) = run::capture(&mut install) {
        let update = update
            .err()
            .map(|err| format!("; before that: {err:#}"))
            .unwrap_or_default();
        bail!(
            "{err:#}{update}. Check that apt's sources answer (apt-get update), or install by \
             hand: {}",
            missing.join(" ")
        );
    }
    Ok(Outcome::Done(format!("installed {}", missing.join(" "))))
}

fn missing() -> Result<Vec<&'static str>> {
    let mut query = run::command("dpkg-query");
    query
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES);
    // It fails when it has never heard of one of them, and still lists the others.
    let output = run::output(&mut query)?;
    Ok(not_installed(
        PACKAGES,
        &String::from_utf8_lossy(&output.stdout),
    ))
}

fn not_installed<'a>(wanted: &[&'a str], listed: &str) -> Vec<&'a str> {
    let installed: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    wanted
        .iter()
        .copied()
        .filter(|name| !installed.contains(name))
        .collect()
}

/// While it lives, an installed package does not start its service. What was there before
/// returns on drop, or at the next run if this one was killed.
struct NoServices {
    policy: PathBuf,
    saved: PathBuf,
}

impl NoServices {
    fn until_drop(policy: &Path) -> Result<Self> {
        let this = Self {
            policy: policy.to_owned(),
            saved: policy.with_file_name("policy-rc.d.before-mesh-setup"),
        };
        this.restore()
            .with_context(|| format!("cannot restore {}", this.policy.display()))?;
        match fs::rename(&this.policy, &this.saved) {
            Ok(()) => {}
            Err(err) if err.kind() == ErrorKind::NotFound => {
                // An empty file stands for "there was none".
                fs::write(&this.saved, "")
                    .with_context(|| format!("cannot write {}", this.saved.display()))?;
            }
            Err(err) => {
                return Err(err)
                    .with_context(|| format!("cannot move {} aside", this.policy.display()));
            }
        }
        fs::write(&this.policy, "#!/bin/sh\nexit 101\n")
            .and_then(|()| fs::set_permissions(&this.policy, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot write {}", this.policy.display()))?;
        Ok(this)
    }

    fn restore(&self) -> std::io::Result<()> {
        match fs::metadata(&self.saved) {
            Err(err) if err.kind() == ErrorKind::NotFound => Ok(()),
            Err(err) => Err(err),
            Ok(saved) if saved.len() > 0 => fs::rename(&self.saved, &self.policy),
            Ok(_) => {
                if let Err(err) = fs::remove_file(&self.policy)
                    && err.kind() != ErrorKind::NotFound
                {
                    return Err(err);
                }
                fs::remove_file(&self.saved)
            }
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Err(err) = self.restore() {
            eprintln!(
                "{} still forbids services to start ({err}): move {} over it",
                self.policy.display(),
                self.saved.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_package_state_counts() {
        let listed = "curl installed\npython3 config-files\n";
        assert_eq!(
            not_installed(&["curl", "python3", "nginx"], listed),
            ["python3", "nginx"]
        );
    }

    #[test]
    fn service_start_policy_is_restored_after_kill() {
        let dir = std::env::temp_dir().join(format!("xtask-policy-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("the directory is ours");
        let policy = dir.join("policy-rc.d");

        let guard = NoServices::until_drop(&policy).expect("the directory is ours");
        assert!(
            fs::read_to_string(&policy)
                .expect("it was written")
                .contains("101")
        );
        drop(guard);
        assert!(!policy.exists(), "there was none before");

        fs::write(&policy, "mine").expect("the directory is ours");
        // A run that was killed: nothing restores.
        std::mem::forget(NoServices::until_drop(&policy).expect("the directory is ours"));
        assert_ne!(fs::read_to_string(&policy).expect("it was written"), "mine");
        drop(NoServices::until_drop(&policy).expect("the directory is ours"));
        assert_eq!(fs::read_to_string(&policy).expect("it returned"), "mine");
        assert_eq!(
            fs::read_dir(&dir).expect("the directory is ours").count(),
            1
        );
        fs::remove_dir_all(&dir).expect("the directory is ours");
    }
}
