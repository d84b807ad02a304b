// SPDX-License-Identifier: Apache-2.0
//! The capabilities that the agent is given: the same everywhere, and enough for `mesh-agent check`.
//!
//! Needs root and setpriv (util-linux).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_config::cgroup2_mount;

fn deployed(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(file);
    fs::read_to_string(&path).expect("it is deployed")
}

/// Returns the capabilities that the systemd unit grants.
fn of_the_unit() -> BTreeSet<String> {
    let unit = deployed("systemd/mesh-agent.service");
    let lines = unit
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let words = lines.flat_map(str::split_whitespace);
    words
        .map(|word| word.strip_prefix("CAP_").expect("a capability").to_owned())
        .collect()
}

#[test]
fn unit_and_pod_have_the_same_capabilities() {
    let pod = deployed("base/agent.yaml");
    let (_, list) = pod.split_once("add:\n").expect("a list of capabilities");
    let lines = list.lines().map(str::trim);
    let lines = lines.take_while(|line| line.starts_with(['-', '#']));
    let pod: BTreeSet<_> = lines
        .filter_map(|line| line.strip_prefix("- ").map(str::to_owned))
        .collect();
    assert!(pod.len() >= 4, "{pod:?}");
    assert_eq!(of_the_unit(), pod);
}

/// A cgroup below the root of version 2, as every machine with systemd or a kubelet has some; removed
/// on drop.
struct Below(PathBuf);

impl Below {
    fn make(test: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("the table of mounts");
        let root = cgroup2_mount(&mounts).expect("cgroup2 is mounted");
        let below = root.join(format!("capabilities-{test}-{}", std::process::id()));
        fs::create_dir(&below).expect("root may make a cgroup");
        Self(below)
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        // What cannot be removed is seen by whoever looks for leftovers.
        drop(fs::remove_dir(&self.0));
    }
}

/// Whether `mesh-agent check` is content with these capabilities, and what it says.
fn check(with: &BTreeSet<String>) -> (bool, String) {
    let list = with.iter().map(|name| format!(",+{}", name.to_lowercase()));
    let list = format!("-all{}", list.collect::<String>());
    let output = Command::new("setpriv")
        .args(["--no-new-privs", "--inh-caps=-all"])
        .arg(format!("--bounding-set={list}"))
        .args([env!("CARGO_BIN_EXE_mesh-agent"), "check"])
        .output()
        .expect("setpriv runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

#[test]
fn check_names_a_missing_capability() {
    let _below = Below::make("each");
    for gone in of_the_unit() {
        let mut rest = of_the_unit();
        rest.remove(&gone);
        let (content, said) = check(&rest);
        assert!(!content, "{gone}: {said}");
        assert!(said.contains(&format!("missing CAP_{gone}")), "{said}");
    }
}

#[test]
fn check_can_run_with_these_capabilities_alone() {
    let _below = Below::make("all");
    let (content, said) = check(&of_the_unit());
    assert!(content, "{said}");
    for line in ["ok       kernel programs", "ok       gate (tcx)"] {
        assert!(said.contains(line), "{said}");
    }
}
