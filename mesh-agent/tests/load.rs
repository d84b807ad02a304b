// SPDX-License-Identifier: Apache-2.0
//! The object that the build embeds: the kernel's verifier takes it, and it attaches.
//!
//! Needs root, cgroup2 and a kernel with BTF; without them it fails, it does not skip.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process,
};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSockAddr, loaded_links},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-bpf"));

/// A cgroup without processes, removed on drop.
struct Cgroup(PathBuf);

impl Cgroup {
    fn create(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts are readable");
        let root = mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ').skip(1);
                let (path, kind) = (fields.next()?, fields.next()?);
                (kind == "cgroup2").then_some(path)
            })
            .next()
            .expect("cgroup2 is mounted");
        let path = Path::new(root).join(format!("{name}-{}", process::id()));
        fs::create_dir(&path).expect("root may make a cgroup");
        Self(path)
    }

    fn open(&self) -> File {
        File::open(&self.0).expect("the cgroup was just made")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_dir(&self.0) {
            eprintln!("{} is left behind: {err}", self.0.display());
        }
    }
}

#[test]
fn connect4_loads_and_attaches_to_a_fresh_cgroup() {
    let cgroup = Cgroup::create("mesh-load");
    let mut object = Ebpf::load(OBJECT).expect("the object loads");
    let hook: &mut CgroupSockAddr = object
        .program_mut("connect4")
        .expect("the object has connect4")
        .try_into()
        .expect("connect4 is a cgroup_sock_addr program");
    hook.load().expect("the verifier takes connect4");
    let id = hook.info().expect("a loaded program has information").id();

    let attached = || {
        loaded_links()
            .filter_map(Result::ok)
            .filter(|link| link.program_id() == id)
            .count()
    };
    assert_eq!(attached(), 0);
    let link = hook
        .attach(cgroup.open(), CgroupAttachMode::Single)
        .expect("connect4 attaches");
    assert_eq!(attached(), 1, "the kernel lists the link");
    hook.detach(link).expect("the link detaches");
    assert_eq!(attached(), 0, "the link is gone");
}
