// SPDX-License-Identifier: Apache-2.0
//! Detects conflicts of the node's CNI plugin, and of other eBPF programs, with the mesh.
//!
//! The CNI plugin is detected by its configuration and by the names of network interfaces that only it creates.
//! A CNI plugin that enforces NetworkPolicy sees tunnels, not the connections in them: [`blocked`] lists the rules
//! by which it would drop tunnels between enrolled pods that the mesh allows.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::programs::loaded_programs;
use mesh_plan::authentication::is_enrolled;
use mesh_plan::cluster::{
    ClusterSnapshot, ObjectRef, Pod, PortMatch, PortRange, Rule, Subject, Tier, Transport,
};
use serde::Serialize;
use serde_json::Value;

use mesh_sys::bpf;

/// Whether a CNI plugin enforces NetworkPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforces {
    /// The CNI plugin enforces NetworkPolicy.
    Yes,
    /// The CNI plugin enforces NetworkPolicy if an optional component is installed.
    Perhaps,
    /// The CNI plugin does not enforce NetworkPolicy.
    No,
}

/// A CNI plugin that the agent can detect.
#[derive(Debug)]
struct Known {
    name: &'static str,
    /// The values of `type` or `name` in its configuration.
    kinds: &'static [&'static str],
    /// The prefixes of interface names that only it creates.
    links: &'static [&'static str],
    enforces: Enforces,
    /// Whether its pods have a host-side interface to which the gate can be attached.
    gate: bool,
}

/// The note of a CNI plugin whose pods have no host-side interface.
const NO_GATE: &str = "its pods have no host-side interface and cannot be protected";

const fn known(
    name: &'static str,
    kinds: &'static [&'static str],
    links: &'static [&'static str],
    enforces: Enforces,
) -> Known {
    Known {
        name,
        kinds,
        links,
        enforces,
        gate: true,
    }
}

/// The known CNI plugins. The specific ones come first: many delegate to `bridge` or `ptp`.
const KNOWN: &[Known] = &[
    known(
        "Cilium",
        &["cilium-cni"],
        &["cilium_host", "cilium_net"],
        Enforces::Yes,
    ),
    known(
        "Calico",
        &["calico"],
        &["cali", "vxlan.calico"],
        Enforces::Yes,
    ),
    known("Antrea", &["antrea"], &["antrea-gw0"], Enforces::Yes),
    known("Weave Net", &["weave-net"], &["weave"], Enforces::Yes),
    known(
        "OVN-Kubernetes",
        &["ovn-k8s-cni-overlay"],
        &["ovn-k8s-mp0"],
        Enforces::Yes,
    ),
    known("Kube-OVN", &["kube-ovn"], &["ovn0"], Enforces::Yes),
    known("kube-router", &[], &["kube-bridge"], Enforces::Yes),
    known("kindnet", &["kindnet"], &[], Enforces::Perhaps),
    known("the AWS VPC CNI", &["aws-cni"], &["eni"], Enforces::Perhaps),
    known("Azure CNI", &["azure-vnet"], &["azv"], Enforces::Perhaps),
    known("Flannel", &["flannel"], &["flannel"], Enforces::No),
    Known {
        gate: false,
        ..known(
            "macvlan, ipvlan or SR-IOV",
            &["macvlan", "ipvlan", "sriov"],
            &[],
            Enforces::No,
        )
    },
    known(
        "the bridge CNI plugin",
        &["bridge"],
        &["cni0"],
        Enforces::No,
    ),
    known("the ptp CNI plugin", &["ptp"], &[], Enforces::No),
];

/// The CNI plugin of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CniPlugin {
    /// The product name.
    pub name: &'static str,
    /// The path of its configuration, if it is readable.
    pub config: Option<PathBuf>,
    /// Whether it enforces NetworkPolicy.
    pub enforces: Enforces,
    /// Whether the gate can be attached to its pods' interfaces.
    pub gate: bool,
    /// A limitation of the mesh with this CNI plugin; empty = none.
    pub note: &'static str,
}

