// SPDX-License-Identifier: Apache-2.0
//! Renders a plan as text for operators and golden tests: every map, a line for each entry, sorted
//! by name, with names instead of hashes where the plan knows them.
//!
//! Equal plans have equal texts. A plan that was read from maps has no names; its hashes are shown
//! as numbers.

mod lists;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::pod::{PodState, PodView, port_mode};
use mesh_common::policy::{Direction, ListId, PolicySetId, RuleId, SetHead};
use mesh_common::service::{Service, ServiceKey};
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::cluster::Labels;
use crate::plan::{IdentityName, Plan, Prefix};

/// Renders a plan.
#[must_use]
pub fn render(plan: &Plan) -> String {
    let mut out = String::new();
    section(&mut out, "pods", pods(plan));
    section(
        &mut out,
        "peers",
        plan.peers
            .iter()
            .map(|(addr, peer)| peer_line(plan, addr, peer)),
    );
    section(
        &mut out,
        "pod cidrs",
        plan.pod_cidrs.iter().map(|prefix| block(*prefix)),
    );
    section(&mut out, "services", services(plan));
    section(&mut out, "policy", policy(plan));
    out
}

fn section(out: &mut String, title: &str, lines: impl IntoIterator<Item = String>) {
    let mut lines = lines.into_iter().peekable();
    if lines.peek().is_none() {
        return;
    }
    line(out, 0, &format!("{title}:"));
    for text in lines {
        line(out, 1, &text);
    }
}

fn line(out: &mut String, indent: usize, text: &str) {
    for _ in 0..indent {
        out.push_str("  ");
    }
    out.push_str(text);
    out.push('\n');
}

fn words(flags: u32, names: &[(u32, &str)]) -> String {
    let mut text = String::new();
    for (_, name) in names.iter().filter(|(bit, _)| flags & bit != 0) {
        text.push(' ');
        text.push_str(name);
    }
    text
}

fn pods(plan: &Plan) -> BTreeSet<String> {
    let pod = |uid: &String, name: String, view: &PodView, addresses: &BTreeSet<IpAddr>| {
        let mut text = name;
        for address in addresses {
            append(&mut text, format_args!(" {address}"));
        }
        append(&mut text, format_args!(" is {}", identity(plan, view.id)));
        text.push_str(&words(
            view.flags,
            &[
                (PodState::ENROLLED, "enrolled"),
                (PodState::STRICT, "strict"),
                (PodState::REQUIRED, "required"),
                (PodState::UDP_SAME_NODE, "udp-same-node"),
                (PodState::UDP_DENY, "udp-deny"),
                (PodState::SILENT, "silent"),
                (PodState::AUDITED, "audited"),
            ],
        ));
        for (key, mode) in plan
            .port_modes
            .iter()
            .filter(|(key, _)| key.set == view.modes)
        {
            let mode = match *mode {
                port_mode::PERMISSIVE => "permissive",
                _ => "strict",
            };
            append(&mut text, format_args!(" {}={mode}", key.port.get()));
        }
        if view.set == PolicySetId::ISOLATED {
            text.push_str(" isolated");
        }
        append(&mut text, format_args!(" uid {uid}"));
        text
    };
    plan.pods
        .iter()
        .map(|(uid, p)| pod(uid, p.name.to_string(), &p.view, &p.addresses))
        .collect()
}

/// Writing to a string cannot fail.
fn append(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what)
        .expect("writing to a String does not fail");
}

/// Renders an identity.
#[must_use]
pub fn identity(plan: &Plan, id: IdentityId) -> String {
    match id {
        IdentityId::ANY => "others".to_owned(),
        IdentityId::HOST => "host".to_owned(),
        IdentityId::HOST_API_SERVER => "host+kube-apiserver".to_owned(),
        IdentityId::REMOTE_NODE => "remote-node".to_owned(),
        IdentityId::KUBE_APISERVER => "kube-apiserver".to_owned(),
        IdentityId::WORLD => "world".to_owned(),
        IdentityId::UNKNOWN => "unknown".to_owned(),
        id => match plan.names.identities.get(&id) {
            Some(name) => workload(name),
            None => format!("identity {:#018x}", id.0),
        },
    }
}

