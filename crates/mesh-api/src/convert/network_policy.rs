// SPDX-License-Identifier: Apache-2.0
//! Parses NetworkPolicy of `networking.k8s.io/v1`, with the validation and defaults of the API server.

use std::sync::Arc;

use k8s_openapi::api::networking::v1 as net;
use mesh_plan::cluster::{
    NamespaceMatch, PeerMatch, Policy, PortMatch, Rule, RuleAction, Subject as PolicySubject, Tier,
};
use serde_json::Value;

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, typed};
use super::rules::{Directions, ip_block, is_set, isolation, port_match};
use super::selector::{optional, selector};

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let read: net::NetworkPolicy = typed(object.value, issues)?;
    let spec = read.spec.unwrap_or_default();
    let namespace = object.namespace();
    let (for_ingress, for_egress) = directions(&spec, issues);
    let pods = optional("spec.podSelector", spec.pod_selector.as_ref(), issues);
    let ingress = spec.ingress.unwrap_or_default();
    let egress = spec.egress.unwrap_or_default();
    let ingress: Vec<Rule> = ingress
        .iter()
        .enumerate()
        .map(|(i, read)| {
            let name = format!("ingress[{i}]");
            let peers = ("from", read.from.as_deref());
            rule(name, namespace, peers, read.ports.as_deref(), issues)
        })
        .collect();
    let egress: Vec<Rule> = egress
        .iter()
        .enumerate()
        .map(|(i, read)| {
            let name = format!("egress[{i}]");
            let peers = ("to", read.to.as_deref());
            rule(name, namespace, peers, read.ports.as_deref(), issues)
        })
        .collect();
    Some(ParsedObject::Policy(Arc::new(Policy {
        tier: Tier::Namespaced,
        subject: PolicySubject::Pods {
            namespace: namespace.to_owned(),
            pods,
        },
        ingress: for_ingress.then_some(ingress),
        egress: for_egress.then_some(egress),
        audit: false,
    })))
}

pub(super) fn fallback(object: &RawObject<'_>) -> Fallback {
    let types: Vec<Option<&str>> = match object.raw(&["spec", "policyTypes"]) {
        None => Vec::new(),
        Some(Value::Array(types)) => types.iter().map(Value::as_str).collect(),
        Some(_) => vec![None],
    };
    let known = |t: &Option<&str>| matches!(t, Some("Ingress" | "Egress"));
    let directions = if types.is_empty() {
        Directions {
            ingress: true,
            egress: is_set(object, "egress"),
        }
    } else if types.iter().all(known) {
        Directions {
            ingress: types.contains(&Some("Ingress")),
            egress: types.contains(&Some("Egress")),
        }
    } else {
        Directions::BOTH
    };
    isolation(object, directions)
}

/// Parses `policyTypes`. The default is ingress, and egress if there is an egress rule.
fn directions(spec: &net::NetworkPolicySpec, issues: &mut Issues) -> (bool, bool) {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    if types.is_empty() {
        let has_egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
        return (true, has_egress);
    }
    for (i, name) in types.iter().enumerate() {
        if !matches!(name.as_str(), "Ingress" | "Egress") {
            issues.reject(
                format!("spec.policyTypes[{i}]"),
                format!("unsupported value {name:?}: must be Ingress or Egress"),
            );
        }
    }
    if types.len() > 2 {
        issues.reject("spec.policyTypes", "must have at most 2 items");
    }
    let has = |wanted: &str| types.iter().any(|name| name == wanted);
    let (ingress, egress) = (has("Ingress"), has("Egress"));
    for (applies, direction, rules) in [
        (
            ingress,
            "ingress",
            spec.ingress.as_ref().map_or(0, Vec::len),
        ),
        (egress, "egress", spec.egress.as_ref().map_or(0, Vec::len)),
    ] {
        if !applies && rules != 0 {
            issues.warn(
                format!("spec.{direction}"),
                "has no effect: spec.policyTypes does not include this direction",
            );
        }
    }
    (ingress, egress)
}

fn rule(
    name: String,
    namespace: &str,
    (field, peers): (&str, Option<&[net::NetworkPolicyPeer]>),
    ports: Option<&[net::NetworkPolicyPort]>,
    issues: &mut Issues,
) -> Rule {
    let mut matches = Vec::new();
    for (i, read) in peers.unwrap_or_default().iter().enumerate() {
        let path = format!("spec.{name}.{field}[{i}]");
        matches.extend(peer(&path, namespace, read, issues));
    }
    let mut port_matches: Vec<PortMatch> = Vec::new();
    for (i, read) in ports.unwrap_or_default().iter().enumerate() {
        port_matches.extend(port_match(
            &format!("spec.{name}.ports[{i}]"),
            read.protocol.as_deref(),
            read.port.as_ref(),
            read.end_port,
            issues,
        ));
    }
    // An absent list and an empty one both match everything.
    let given = |len: Option<usize>| len.is_some_and(|len| len > 0);
    Rule {
        name,
        action: RuleAction::Allow,
        peers: given(peers.map(<[_]>::len)).then_some(matches),
        ports: given(ports.map(<[_]>::len)).then_some(port_matches),
    }
}

fn peer(
    path: &str,
    namespace: &str,
    read: &net::NetworkPolicyPeer,
    issues: &mut Issues,
) -> Option<PeerMatch> {
    match (&read.pod_selector, &read.namespace_selector, &read.ip_block) {
        (None, None, None) => {
            issues.reject(path, "must set podSelector, namespaceSelector or ipBlock");
            None
        }
        (None, None, Some(block)) => ip_block(
            &format!("{path}.ipBlock"),
            &block.cidr,
            block.except.as_deref().unwrap_or_default(),
            issues,
        ),
        (_, _, Some(_)) => {
            issues.reject(
                format!("{path}.ipBlock"),
                "must not be set with podSelector or namespaceSelector",
            );
            None
        }
        (pods, namespaces, None) => Some(PeerMatch::Pods {
            namespaces: match namespaces {
                Some(read) => {
                    let path = format!("{path}.namespaceSelector");
                    NamespaceMatch::Labels(selector(&path, read, issues))
                }
                None => NamespaceMatch::Name(namespace.to_owned()),
            },
            pods: optional(&format!("{path}.podSelector"), pods.as_ref(), issues),
            service_accounts: None,
        }),
    }
}
