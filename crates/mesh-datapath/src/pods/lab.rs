// SPDX-License-Identifier: Apache-2.0
//! A node and a pod for unit tests: two network namespaces without a name, connected by a veth pair. Every
//! function panics when the kernel refuses.

use std::time::{Duration, Instant};

use mesh_plan::plan::LocalPod;

use mesh_sys::lab::{fresh, ip, path};
use mesh_sys::netns::NetNs;

/// The pod's IPv4 address.
pub const V4: &str = "10.244.9.2";
/// The pod's IPv6 address.
pub const V6: &str = "fd00:9::2";

/// A node and a pod of the unit tests.
pub struct Lab {
    /// The network namespace of the node.
    pub node: NetNs,
    /// The network namespace of the pod.
    pub pod: NetNs,
    /// The pod as a plan has it.
    pub local: LocalPod,
}

/// Creates a node and a pod with these addresses. The pod's interface is not named eth0 and is not the first one.
pub fn lab(addresses: &[&str]) -> Lab {
    let (node, pod) = (fresh(), fresh());
    let file = path(&pod);
    node.run(|| {
        ip(&["link", "add", "bridge7", "type", "bridge"]);
        let pod = file.to_str().expect("it is text");
        ip(&[
            "link", "add", "host7", "type", "veth", "peer", "name", "net7", "netns", pod,
        ]);
        ip(&["link", "set", "host7", "addrgenmode", "none"]);
        ip(&["link", "set", "host7", "up"]);
    })
    .expect("it can be entered");
    pod.run(|| {
        ip(&["link", "set", "net7", "addrgenmode", "none"]);
        ip(&["link", "set", "net7", "up"]);
        for address in addresses {
            let v6 = address.contains(':');
            let prefix = format!("{address}/{}", if v6 { 64 } else { 24 });
            let nodad: &[&str] = if v6 { &["nodad"] } else { &[] };
            ip(&[&["addr", "add", &prefix, "dev", "net7"], nodad].concat());
        }
    })
    .expect("it can be entered");
    settle(&pod, addresses);
    let local = LocalPod {
        addresses: addresses
            .iter()
            .map(|a| a.parse().expect("valid"))
            .collect(),
        netns_path: Some(file.display().to_string()),
        ..LocalPod::default()
    };
    Lab { node, pod, local }
}

/// Waits until the kernel has added the local routes of a new link, so that a test does not see them as a
/// change later.
fn settle(pod: &NetNs, addresses: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let routes = pod
            .run(|| {
                ip(&["route", "show", "table", "local"])
                    + &ip(&["-6", "route", "show", "table", "local"])
            })
            .expect("it can be entered");
        if addresses
            .iter()
            .all(|a| routes.contains(&format!("local {a} dev net7")))
        {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the link does not come up: {routes}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
