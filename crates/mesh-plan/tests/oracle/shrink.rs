// SPDX-License-Identifier: Apache-2.0
//! Makes a disagreement small: takes away whatever can go while it stays one, and prints what is
//! left as manifests would say it.

use std::fmt::Debug;
use std::sync::Arc;

use mesh_plan::cluster::{
    ClusterSnapshot, LabelTest, NamespaceMatch, PeerMatch, Policy, PortRange, Rule, Selector,
    Subject,
};

use crate::naive::Packet;

/// The smallest cluster found that `fails` for the packet.
pub(crate) fn shrink(
    mut cluster: ClusterSnapshot,
    packet: Packet,
    fails: fn(&ClusterSnapshot, &Packet) -> bool,
) -> (ClusterSnapshot, Packet) {
    loop {
        let smaller = candidates(&cluster)
            .into_iter()
            .find(|candidate| fails(candidate, &packet));
        match smaller {
            Some(smaller) => cluster = smaller,
            None => return (cluster, packet),
        }
    }
}

/// The cluster with one thing less, in every way, big things first.
fn candidates(cluster: &ClusterSnapshot) -> Vec<ClusterSnapshot> {
    let mut all = Vec::new();
    let mut with = |change: &dyn Fn(&mut ClusterSnapshot)| {
        let mut smaller = cluster.clone();
        change(&mut smaller);
        if smaller != *cluster {
            all.push(smaller);
        }
    };
    for object in cluster.policies.keys() {
        with(&|c| {
            c.policies.remove(object);
        });
    }
    for uid in cluster.pods.keys() {
        with(&|c| {
            c.pods.remove(uid);
        });
    }
    for name in cluster.nodes.keys() {
        with(&|c| {
            if c.pods.values().all(|pod| pod.node != *name) {
                c.nodes.remove(name);
            }
        });
    }
    with(&|c| c.api_servers.clear());
    with(&|c| c.pod_cidrs.clear());
    for (object, policy) in &cluster.policies {
        for smaller in smaller_policies(policy) {
            with(&|c| {
                c.policies.insert(object.clone(), smaller.clone().into());
            });
        }
    }
    for uid in cluster.pods.keys() {
        for key in cluster.pods[uid].labels.keys() {
            with(&|c| {
                c.pods.entry(Arc::clone(uid)).and_modify(|pod| {
                    Arc::make_mut(&mut Arc::make_mut(pod).labels).remove(key);
                });
            });
        }
        with(&|c| {
            c.pods
                .entry(Arc::clone(uid))
                .and_modify(|pod| Arc::make_mut(pod).named_ports = Arc::default());
        });
    }
    for (name, namespace) in &cluster.namespaces {
        for key in namespace.labels.keys() {
            with(&|c| {
                c.namespaces.entry(name.clone()).and_modify(|namespace| {
                    namespace.labels.remove(key);
                });
            });
        }
    }
    for name in cluster.nodes.keys() {
        with(&|c| {
            c.nodes
                .entry(name.clone())
                .and_modify(|node| node.labels.clear());
        });
        with(&|c| {
            c.nodes
                .entry(name.clone())
                .and_modify(|node| node.pod_cidrs.clear());
        });
    }
    all
}

fn smaller_policies(policy: &Policy) -> Vec<Policy> {
    let mut all = Vec::new();
    let mut with = |ingress, egress| {
        all.push(Policy {
            ingress,
            egress,
            ..policy.clone()
        });
    };
    if policy.ingress.is_some() {
        with(None, policy.egress.clone());
    }
    if policy.egress.is_some() {
        with(policy.ingress.clone(), None);
    }
    for rules in smaller_rules(policy.ingress.as_deref()) {
        with(Some(rules), policy.egress.clone());
    }
    for rules in smaller_rules(policy.egress.as_deref()) {
        with(policy.ingress.clone(), Some(rules));
    }
    match &policy.subject {
        Subject::Pods { namespace, pods } => {
            all.extend(smaller_selectors(pods).into_iter().map(|pods| Policy {
                subject: Subject::Pods {
                    namespace: namespace.clone(),
                    pods,
                },
                ..policy.clone()
            }));
        }
        Subject::Namespaces { namespaces, pods } => {
            let of_namespaces = smaller_selectors(namespaces)
                .into_iter()
                .map(|n| (n, pods.clone()));
            let of_pods = smaller_selectors(pods)
                .into_iter()
                .map(|p| (namespaces.clone(), p));
            all.extend(
                of_namespaces
                    .chain(of_pods)
                    .map(|(namespaces, pods)| Policy {
                        subject: Subject::Namespaces { namespaces, pods },
                        ..policy.clone()
                    }),
            );
        }
        Subject::WholeNamespace(_) => {}
    }
    all
}

