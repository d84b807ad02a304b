// SPDX-License-Identifier: Apache-2.0
//! ClusterNetworkPolicy of `policy.networking.k8s.io/v1alpha2`.
//!
//! A peer without a known field fails closed as that API says: an Accept rule with one matches
//! nothing, a Deny or Pass rule with one denies everything. So does one of `domainNames`, which
//! nothing resolves here.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh_plan::cluster::{
    NamespaceMatch, PeerMatch, Policy, PortMatch, PortRange, Rule, RuleAction, Selector,
    Subject as PolicySubject, Transport,
};
use serde_json::Value;

use super::Fact;
use super::object::{Held, Issues, Subject, own_spec};
use super::rules::{denial, salvaged_tier, says, tier_and_rank};
use super::selector::{salvaged, selector};
use super::validate::{cidr, domain_name, port, port_name};
use crate::crd::{
    ClusterNetworkPolicySpec, ClusterPort, ClusterProtocol, ClusterProtocolPorts, ClusterRule,
    ClusterRuleAction, ClusterSubject, EgressPeer, IngressPeer, NamespacedPod,
};

const MAX_ITEMS: usize = 25;

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    let spec: ClusterNetworkPolicySpec = own_spec(subject.value, issues)?;
    let tier = tier_and_rank(spec.tier, spec.priority, issues)?;
    let applies_to = applies_to(&spec.subject, issues);
    let mut ingress = Vec::new();
    for (i, read) in spec.ingress.iter().flatten().enumerate() {
        let rule_read = ClusterRule {
            name: read.name.as_deref().unwrap_or_default(),
            action: read.action,
            peers: &read.from,
            protocols: read.protocols.as_deref(),
        };
        ingress.push(rule(&format!("ingress[{i}]"), "from", &rule_read, issues));
    }
    let mut egress = Vec::new();
    for (i, read) in spec.egress.iter().flatten().enumerate() {
        let rule_read = ClusterRule {
            name: read.name.as_deref().unwrap_or_default(),
            action: read.action,
            peers: &read.to,
            protocols: read.protocols.as_deref(),
        };
        no_names_of_ports(&format!("spec.egress[{i}]"), &rule_read, issues);
        egress.push(rule(&format!("egress[{i}]"), "to", &rule_read, issues));
    }
    for (direction, rules) in [("ingress", &ingress), ("egress", &egress)] {
        bounded(&format!("spec.{direction}"), 0, rules.len(), issues);
    }
    Some(Fact::Policy(Arc::new(Policy {
        tier,
        subject: applies_to?,
        ingress: (!ingress.is_empty()).then_some(ingress),
        egress: (!egress.is_empty()).then_some(egress),
        audit: false,
    })))
}

pub(super) fn rejected(subject: &Subject<'_>) -> Held {
    let namespaces = subject.raw(&["spec", "subject", "namespaces"]);
    let pods = subject.raw(&["spec", "subject", "pods"]);
    let read = match (namespaces, pods) {
        (Some(namespaces), None) => salvaged(Some(namespaces)).map(|n| (n, Selector::default())),
        (None, Some(Value::Object(pods))) => salvaged(pods.get("namespaceSelector")).zip(
            pods.get("podSelector")
                .and_then(|pods| salvaged(Some(pods))),
        ),
        _ => None,
    };
    match read {
        Some((namespaces, pods)) => {
            let directions = (says(subject, "ingress"), says(subject, "egress"));
            denial(salvaged_tier(subject), namespaces, pods, directions)
        }
        None => Held::nothing("whom it is about cannot be read: it isolates nothing"),
    }
}

fn bounded(field: &str, min: usize, len: usize, issues: &mut Issues) {
    if len < min || len > MAX_ITEMS {
        issues.reject(
            field,
            format!("has {len} items, and must have {min} to {MAX_ITEMS}"),
        );
    }
}

fn applies_to(read: &ClusterSubject, issues: &mut Issues) -> Option<PolicySubject> {
    match (&read.namespaces, &read.pods) {
        (Some(namespaces), None) => Some(PolicySubject::Namespaces {
            namespaces: selector("spec.subject.namespaces", namespaces, issues),
            pods: Selector::default(),
        }),
        (None, Some(read)) => {
            let (namespaces, pods) = namespaced("spec.subject.pods", read, issues);
            Some(PolicySubject::Namespaces { namespaces, pods })
        }
        _ => {
            issues.reject(
                "spec.subject",
                "needs namespaces or pods, and only one of them",
            );
            None
        }
    }
}

fn namespaced(path: &str, read: &NamespacedPod, issues: &mut Issues) -> (Selector, Selector) {
    let namespaces = &read.namespace_selector;
    (
        selector(&format!("{path}.namespaceSelector"), namespaces, issues),
        selector(&format!("{path}.podSelector"), &read.pod_selector, issues),
    )
}

