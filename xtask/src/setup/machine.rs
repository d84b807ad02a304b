// SPDX-License-Identifier: Apache-2.0
//! Checks of the running kernel: BTF, cgroup2, and a bpf file system for the pins.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use super::Outcome;
use crate::run;

const BPFFS: &str = "/sys/fs/bpf";
const BTF: &str = "/sys/kernel/btf/vmlinux";

pub(super) fn ensure() -> Result<Outcome> {
    if !Path::new(BTF).exists() {
        bail!("{BTF} is not there: boot a kernel with CONFIG_DEBUG_INFO_BTF, as Debian's are");
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    if !mounted(&mounts, None, "cgroup2") {
        bail!("no cgroup2 is mounted; as root: mount -t cgroup2 none /sys/fs/cgroup");
    }
    if mounted(&mounts, Some(BPFFS), "bpf") {
        return Ok(Outcome::Present);
    }
    if !run::is_root() {
        bail!("run `cargo xtask setup` as root, or as root: mount -t bpf bpf {BPFFS}");
    }
    run::capture(run::command("mount").args(["-t", "bpf", "bpf", BPFFS])).with_context(|| {
        format!("{BPFFS} cannot be mounted; in a container, give it CAP_SYS_ADMIN and {BPFFS}")
    })?;
    Ok(Outcome::Done(format!("mounted {BPFFS}")))
}

/// Whether a file system of this kind is mounted, at this place if one is given.
fn mounted(mounts: &str, place: Option<&str>, kind: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, what) = (fields.next(), fields.next());
        what == Some(kind) && (place.is_none() || at == place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_is_found_by_path_and_type() {
        let mounts = "none /sys/fs/bpf bpf rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert!(mounted(mounts, Some(BPFFS), "bpf"));
        assert!(mounted(mounts, None, "cgroup2"));
        assert!(!mounted(
            "tmpfs /sys/fs/bpf tmpfs rw 0 0\n",
            Some(BPFFS),
            "bpf"
        ));
        assert!(!mounted("bpf /elsewhere bpf rw 0 0\n", Some(BPFFS), "bpf"));
    }
}
