// SPDX-License-Identifier: Apache-2.0
//! The network plug-in (CNI) that the pods of this node have their interfaces from, and what it
//! means for the mesh.
//!
//! It is told by its configuration and by links that only it makes. One that enforces
//! NetworkPolicy itself sees tunnels, not the connections in them: [`blocked`] names the rules by
//! which it would drop tunnels between enrolled pods that the mesh would allow.

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

/// Whether a plug-in enforces NetworkPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforces {
    /// It does.
    Yes,
    /// With a part of it that not everybody installs.
    Perhaps,
    /// It does not.
    No,
}

/// A plug-in that is known.
#[derive(Debug)]
struct Known {
    name: &'static str,
    /// `type` of a plug-in in its configuration.
    kinds: &'static [&'static str],
    /// How links begin that only it makes.
    links: &'static [&'static str],
    enforces: Enforces,
    /// Its pods have an interface on the host's side, where the gate goes.
    gate: bool,
}

/// What is to be known about those without a gate.
const NO_GATE: &str = "its pods have no interface on the host's side: they cannot be protected";

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

/// Those that say more come first: many use `bridge` or `ptp` below.
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
    known("the bridge plug-in", &["bridge"], &["cni0"], Enforces::No),
    known("the ptp plug-in", &["ptp"], &[], Enforces::No),
];

/// The plug-in of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cni {
    /// What people call it.
    pub name: &'static str,
    /// Its configuration, if that can be read.
    pub config: Option<PathBuf>,
    /// Whether it enforces NetworkPolicy.
    pub enforces: Enforces,
    /// Whether pods with its interfaces can be protected.
    pub gate: bool,
    /// What is to be known about it.
    pub note: &'static str,
}

impl fmt::Display for Cni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(config) = &self.config {
            write!(f, " ({})", config.display())?;
        }
        f.write_str(match self.enforces {
            Enforces::Yes => "; it enforces NetworkPolicy itself",
            Enforces::Perhaps => "; it may enforce NetworkPolicy itself",
            Enforces::No => "; it enforces no NetworkPolicy",
        })?;
        if self.enforces != Enforces::No {
            f.write_str(
                ": with --tunnel-port real its policies apply to tunnels as they are; with 15008 \
                 each that allows ports between enrolled pods must allow TCP port 15008 too",
            )?;
        }
        if !self.note.is_empty() {
            write!(f, "; {}", self.note)?;
        }
        Ok(())
    }
}

/// Finds the plug-in by its configuration in `dir`, else by the names of links; `None` = none that
/// is known.
#[must_use]
pub fn find(dir: &Path, links: &[String]) -> Option<Cni> {
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
    // What enforces may be chained behind one that does not say so in its configuration.
    let strongest = KNOWN
        .iter()
        .find(|known| known.enforces == Enforces::Yes && by_link(known));
    let found = KNOWN.iter().find(by_config);
    let found = match (found, strongest) {
        (Some(found), Some(strongest)) if found.enforces == Enforces::No => strongest,
        (Some(found), _) => found,
        (None, strongest) => strongest.or_else(|| KNOWN.iter().find(by_link))?,
    };
    Some(Cni {
        name: found.name,
        config,
        enforces: found.enforces,
        gate: found.gate,
        note: if found.gate { "" } else { NO_GATE },
    })
}

/// The configuration that a container runtime uses, which is the first by name, and the types of
/// its plug-ins.
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

/// `type` of a plug-in, of those in its list, and of those that it delegates to; and `name`, which
/// some are known by.
fn types(config: &Value, found: &mut Vec<String>) {
    for key in ["type", "name"] {
        found.extend(config.get(key).and_then(Value::as_str).map(str::to_owned));
    }
    for key in ["plugins", "delegates"] {
        let list = config.get(key).and_then(Value::as_array);
        list.into_iter().flatten().for_each(|one| types(one, found));
    }
}

/// A rule by which a plug-in that enforces NetworkPolicy would drop tunnels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Blocked {
    /// The policy.
    pub object: ObjectRef,
    /// Its rule: `ingress[0]`.
    pub rule: String,
    /// What to add to the rule's `ports`.
    pub add: String,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: spec.{}.ports does not have the tunnel port; add {}",
            self.object, self.rule, self.add
        )
    }
}

/// What is known about the node's network plug-in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// The plug-in, if it is known.
    pub cni: Option<Cni>,
    /// The rules by which it would drop tunnels; empty if it enforces no NetworkPolicy.
    pub blocks: Vec<Blocked>,
    /// Programs of others at the hooks at which the mesh balances services: see [`balancers`].
    pub balancers: Vec<String>,
}

/// What to do about [`balancers`].
pub const BALANCERS: &str = "A program that is not the mesh's sees pods' connect() and sendmsg() too: \
                             if it balances services, one of the two translates what the other has \
                             chosen. With Cilium set socketLB.hostNamespaceOnly=true.";

/// The programs of others, as `HOOK: NAME`, that see where processes of this cgroup connect and send
/// to: what balances services in the socket layer is among them.
///
/// # Errors
/// When the cgroup or its programs cannot be read.
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
    // Not all that is loaded, of which there may be a lot, if there is nobody.
    if at.is_empty() {
        return Ok(found);
    }
    for program in loaded_programs().filter_map(Result::ok) {
        let name = program.name_as_str().unwrap_or("?");
        for hook in at.remove(&program.id()).unwrap_or_default() {
            // The mesh's own has the hook's name.
            if name != hook {
                found.push(format!("{hook}: {name}"));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The rules of NetworkPolicies for enrolled pods that allow some ports and not the tunnel's.
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

/// Whether a rule lets something TCP through, and tunnels not.
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