fn workload(name: &IdentityName) -> String {
    let IdentityName {
        namespace,
        service_account,
        labels,
        namespace_labels,
        ports,
    } = name;
    let mut text = namespace.clone();
    braces(&mut text, namespace_labels);
    append(&mut text, format_args!("/{service_account}"));
    braces(&mut text, labels);
    for ((name, transport), number) in ports {
        let transport = format!("{transport:?}").to_uppercase();
        append(&mut text, format_args!(" {name}={transport}/{number}"));
    }
    text
}

fn braces(text: &mut String, labels: &Labels) {
    if labels.is_empty() {
        return;
    }
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    append(text, format_args!("{{{}}}", pairs.join(",")));
}

/// Renders a rule.
#[must_use]
pub fn rule(plan: &Plan, id: RuleId) -> String {
    match id {
        RuleId::NONE => "no rule".to_owned(),
        RuleId::NODE_LOCAL => "node-local".to_owned(),
        id => match plan.names.rules.get(&id) {
            Some(name) => name.to_string(),
            None => format!("rule {:#018x}", id.0),
        },
    }
}

fn peer_line(plan: &Plan, addr: &Addr, peer: &Peer) -> String {
    let flags = words(
        peer.flags,
        &[
            (Peer::POD, "pod"),
            (Peer::ENROLLED, "enrolled"),
            (Peer::READY, "ready"),
            (Peer::STRICT, "strict"),
        ],
    );
    let name = match plan.names.workloads.get(addr) {
        Some(workload) => format!(" ({})", workload.name),
        None => String::new(),
    };
    format!("{addr} is {}{flags}{name}", identity(plan, peer.id))
}

/// A block of addresses.
fn block(prefix: Prefix<Addr>) -> String {
    if prefix.bits >= 96 && prefix.data.is_v4() {
        format!("{}/{}", prefix.data, prefix.bits - 96)
    } else {
        format!("{}/{}", prefix.data, prefix.bits)
    }
}

fn services(plan: &Plan) -> Vec<String> {
    let mut lists: BTreeMap<u64, Vec<Endpoint>> = BTreeMap::new();
    for (key, backend) in &plan.backends {
        lists.entry(key.list.0).or_default().push(*backend);
    }
    let service = |(key, service): (&ServiceKey, &Service)| {
        if key.port == Port(0) {
            return format!("{} is virtual", key.addr);
        }
        let name = match plan.names.services.get(key) {
            Some(name) => format!(" {name}"),
            None => String::new(),
        };
        let backends: Vec<String> = match lists.get(&service.backends.0) {
            Some(list) if service.count > 0 => list.iter().map(ToString::to_string).collect(),
            _ => vec!["nobody".to_owned()],
        };
        let at = Endpoint::new(key.addr, key.port);
        format!(
            "{at} {}{name} -> {}",
            protocol(key.protocol),
            backends.join(" ")
        )
    };
    let mut lines: Vec<String> = plan.services.iter().map(service).collect();
    for (key, name) in &plan.names.services {
        if !plan.services.contains_key(key) {
            let at = Endpoint::new(key.addr, key.port);
            lines.push(format!(
                "{at} {} {name} is headless",
                protocol(key.protocol)
            ));
        }
    }
    lines
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::TCP => "TCP",
        Protocol::UDP => "UDP",
        Protocol::SCTP => "SCTP",
        _ => "others",
    }
}