/// The list with one rule less, or one rule smaller; never empty, which would mean something new.
fn smaller_rules(rules: Option<&[Rule]>) -> Vec<Vec<Rule>> {
    let rules = rules.unwrap_or_default();
    let mut all = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        if rules.len() > 1 {
            let mut fewer = rules.to_vec();
            fewer.remove(index);
            all.push(fewer);
        }
        let mut with = |smaller: Rule| {
            let mut changed = rules.to_vec();
            changed[index] = smaller;
            all.push(changed);
        };
        if rule.ports.is_some() {
            with(Rule {
                ports: None,
                ..rule.clone()
            });
        }
        for ports in fewer(rule.ports.as_deref()) {
            with(Rule {
                ports: Some(ports),
                ..rule.clone()
            });
        }
        for peers in fewer(rule.peers.as_deref()) {
            with(Rule {
                peers: Some(peers),
                ..rule.clone()
            });
        }
        for peers in smaller_peers(rule.peers.as_deref().unwrap_or_default()) {
            with(Rule {
                peers: Some(peers),
                ..rule.clone()
            });
        }
    }
    all
}

fn fewer<T: Clone>(list: Option<&[T]>) -> Vec<Vec<T>> {
    let list = list.unwrap_or_default();
    if list.len() < 2 {
        return Vec::new();
    }
    (0..list.len())
        .map(|index| {
            let mut fewer = list.to_vec();
            fewer.remove(index);
            fewer
        })
        .collect()
}

fn smaller_peers(peers: &[PeerMatch]) -> Vec<Vec<PeerMatch>> {
    let mut all = Vec::new();
    for (index, peer) in peers.iter().enumerate() {
        for smaller in smaller_peer(peer) {
            let mut changed = peers.to_vec();
            changed[index] = smaller;
            all.push(changed);
        }
    }
    all
}

fn smaller_peer(peer: &PeerMatch) -> Vec<PeerMatch> {
    match peer {
        PeerMatch::Pods {
            namespaces,
            pods,
            service_accounts,
        } => {
            let make = |namespaces: &NamespaceMatch, pods: &Selector, accounts: &Option<_>| {
                PeerMatch::Pods {
                    namespaces: namespaces.clone(),
                    pods: pods.clone(),
                    service_accounts: accounts.clone(),
                }
            };
            let mut all = Vec::new();
            if service_accounts.is_some() {
                all.push(make(namespaces, pods, &None));
            }
            for pods in smaller_selectors(pods) {
                all.push(make(namespaces, &pods, service_accounts));
            }
            if let NamespaceMatch::Labels(selector) = namespaces {
                for smaller in smaller_selectors(selector) {
                    all.push(make(
                        &NamespaceMatch::Labels(smaller),
                        pods,
                        service_accounts,
                    ));
                }
            }
            all
        }
        PeerMatch::Cidr { cidr, except } => except
            .iter()
            .map(|gone| PeerMatch::Cidr {
                cidr: *cidr,
                except: except.iter().filter(|net| *net != gone).copied().collect(),
            })
            .collect(),
        PeerMatch::Nodes(selector) => smaller_selectors(selector)
            .into_iter()
            .map(PeerMatch::Nodes)
            .collect(),
        PeerMatch::Entity(_) | PeerMatch::Nothing { .. } => Vec::new(),
    }
}

fn smaller_selectors(selector: &Selector) -> Vec<Selector> {
    (0..selector.requirements.len())
        .map(|index| {
            let mut requirements = selector.requirements.clone();
            requirements.remove(index);
            Selector { requirements }
        })
        .collect()
}

