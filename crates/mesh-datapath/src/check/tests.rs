// SPDX-License-Identifier: Apache-2.0
//! Runs the check on this machine. Needs root.

use std::path::PathBuf;

use super::*;
use mesh_config::cgroup2_mount;

fn here() -> Host {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    Host {
        cgroup: cgroup2_mount(&mounts).expect("cgroup2 is mounted"),
        bpffs: PathBuf::from("/sys/fs/bpf"),
        cni_conf: "/etc/cni/net.d".into(),
    }
}

/// Returns the number of temporary directories of this process that remain after all tests have ended.
fn left_behind(config: &Host) -> usize {
    let prefix = format!("mesh-check-{}-", std::process::id());
    let count = || {
        [&config.cgroup, &config.bpffs]
            .into_iter()
            .filter_map(|parent| std::fs::read_dir(parent).ok())
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .count()
    };
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while count() > 0 && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    count()
}

#[test]
fn check_passes_on_this_machine_and_leaves_nothing_behind() {
    let config = here();
    let report = run(&config);
    for finding in &report.0 {
        let present = matches!(finding.outcome, Outcome::Present(_));
        assert!(present, "{report}");
    }
    assert_eq!(report.exit_code(), 0);
    assert_eq!(left_behind(&config), 0);
}

#[test]
fn missing_required_feature_is_explained_with_exit_code_69() {
    let config = Host {
        bpffs: PathBuf::from("/tmp"),
        ..here()
    };
    let report = run(&config);
    assert_eq!(report.exit_code(), 69);
    let text = report.to_string();
    assert!(text.contains("MISSING  bpffs"), "{text}");
    assert!(text.contains("mount -t bpf bpf /sys/fs/bpf"), "{text}");
    assert!(text.contains("MISSING  kernel programs"), "{text}");
    assert_eq!(left_behind(&config), 0);
}

#[test]
fn missing_optional_feature_does_not_fail_the_check() {
    let report = Report(vec![Finding {
        what: "a thing",
        needed: false,
        outcome: Outcome::Missing("too old".to_owned()),
        meaning: "less of it",
    }]);
    assert_eq!(report.exit_code(), 0);
    let text = report.to_string();
    assert!(text.starts_with("absent   a thing  too old\n"), "{text}");
    assert!(text.contains("-> less of it"), "{text}");
}
