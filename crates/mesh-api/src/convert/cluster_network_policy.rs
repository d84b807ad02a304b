// SPDX-License-Identifier: Apache-2.0
//! Parses ClusterNetworkPolicy of `policy.networking.k8s.io/v1alpha2`.
//!
//! A peer without a known field fails closed as that API requires: an Accept rule with such a peer
//! matches nothing, a Deny or Pass rule with such a peer denies everything. The same holds for
//! `domainNames`, because the mesh does not resolve names.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh_plan::cluster::{
    NamespaceMatch, PeerMatch, Policy, PortMatch, PortRange, Rule, RuleAction, Selector,
    Subject as PolicySubject, Transport,
};
use serde_json::Value;

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, own_spec};
use super::rules::{Directions, denial, is_set, salvaged_tier, tier_and_priority};
use super::selector::{salvaged, selector};
use super::validate::{cidr, domain_name, port, port_name};
use crate::crd::{
    ClusterNetworkPolicySpec, ClusterPort, ClusterPortRange, ClusterProtocol, ClusterProtocolPorts,
    ClusterRuleAction, ClusterSubject, EgressPeer, EgressRule, IngressPeer, IngressRule,
    NamespacedPod,
};

const MAX_ITEMS: usize = 25;

/// A rule of either direction, over peers of type `P`.
struct RuleSpec<'a, P> {
    name: &'a str,
    action: ClusterRuleAction,
    peers: &'a [P],
    protocols: Option<&'a [ClusterProtocol]>,
}

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let ClusterNetworkPolicySpec {
        tier,
        priority,
        subject,
        ingress: ingress_rules,
        egress: egress_rules,
    } = own_spec(object.value, issues)?;
    let tier = tier_and_priority(tier, priority, issues)?;
    let applies_to = applies_to(&subject, issues);
    let mut ingress = Vec::new();
    for (i, read) in ingress_rules.iter().flatten().enumerate() {
        let IngressRule {
            name,
            action,
            from,
            protocols,
        } = read;
        let rule_read = RuleSpec {
            name: name.as_deref().unwrap_or_default(),
            action: *action,
            peers: from,
            protocols: protocols.as_deref(),
        };
        ingress.push(rule(&format!("ingress[{i}]"), "from", &rule_read, issues));
    }
    let mut egress = Vec::new();
    for (i, read) in egress_rules.iter().flatten().enumerate() {
        let EgressRule {
            name,
            action,
            to,
            protocols,
        } = read;
        let rule_read = RuleSpec {
            name: name.as_deref().unwrap_or_default(),
            action: *action,
            peers: to,
            protocols: protocols.as_deref(),
        };
        reject_named_ports(&format!("spec.egress[{i}]"), &rule_read, issues);
        egress.push(rule(&format!("egress[{i}]"), "to", &rule_read, issues));
    }
    for (direction, rules) in [("ingress", &ingress), ("egress", &egress)] {
        bounded(&format!("spec.{direction}"), 0, rules.len(), issues);
    }
    Some(ParsedObject::Policy(Arc::new(Policy {
        tier,
        subject: applies_to?,
        ingress: (!ingress.is_empty()).then_some(ingress),
        egress: (!egress.is_empty()).then_some(egress),
        audit: false,
    })))
}

pub(super) fn fallback(object: &RawObject<'_>) -> Fallback {
    let namespaces = object.raw(&["spec", "subject", "namespaces"]);
    let pods = object.raw(&["spec", "subject", "pods"]);
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
            let directions = Directions {
                ingress: is_set(object, "ingress"),
                egress: is_set(object, "egress"),
            };
            denial(salvaged_tier(object), namespaces, pods, directions)
        }
        None => {
            Fallback::nothing("its subject cannot be read, so the policy does not apply to any pod")
        }
    }
}

fn bounded(field: &str, min: usize, len: usize, issues: &mut Issues) {
    if len < min || len > MAX_ITEMS {
        issues.reject(
            field,
            format!("must have {min} to {MAX_ITEMS} items, has {len}"),
        );
    }
}

fn applies_to(read: &ClusterSubject, issues: &mut Issues) -> Option<PolicySubject> {
    let ClusterSubject { namespaces, pods } = read;
    match (namespaces, pods) {
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
                "must set exactly one of namespaces and pods",
            );
            None
        }
    }
}

fn namespaced(path: &str, read: &NamespacedPod, issues: &mut Issues) -> (Selector, Selector) {
    let NamespacedPod {
        namespace_selector,
        pod_selector,
    } = read;
    (
        selector(
            &format!("{path}.namespaceSelector"),
            namespace_selector,
            issues,
        ),
        selector(&format!("{path}.podSelector"), pod_selector, issues),
    )
}

/// Rejects duplicate items: the lists of that API are sets.
fn unique(path: &str, items: &[String], issues: &mut Issues) {
    let mut known = BTreeSet::new();
    for (i, item) in items.iter().enumerate() {
        if !known.insert(item) {
            issues.reject(format!("{path}[{i}]"), format!("duplicate value {item:?}"));
        }
    }
}

/// A peer of either direction.
trait Peer {
    /// The matches of the peer in a rule with this action, or the field that this version cannot match.
    fn matches(
        &self,
        path: &str,
        action: RuleAction,
        issues: &mut Issues,
    ) -> Result<Vec<PeerMatch>, String>;

    /// Whether the peer selects pods, which alone can have named ports.
    fn selects_pods(&self) -> bool;
}