/// Sets by the pods that have them, then their audit sets, then sets without pods.
fn set_names(plan: &Plan) -> BTreeMap<PolicySetId, String> {
    let mut pods: BTreeMap<PolicySetId, BTreeSet<String>> = BTreeMap::new();
    for pod in plan.pods.values() {
        pods.entry(pod.view.set)
            .or_default()
            .insert(pod.name.to_string());
    }
    let mut names: BTreeMap<PolicySetId, String> = plan
        .sets
        .keys()
        .map(|id| (*id, format!("set {:#018x}", id.0)))
        .collect();
    let of = |pods: &BTreeSet<String>| {
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        pods.join(" ")
    };
    let mut audits: BTreeMap<PolicySetId, BTreeSet<String>> = BTreeMap::new();
    for (id, head) in &plan.sets {
        if let Some(pods) = pods.get(id).filter(|_| head.shadow != PolicySetId::NONE) {
            audits
                .entry(head.shadow)
                .or_default()
                .extend(pods.iter().cloned());
        }
    }
    for (id, pods) in &audits {
        names.insert(*id, format!("audit of {}", of(pods)));
    }
    for (id, pods) in pods.iter().filter(|(id, _)| plan.sets.contains_key(id)) {
        names.insert(*id, of(pods));
    }
    names
}

/// A block of addresses and its list.
type Block = (Prefix<Addr>, ListId);

fn policy(plan: &Plan) -> Vec<String> {
    let lists = lists::Lists::of(plan);
    let mut selects: BTreeMap<(PolicySetId, u64), BTreeMap<String, _>> = BTreeMap::new();
    for (key, pair) in &plan.selects {
        let side = selects.entry((key.set, key.direction)).or_default();
        side.insert(identity(plan, key.peer), *pair);
    }
    let mut blocks: BTreeMap<(PolicySetId, u64), Vec<Block>> = BTreeMap::new();
    for (key, list) in &plan.cidrs {
        let prefix = Prefix {
            bits: key
                .bits
                .saturating_sub(mesh_common::policy::CidrKey::FIXED_BITS),
            data: key.data.addr,
        };
        let side = (key.data.set(), u64::from(key.data.direction()));
        blocks.entry(side).or_default().push((prefix, *list));
    }
    let names = set_names(plan);
    let mut sets: Vec<(&String, &PolicySetId)> =
        names.iter().map(|(id, name)| (name, id)).collect();
    sets.sort();
    let mut out = Vec::new();
    for (name, id) in sets {
        let Some(head) = plan.sets.get(id) else {
            continue;
        };
        out.push(name.clone());
        for direction in [Direction::Ingress, Direction::Egress] {
            let (any, isolates, with) = side(head, direction);
            let isolated = match isolates {
                Some(by) => format!("isolated by {}", rule(plan, by)),
                None => "open".to_owned(),
            };
            out.push(format!("  {} {isolated}", direction.label()));
            lists.append(plan, any, "others", &mut out);
            for (peer, pair) in selects.get(&(*id, direction as u64)).into_iter().flatten() {
                if pair.proven == pair.by_address {
                    lists.append(plan, pair.proven, peer, &mut out);
                } else {
                    lists.append(plan, pair.proven, &format!("{peer} proven"), &mut out);
                    lists.append(
                        plan,
                        pair.by_address,
                        &format!("{peer} by address"),
                        &mut out,
                    );
                }
            }
            for (prefix, list) in blocks.get(&(*id, direction as u64)).into_iter().flatten() {
                lists.append(plan, *list, &block(*prefix), &mut out);
            }
            if !with && blocks.contains_key(&(*id, direction as u64)) {
                out.push("    (blocks are not looked up)".to_owned());
            }
        }
    }
    out
}

/// The list for all others, the isolating rule, and whether blocks are looked up.
fn side(head: &SetHead, direction: Direction) -> (ListId, Option<RuleId>, bool) {
    let has = |flag| head.flags & flag != 0;
    match direction {
        Direction::Ingress => (
            head.ingress_any,
            has(SetHead::ISOLATED_INGRESS).then_some(head.ingress_rule),
            has(SetHead::CIDRS_INGRESS),
        ),
        Direction::Egress => (
            head.egress_any,
            has(SetHead::ISOLATED_EGRESS).then_some(head.egress_rule),
            has(SetHead::CIDRS_EGRESS),
        ),
    }
}