impl fmt::Display for CniPlugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(config) = &self.config {
            write!(f, " ({})", config.display())?;
        }
        f.write_str(match self.enforces {
            Enforces::Yes => "; enforces NetworkPolicy",
            Enforces::Perhaps => "; may enforce NetworkPolicy",
            Enforces::No => "; does not enforce NetworkPolicy",
        })?;
        if self.enforces != Enforces::No {
            f.write_str(
                ": with --tunnel-port real, its policies apply to tunnels unchanged; with --tunnel-port 15008, \
                 each policy that allows ports between enrolled pods must also allow TCP port 15008",
            )?;
        }
        if !self.note.is_empty() {
            write!(f, "; {}", self.note)?;
        }
        Ok(())
    }
}

/// Detects the CNI plugin by its configuration in `dir`, or else by the names of network interfaces; `None` = no
/// known CNI plugin.
#[must_use]
pub fn find(dir: &Path, links: &[String]) -> Option<CniPlugin> {
    let (config, kinds) = match configured(dir) {
        Some((path, kinds)) => (Some(path), kinds),
        None => (None, Vec::new()),
    };
    let by_config = |known: &&Known| {
        known
            .kinds
            .iter()
            .any(|kind| kinds.iter().any(|k| k == kind))
    };
    let by_link = |known: &&Known| {
        let makes = |link: &String| known.links.iter().any(|prefix| link.starts_with(prefix));
        links.iter().any(makes)
    };
    // A CNI plugin that enforces NetworkPolicy may be installed beside one that does not, without configuration.
    let strongest = KNOWN
        .iter()
        .find(|known| known.enforces == Enforces::Yes && by_link(known));
    let found = KNOWN.iter().find(by_config);
    let found = match (found, strongest) {
        (Some(found), Some(strongest)) if found.enforces == Enforces::No => strongest,
        (Some(found), _) => found,
        (None, strongest) => strongest.or_else(|| KNOWN.iter().find(by_link))?,
    };
    Some(CniPlugin {
        name: found.name,
        config,
        enforces: found.enforces,
        gate: found.gate,
        note: if found.gate { "" } else { NO_GATE },
    })
}

/// Returns the configuration file that the container runtime uses, the first by name, and the types of its CNI
/// plugins.
fn configured(dir: &Path) -> Option<(PathBuf, Vec<String>)> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let kind = path.extension().and_then(|kind| kind.to_str());
            matches!(kind, Some("conf" | "conflist" | "json"))
        })
        .collect();
    files.sort();
    files.into_iter().find_map(|path| {
        let text = fs::read_to_string(&path).ok()?;
        let config: Value = serde_json::from_str(&text).ok()?;
        let mut kinds = Vec::new();
        types(&config, &mut kinds);
        (!kinds.is_empty()).then_some((path, kinds))
    })
}

/// Collects `type` and `name` of a CNI plugin, of the plugins in its list, and of those that it delegates to.
fn types(config: &Value, found: &mut Vec<String>) {
    for key in ["type", "name"] {
        found.extend(config.get(key).and_then(Value::as_str).map(str::to_owned));
    }
    for key in ["plugins", "delegates"] {
        let list = config.get(key).and_then(Value::as_array);
        list.into_iter().flatten().for_each(|one| types(one, found));
    }
}

/// A NetworkPolicy rule by which the CNI plugin would drop tunnels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Blocked {
    /// The policy.
    pub object: ObjectRef,
    /// The rule in the policy: `ingress[0]`.
    pub rule: String,
    /// The entry to add to the rule's `ports`.
    pub add: String,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: spec.{}.ports does not allow the tunnel port; add {}",
            self.object, self.rule, self.add
        )
    }
}