fn pod_peer(
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

fn at_most_one(path: &str, set: &[bool], issues: &mut Issues) {
    if set.iter().filter(|is_set| **is_set).count() > 1 {
        issues.reject(path, "must set only one field");
    }
}

impl Peer for IngressPeer {
    fn matches(
        &self,
        path: &str,
        _: RuleAction,
        issues: &mut Issues,
    ) -> Result<Vec<PeerMatch>, String> {
        let Self { namespaces, pods } = self;
        at_most_one(path, &[namespaces.is_some(), pods.is_some()], issues);
        pod_peer(path, namespaces.as_ref(), pods.as_ref(), issues)
    }

    fn selects_pods(&self) -> bool {
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
        let Self {
            namespaces,
            pods,
            nodes,
            networks,
            domain_names,
        } = self;
        let set = [
            namespaces.is_some(),
            pods.is_some(),
            nodes.is_some(),
            networks.is_some(),
            domain_names.is_some(),
        ];
        at_most_one(path, &set, issues);
        if let Some(nodes) = nodes {
            let nodes = selector(&format!("{path}.nodes"), nodes, issues);
            return Ok(vec![PeerMatch::Nodes(nodes)]);
        }
        if let Some(networks) = networks {
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
        if let Some(names) = domain_names {
            let field = format!("{path}.domainNames");
            bounded(&field, 1, names.len(), issues);
            unique(&field, names, issues);
            for (i, name) in names.iter().enumerate() {
                issues.check(&format!("{field}[{i}]"), domain_name(name));
            }
            if action != RuleAction::Allow {
                return Err(field);
            }
            issues.warn(
                field.clone(),
                "domainNames is not supported: it matches nothing",
            );
            return Ok(vec![PeerMatch::Nothing { what: field }]);
        }
        pod_peer(path, namespaces.as_ref(), pods.as_ref(), issues)
    }

    fn selects_pods(&self) -> bool {
        self.nodes.is_none() && self.networks.is_none() && self.domain_names.is_none()
    }
}

fn rule<P: Peer>(place: &str, field: &str, read: &RuleSpec<'_, P>, issues: &mut Issues) -> Rule {
    let path = format!("spec.{place}");
    if read.name.chars().count() > 100 {
        issues.reject(
            format!("{path}.name"),
            "must not be longer than 100 characters",
        );
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

/// Fails closed as the API requires: an Accept rule matches no traffic, a Deny or Pass rule denies all
/// traffic. `domainNames` is valid in Accept rules only.
fn unknown_peer(name: &str, action: RuleAction, field: String, issues: &mut Issues) -> Rule {
    let (action, peers, what) = match action {
        RuleAction::Allow => {
            let nothing = PeerMatch::Nothing {
                what: field.clone(),
            };
            (
                RuleAction::Allow,
                Some(vec![nothing]),
                "the rule matches no traffic",
            )
        }
        RuleAction::Deny | RuleAction::Pass => {
            (RuleAction::Deny, None, "the rule denies all traffic")
        }
    };
    issues.warn(
        field,
        format!("this version cannot match this peer: {what}"),
    );
    Rule {
        name: name.to_owned(),
        action,
        peers,
        ports: None,
    }
}

/// Rejects named ports in a rule with peers that are not pods.
fn reject_named_ports(path: &str, read: &RuleSpec<'_, EgressPeer>, issues: &mut Issues) {
    let named = |p: &ClusterProtocol| p.destination_named_port.is_some();
    if read.protocols.is_some_and(|list| list.iter().any(named))
        && read.peers.iter().any(|peer| !peer.selects_pods())
    {
        issues.reject(
            format!("{path}.protocols"),
            "must not use named ports with networks, nodes or domainNames",
        );
    }
}

fn protocol(path: &str, read: &ClusterProtocol, made: &mut Vec<PortMatch>, issues: &mut Issues) {
    let ClusterProtocol {
        tcp,
        udp,
        sctp,
        destination_named_port,
    } = read;
    let named = destination_named_port
        .as_deref()
        .filter(|name| !name.is_empty());
    let forms = [
        tcp.is_some(),
        udp.is_some(),
        sctp.is_some(),
        named.is_some(),
    ];
    if forms.into_iter().filter(|form| *form).count() != 1 {
        issues.reject(
            path,
            "must set exactly one of tcp, udp, sctp and destinationNamedPort",
        );
        return;
    }
    for (key, transport, ports) in [
        ("tcp", Transport::Tcp, tcp),
        ("udp", Transport::Udp, udp),
        ("sctp", Transport::Sctp, sctp),
    ] {
        if let Some(ports) = ports {
            let ports = destination(&format!("{path}.{key}"), ports, issues);
            made.extend(ports.map(|ports| PortMatch {
                transport: Some(transport),
                ports,
            }));
        }
    }
    // A named port also determines the protocol.
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
    let ClusterProtocolPorts { destination_port } = read;
    match destination_port.as_ref() {
        // An API server may have pruned a field of a newer version that makes the match narrower.
        None => {
            issues.reject(path, "is required");
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
            range: Some(ClusterPortRange { start, end }),
        }) => {
            let start = issues.check(&format!("{path}.range.start"), port((*start).into()));
            let end = issues.check(&format!("{path}.range.end"), port((*end).into()));
            let (start, end) = start.zip(end)?;
            if start >= end {
                issues.reject(format!("{path}.range"), "start must be less than end");
            }
            Some(PortRange::Range(start, end))
        }
        Some(_) => {
            issues.reject(path, "must set exactly one of number and range");
            None
        }
    }
}