/// A cluster and a packet as people read them.
pub(crate) fn text(cluster: &ClusterSnapshot, packet: &Packet) -> String {
    let mut text = format!("packet: {packet:?}\n");
    for (name, namespace) in &cluster.namespaces {
        line(&mut text, "Namespace", name, &namespace.labels);
    }
    for (name, node) in &cluster.nodes {
        let fields = (&node.labels, &node.addresses, &node.pod_cidrs);
        line(&mut text, "Node", name, &fields);
    }
    line(&mut text, "API server", "", &cluster.api_servers);
    line(&mut text, "--pod-cidr", "", &cluster.pod_cidrs);
    for (uid, pod) in &cluster.pods {
        let fields = format_args!(
            "{} node={} serviceAccount={} labels={:?} podIPs={:?} ports={:?} hostNetwork={}",
            pod.name,
            pod.node,
            pod.service_account,
            pod.labels,
            pod.addresses,
            pod.named_ports,
            pod.host_network
        )
        .to_string();
        text += &format!("Pod {uid}: {fields}\n");
    }
    for (object, policy) in &cluster.policies {
        text += &format!("---\n{object}:\n");
        text += &format!("  tier: {:?}, audit: {}\n", policy.tier, policy.audit);
        text += &format!("  subject: {}\n", subject(&policy.subject));
        rules(&mut text, "ingress", policy.ingress.as_deref());
        rules(&mut text, "egress", policy.egress.as_deref());
    }
    text
}

fn line(text: &mut String, kind: &str, name: &str, fields: &impl Debug) {
    *text += &format!("{kind} {name}: {fields:?}\n");
}

fn subject(subject: &Subject) -> String {
    match subject {
        Subject::Pods { namespace, pods } => {
            format!("namespace {namespace}, podSelector {}", selector(pods))
        }
        Subject::Namespaces { namespaces, pods } => format!(
            "namespaceSelector {}, podSelector {}",
            selector(namespaces),
            selector(pods)
        ),
        Subject::WholeNamespace(namespace) => format!("all of {namespace} (rejected selector)"),
    }
}

fn rules(text: &mut String, direction: &str, rules: Option<&[Rule]>) {
    let Some(rules) = rules else {
        return;
    };
    *text += &format!(
        "  {direction}:{}\n",
        if rules.is_empty() { " []" } else { "" }
    );
    for rule in rules {
        *text += &format!("  - {:?}\n", rule.action);
        match &rule.peers {
            None => text.push_str("    peers: everybody\n"),
            Some(peers) => {
                for peer in peers {
                    *text += &format!("    peer: {}\n", self::peer(peer));
                }
            }
        }
        for port in rule.ports.iter().flatten() {
            let transport = port
                .transport
                .map_or("any".to_owned(), |t| format!("{t:?}"));
            let ports = match &port.ports {
                PortRange::All => "all".to_owned(),
                PortRange::Range(first, last) => format!("{first}-{last}"),
                PortRange::Named(name) => name.clone(),
            };
            *text += &format!("    port: {transport} {ports}\n");
        }
    }
}

fn peer(peer: &PeerMatch) -> String {
    match peer {
        PeerMatch::Pods {
            namespaces,
            pods,
            service_accounts,
        } => {
            let namespaces = match namespaces {
                NamespaceMatch::Name(name) => name.clone(),
                NamespaceMatch::Labels(labels) => selector(labels),
            };
            let mut text = format!("namespaces {namespaces}, podSelector {}", selector(pods));
            for account in service_accounts.iter().flatten() {
                let of = |part: &Option<String>| part.clone().unwrap_or_else(|| "*".to_owned());
                text += &format!(
                    ", serviceAccount {}/{}",
                    of(&account.namespace),
                    of(&account.name)
                );
            }
            text
        }
        PeerMatch::Cidr { cidr, except } => format!("ipBlock {cidr} except {except:?}"),
        PeerMatch::Entity(entity) => format!("entity {entity:?}"),
        PeerMatch::Nodes(labels) => format!("nodes {}", selector(labels)),
        PeerMatch::Nothing { what } => format!("nothing ({what})"),
    }
}

fn selector(selector: &Selector) -> String {
    let each: Vec<String> = selector
        .requirements
        .iter()
        .map(|requirement| {
            let key = &requirement.key;
            match &requirement.test {
                LabelTest::In(values) => format!("{key} in {values:?}"),
                LabelTest::NotIn(values) => format!("{key} notin {values:?}"),
                LabelTest::Exists => format!("{key} exists"),
                LabelTest::DoesNotExist => format!("!{key}"),
            }
        })
        .collect();
    format!("{{{}}}", each.join("; "))
}