/// The items of lists are unique in that API.
fn unique(path: &str, items: &[String], issues: &mut Issues) {
    let mut known = BTreeSet::new();
    for (i, item) in items.iter().enumerate() {
        if !known.insert(item) {
            issues.reject(format!("{path}[{i}]"), format!("{item:?} is there twice"));
        }
    }
}

/// A peer of either direction.
trait Peer {
    /// What it matches in a rule of this action, or the field that this version cannot match.
    fn matches(
        &self,
        path: &str,
        action: RuleAction,
        issues: &mut Issues,
    ) -> Result<Vec<PeerMatch>, String>;

    /// Whether it can have named ports.
    fn is_of_pods(&self) -> bool;
}

fn of_pods(
    path: &str,
    namespaces: Option<&LabelSelector>,
    pods: Option<&NamespacedPod>,
    issues: &mut Issues,
) -> Result<Vec<PeerMatch>, String> {
    let (namespaces, pods) = match (namespaces, pods) {
        (Some(read), _) => (
            selector(&format!("{path}.namespaces"), read, issues),
            Selector::default(),
        ),
        (None, Some(read)) => namespaced(&format!("{path}.pods"), read, issues),
        (None, None) => return Err(path.to_owned()),
    };
    Ok(vec![PeerMatch::Pods {
        namespaces: NamespaceMatch::Labels(namespaces),
        pods,
        service_accounts: None,
    }])
}

fn only_one(path: &str, set: &[bool], issues: &mut Issues) {
    if set.iter().filter(|is_set| **is_set).count() > 1 {
        issues.reject(path, "has more than one field set");
    }
}

impl Peer for IngressPeer {
    fn matches(
        &self,
        path: &str,
        _: RuleAction,
        issues: &mut Issues,
    ) -> Result<Vec<PeerMatch>, String> {
        only_one(
            path,
            &[self.namespaces.is_some(), self.pods.is_some()],
            issues,
        );
        of_pods(path, self.namespaces.as_ref(), self.pods.as_ref(), issues)
    }

    fn is_of_pods(&self) -> bool {
        true
    }
}

impl Peer for EgressPeer {
    fn matches(
        &self,
        path: &str,
        action: RuleAction,
        issues: &mut Issues,
    ) -> Result<Vec<PeerMatch>, String> {
        let set = [
            self.namespaces.is_some(),
            self.pods.is_some(),
            self.nodes.is_some(),
            self.networks.is_some(),
            self.domain_names.is_some(),
        ];
        only_one(path, &set, issues);
        if let Some(nodes) = &self.nodes {
            let nodes = selector(&format!("{path}.nodes"), nodes, issues);
            return Ok(vec![PeerMatch::Nodes(nodes)]);
        }
        if let Some(networks) = &self.networks {
            let field = format!("{path}.networks");
            bounded(&field, 1, networks.len(), issues);
            unique(&field, networks, issues);
            let mut made = Vec::new();
            for (i, text) in networks.iter().enumerate() {
                let block = issues.check(&format!("{path}.networks[{i}]"), cidr(text));
                made.extend(block.map(|cidr| PeerMatch::Cidr {
                    cidr,
                    except: [].into(),
                }));
            }
            return Ok(made);
        }
        if let Some(names) = &self.domain_names {
            let field = format!("{path}.domainNames");
            bounded(&field, 1, names.len(), issues);
            unique(&field, names, issues);
            for (i, name) in names.iter().enumerate() {
                issues.check(&format!("{field}[{i}]"), domain_name(name));
            }
            if action != RuleAction::Allow {
                return Err(field);
            }
            issues.warn(field.clone(), "is not supported: it matches nothing");
            return Ok(vec![PeerMatch::Nothing { what: field }]);
        }
        of_pods(path, self.namespaces.as_ref(), self.pods.as_ref(), issues)
    }

    fn is_of_pods(&self) -> bool {
        self.nodes.is_none() && self.networks.is_none() && self.domain_names.is_none()
    }
}