/// The node's CNI plugin and the conflicts of the node's network with the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CniConflicts {
    /// The CNI plugin; `None` = not known.
    pub cni: Option<CniPlugin>,
    /// The rules by which the CNI plugin would drop tunnels; empty if it does not enforce NetworkPolicy.
    pub blocks: Vec<Blocked>,
    /// Other programs attached to the hooks with which the mesh balances services: see [`balancers`].
    pub balancers: Vec<String>,
}

/// The effect of [`balancers`], and the remedy.
pub const BALANCERS: &str = "Another eBPF program is attached to pods' connect() or sendmsg() hooks: if it \
                             balances services, it conflicts with the service load balancing of the mesh. \
                             With Cilium, set socketLB.hostNamespaceOnly=true.";

/// Lists other programs, as `HOOK: NAME`, that are attached to the connect() and sendmsg() hooks of a cgroup.
/// Socket-level load balancers are among them.
///
/// # Errors
/// The cgroup or its programs cannot be read.
pub fn balancers(cgroup: &Path) -> io::Result<Vec<String>> {
    /// `enum bpf_attach_type` of linux/bpf.h.
    const HOOKS: [(&str, u32); 4] = [
        ("connect4", 10),
        ("connect6", 11),
        ("sendmsg4", 14),
        ("sendmsg6", 15),
    ];
    let cgroup = fs::File::open(cgroup)?;
    let mut at: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for (hook, number) in HOOKS {
        for id in bpf::programs_at(cgroup.as_fd(), number)? {
            at.entry(id).or_default().push(hook);
        }
    }
    let mut found = Vec::new();
    // Listing all loaded programs is expensive: skip it if no program is attached.
    if at.is_empty() {
        return Ok(found);
    }
    for program in loaded_programs().filter_map(Result::ok) {
        let name = program.name_as_str().unwrap_or("?");
        for hook in at.remove(&program.id()).unwrap_or_default() {
            // The mesh's own programs have the names of their hooks.
            if name != hook {
                found.push(format!("{hook}: {name}"));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the NetworkPolicy rules for enrolled pods that allow some TCP ports but not the tunnel port.
#[must_use]
pub fn blocked(cluster: &ClusterSnapshot, port: u16) -> Vec<Blocked> {
    let mut enrolled: BTreeMap<&str, Vec<&Pod>> = BTreeMap::new();
    for pod in cluster.pods.values() {
        if is_enrolled(cluster, pod) {
            let namespace = pod.name.namespace.as_str();
            enrolled.entry(namespace).or_default().push(pod);
        }
    }
    let mut blocked = Vec::new();
    for (object, policy) in &cluster.policies {
        if object.kind != "NetworkPolicy" || policy.tier != Tier::Namespaced {
            continue;
        }
        let Subject::Pods { namespace, pods } = &policy.subject else {
            continue;
        };
        let mine = enrolled.get(namespace.as_str()).into_iter().flatten();
        if !mine.into_iter().any(|pod| pods.matches(&pod.labels)) {
            continue;
        }
        let rules = policy.ingress.iter().chain(&policy.egress).flatten();
        for rule in rules.filter(|rule| blocks(rule, port)) {
            blocked.push(Blocked {
                object: object.clone(),
                rule: rule.name.clone(),
                add: format!("{{protocol: TCP, port: {port}}}"),
            });
        }
    }
    blocked
}

/// Returns whether a rule allows some TCP ports but not the tunnel port.
fn blocks(rule: &Rule, port: u16) -> bool {
    let Some(ports) = &rule.ports else {
        return false;
    };
    let is_tcp = |one: &&PortMatch| one.transport.is_none_or(|t| t == Transport::Tcp);
    let covers = |one: &PortMatch| match &one.ports {
        PortRange::All => true,
        PortRange::Range(first, last) => (*first..=*last).contains(&port),
        PortRange::Named(_) => false,
    };
    let mut tcp = ports.iter().filter(is_tcp).peekable();
    tcp.peek().is_some() && !tcp.any(covers)
}

#[cfg(test)]
mod tests;
