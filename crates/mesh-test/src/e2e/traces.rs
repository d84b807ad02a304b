// SPDX-License-Identifier: Apache-2.0
//! Everything that the mesh creates on a node, as the kernel shows it: present while the mesh is
//! installed, absent afterwards.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;

use crate::cluster::{Machine, SOON};
use crate::process::Cmd;

/// Script that lists attached BPF programs (BPF_PROG_QUERY of linux/bpf.h: command 16; attach types
/// 46 and 47 are tcx, 36 is sk_lookup) on the node's interfaces, cgroups and pod namespaces.
const ATTACHED: &str = r#"
import ctypes, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def programs(target, kind):
    attr = ctypes.create_string_buffer(struct.pack("IIIIQI", target, kind, 0, 0, 0, 0), 64)
    return struct.unpack_from("I", attr, 24)[0] if libc.syscall(321, 16, attr, 64) == 0 else 0
def of(path, kinds):
    fd = os.open(path, os.O_RDONLY)
    try:
        return sum(programs(fd, kind) for kind in kinds)
    finally:
        os.close(fd)
def show(what, count):
    if count:
        print(what, count)
for index, name in socket.if_nameindex():
    show("interface " + name, programs(index, 46) + programs(index, 47))
cgroup = [3, 10, 11, 14, 15, 19, 20, 29, 30]
for path, _, _ in os.walk("/sys/fs/cgroup/unified"):
    show("cgroup " + path, of(path, cgroup))
for name in os.listdir("/run/netns"):
    show("namespace " + name, of("/run/netns/" + name, [36]))
"#;

/// The kinds of attach targets in the output of [`ATTACHED`].
const TARGETS: [(&str, &str); 3] = [
    ("interface", "programs on interfaces"),
    ("cgroup", "programs on cgroups"),
    ("namespace", "programs in pods' namespaces"),
];

/// Commands that print one line for each object of a kind.
const LOOKS: &[(&str, &str)] = &[
    ("pins", "find /sys/fs/bpf/mesh -type f 2>/dev/null || true"),
    (
        "rules in pods",
        "for n in /run/netns/*; do for f in -4 -6; do \
         nsenter --net=$n ip $f rule | grep -E '^9000:|1978[12]' || true; done; done",
    ),
    (
        "routes in pods",
        "for n in /run/netns/*; do for f in -4 -6; do \
         nsenter --net=$n ip $f route show table all | grep -E 'table 1978[12]' || true; done; done",
    ),
    (
        "switches in pods",
        "for n in /run/netns/*; do nsenter --net=$n sh -c \
         'grep -l 1 /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv4/fwmark_reflect' || true; done",
    ),
    (
        "listeners in pods",
        // The agent's listeners are transparent sockets on loopback in the pod's namespace.
        "for n in /run/netns/*; do nsenter --net=$n ss -Hltnp | grep mesh-agent || true; done",
    ),
    ("files", "find /var/lib/mesh -type f 2>/dev/null || true"),
    (
        "sockets of the node",
        "ss -Hlntp | grep -E ':15020 ' || true; ls /run/mesh/agent.sock 2>/dev/null || true",
    ),
];

/// Places that the mesh never writes: empty before and after.
const NEVER: (&str, &str) = (
    "nftables",
    "nft list ruleset | grep -i mesh.rs || true; \
     for n in /run/netns/*; do nsenter --net=$n nft list ruleset; done",
);

/// The number of objects of each kind, with the first line of each.
#[derive(Debug)]
pub(super) struct Traces(BTreeMap<&'static str, (usize, String)>);

impl Traces {
    /// Inspects a node.
    pub(super) fn look(node: &Machine) -> Result<Self> {
        let mut found = BTreeMap::new();
        for (what, script) in LOOKS.iter().chain([&NEVER]) {
            let said = node.run(Cmd::shell(script), SOON)?.ok()?.text();
            let first = said.lines().next().unwrap_or_default().to_owned();
            found.insert(*what, (said.lines().count(), first));
        }
        let attached = Cmd::new("python3").args(["-c", ATTACHED]);
        let attached = node.run(attached, SOON)?.ok()?.text();
        for (target, what) in TARGETS {
            let lines = attached.lines().filter(|line| line.starts_with(target));
            let first = lines.clone().next().unwrap_or_default().to_owned();
            found.insert(what, (lines.count(), first));
        }
        Ok(Self(found))
    }

    /// Returns the kinds that the mesh should have created but that have no objects.
    pub(super) fn unseen(&self) -> Vec<&'static str> {
        let looked = LOOKS.iter().map(|(what, _)| *what);
        let attached = TARGETS.iter().map(|(_, what)| *what);
        let made = looked.chain(attached);
        made.filter(|what| self.0[what].0 == 0).collect()
    }

    /// Returns whether no object of any kind exists.
    pub(super) fn is_clean(&self) -> bool {
        self.0.values().all(|(count, _)| *count == 0)
    }
}

impl fmt::Display for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.0.iter().filter(|(_, (count, _))| *count > 0);
        let all: Vec<String> = all
            .map(|(what, (count, _))| format!("{count} {what}"))
            .collect();
        f.write_str(&all.join(", "))
    }
}