fn rule<P: Peer>(place: &str, field: &str, read: &ClusterRule<'_, P>, issues: &mut Issues) -> Rule {
    let path = format!("spec.{place}");
    if read.name.chars().count() > 100 {
        issues.reject(format!("{path}.name"), "is longer than 100 characters");
    }
    bounded(&format!("{path}.{field}"), 1, read.peers.len(), issues);
    let action = match read.action {
        ClusterRuleAction::Accept => RuleAction::Allow,
        ClusterRuleAction::Deny => RuleAction::Deny,
        ClusterRuleAction::Pass => RuleAction::Pass,
    };
    let name = if read.name.is_empty() {
        place
    } else {
        read.name
    };
    let mut peers = Vec::new();
    for (i, peer) in read.peers.iter().enumerate() {
        let path = format!("{path}.{field}[{i}]");
        match peer.matches(&path, action, issues) {
            Ok(made) => peers.extend(made),
            Err(field) => return unknown_peer(name, action, field, issues),
        }
    }
    let ports = read.protocols.map(|protocols| {
        let path = format!("{path}.protocols");
        bounded(&path, 1, protocols.len(), issues);
        let mut made = Vec::new();
        for (i, read) in protocols.iter().enumerate() {
            protocol(&format!("{path}[{i}]"), read, &mut made, issues);
        }
        made
    });
    Rule {
        name: name.to_owned(),
        action,
        peers: Some(peers),
        ports,
    }
}

/// "For Accept rules, fail closed means: treat the rule as matching no traffic. For Deny and Pass
/// rules: treat the rule as a Deny all rule." Names of domains are of Accept rules only.
fn unknown_peer(name: &str, action: RuleAction, field: String, issues: &mut Issues) -> Rule {
    let (action, peers, what) = match action {
        RuleAction::Allow => {
            let nothing = PeerMatch::Nothing {
                what: field.clone(),
            };
            (
                RuleAction::Allow,
                Some(vec![nothing]),
                "the rule matches nothing",
            )
        }
        RuleAction::Deny | RuleAction::Pass => {
            (RuleAction::Deny, None, "the rule denies everything")
        }
    };
    issues.warn(
        field,
        format!("is no peer that this version can match: {what}"),
    );
    Rule {
        name: name.to_owned(),
        action,
        peers,
        ports: None,
    }
}

/// The API refuses named ports for what has none.
fn no_names_of_ports(path: &str, read: &ClusterRule<'_, EgressPeer>, issues: &mut Issues) {
    let named = |p: &ClusterProtocol| p.destination_named_port.is_some();
    if read.protocols.is_some_and(|list| list.iter().any(named))
        && read.peers.iter().any(|peer| !peer.is_of_pods())
    {
        issues.reject(
            format!("{path}.protocols"),
            "networks, nodes and domainNames have no named ports",
        );
    }
}

fn protocol(path: &str, read: &ClusterProtocol, made: &mut Vec<PortMatch>, issues: &mut Issues) {
    let named = read
        .destination_named_port
        .as_deref()
        .filter(|name| !name.is_empty());
    let forms = [
        read.tcp.is_some(),
        read.udp.is_some(),
        read.sctp.is_some(),
        named.is_some(),
    ];
    if forms.into_iter().filter(|form| *form).count() != 1 {
        issues.reject(path, "needs one of tcp, udp, sctp and destinationNamedPort");
        return;
    }
    for (key, transport, read) in [
        ("tcp", Transport::Tcp, &read.tcp),
        ("udp", Transport::Udp, &read.udp),
        ("sctp", Transport::Sctp, &read.sctp),
    ] {
        if let Some(ports) = read {
            let ports = destination(&format!("{path}.{key}"), ports, issues);
            made.extend(ports.map(|ports| PortMatch {
                transport: Some(transport),
                ports,
            }));
        }
    }
    // The name of a port stands for its protocol too.
    if let Some(name) = named
        && let Some(()) = issues.check(&format!("{path}.destinationNamedPort"), port_name(name))
    {
        made.extend(
            [Transport::Tcp, Transport::Udp, Transport::Sctp].map(|transport| PortMatch {
                transport: Some(transport),
                ports: PortRange::Named(name.to_owned()),
            }),
        );
    }
}

fn destination(path: &str, read: &ClusterProtocolPorts, issues: &mut Issues) -> Option<PortRange> {
    let path = format!("{path}.destinationPort");
    match read.destination_port.as_ref() {
        // It may have had a field that was cut off, which would have made it narrower.
        None => {
            issues.reject(path, "is missing: there must be something to match");
            None
        }
        Some(ClusterPort {
            number: Some(number),
            range: None,
        }) => {
            let number = issues.check(&format!("{path}.number"), port((*number).into()))?;
            Some(PortRange::Range(number, number))
        }
        Some(ClusterPort {
            number: None,
            range: Some(range),
        }) => {
            let start = issues.check(&format!("{path}.range.start"), port(range.start.into()));
            let end = issues.check(&format!("{path}.range.end"), port(range.end.into()));
            let (start, end) = start.zip(end)?;
            if start >= end {
                issues.reject(format!("{path}.range"), "start must be below end");
            }
            Some(PortRange::Range(start, end))
        }
        Some(_) => {
            issues.reject(path, "needs number or range, and only one of them");
            None
        }
    }
}
