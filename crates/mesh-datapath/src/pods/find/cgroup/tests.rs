// SPDX-License-Identifier: Apache-2.0

use super::*;

const ID: &str = "0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88";

#[test]
fn all_kubelet_cgroup_layouts_are_parsed() {
    let layouts = [
        "0::/kubepods/pod0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88/c0ffee",
        "0::/kubepods/burstable/pod0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88/c0ffee",
        "0::/a-root/kubepods/besteffort/pod0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88",
        "0::/kubepods.slice/kubepods-pod0f4c9f5e_2b1d_4c1e_9a57_3d2f1c0b9a88.slice/cri-containerd-c0ffee.scope",
        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f4c9f5e_2b1d_4c1e_9a57_3d2f1c0b9a88.slice/crio-c0ffee.scope/container",
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0f4c9f5e_2b1d_4c1e_9a57_3d2f1c0b9a88.slice/cri-containerd-c0ffee.scope",
        // As seen from a container with its own cgroup namespace.
        "0::/../../pod0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88/c0ffee",
        "0::/../../kubepods-burstable-pod0f4c9f5e_2b1d_4c1e_9a57_3d2f1c0b9a88.slice/cri-containerd-c0ffee.scope",
        // cgroup v1 and hybrid.
        "12:cpuset:/\n3:cpu,cpuacct:/kubepods/besteffort/pod0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88/c0ffee\n1:name=systemd:/kubepods/besteffort/pod0f4c9f5e-2b1d-4c1e-9a57-3d2f1c0b9a88/c0ffee\n0::/system.slice/containerd.service",
        // containerd with the systemd driver and cgroup v1.
        "4:memory:/system.slice/containerd.service/kubepods-burstable-pod0f4c9f5e_2b1d_4c1e_9a57_3d2f1c0b9a88.slice:cri-containerd:c0ffee",
    ];
    for layout in &layouts[..9] {
        assert_eq!(pod_of(layout).as_deref(), Some(ID), "{layout}");
    }
    assert_eq!(pod_of(layouts[9]).as_deref(), Some(ID));
}

#[test]
fn static_pod_uid_is_a_hash() {
    let hash = "0f4c9f5e2b1d4c1e9a573d2f1c0b9a88";
    for layout in [
        format!("0::/kubepods/burstable/pod{hash}/c0ffee"),
        format!("0::/kubepods.slice/kubepods-pod{hash}.slice/cri-containerd-c0ffee.scope"),
    ] {
        assert_eq!(pod_of(&layout).as_deref(), Some(hash), "{layout}");
    }
}

#[test]
fn process_outside_pod_cgroups_belongs_to_no_pod() {
    for other in [
        "0::/",
        "0::/user.slice/user-0.slice/session-1.scope",
        "0::/kubepods/burstable",
        "0::/kubepods/podman/c0ffee",
        "0::/kubepods/pod0f4c9f5e-2b1d-4c1e-9a57",
        "",
    ] {
        assert_eq!(pod_of(other), None, "{other}");
    }
}

#[test]
fn pod_cannot_impersonate_another_pod() {
    let other = "aaaaaaaa-2b1d-4c1e-9a57-3d2f1c0b9a88";
    // A container created a cgroup below its own.
    let nested = format!("0::/kubepods/pod{ID}/c0ffee/kubepods/pod{other}");
    assert_eq!(pod_of(&nested).as_deref(), Some(ID));
    let moved = format!("1:cpu:/kubepods/pod{ID}/x\n0::/kubepods/pod{other}/x");
    assert_eq!(pod_of(&moved), None);
}

#[test]
fn start_time_is_parsed_with_special_characters_in_the_command_name() {
    let stat = "77 (a) (b 1 2) S 1 77 77 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 123456 1 2";
    assert_eq!(start(stat), Some(123_456));
    assert!(start(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap() > 0);
}

#[test]
fn oldest_process_of_a_pod_is_found() {
    let dir = tempfile::TempDir::new().unwrap();
    let process = |id: u32, start: u64, cgroup: &str| {
        let at = dir.path().join(id.to_string());
        fs::create_dir(&at).unwrap();
        fs::write(at.join("cgroup"), cgroup).unwrap();
        let stat = format!("{id} (x) S{} {start} 0", " 1".repeat(18));
        fs::write(at.join("stat"), stat).unwrap();
    };
    process(30, 500, &format!("0::/kubepods/pod{ID}/app"));
    process(40, 300, &format!("0::/kubepods/pod{ID}/pause"));
    process(20, 100, "0::/init.scope");
    fs::create_dir(dir.path().join("self")).unwrap();
    let hash = "0f4c9f5e2b1d4c1e9a573d2f1c0b9a88";
    process(50, 600, &format!("0::/kubepods/pod{hash}/pause"));
    let find = ByCgroup::new(dir.path());
    assert_eq!(find.oldest(ID).unwrap(), Some(40));
    let path = |static_uid: Option<&str>| {
        let pod = LocalPod {
            static_uid: static_uid.map(str::to_owned),
            ..LocalPod::default()
        };
        find.path(ID, &pod).unwrap()
    };
    assert_eq!(path(None), dir.path().join("40/ns/net"));
    assert_eq!(path(Some(hash)), dir.path().join("50/ns/net"));
    assert_eq!(find.oldest("another").unwrap(), None);
}
