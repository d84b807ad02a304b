// SPDX-License-Identifier: Apache-2.0
//! Parses MeshPolicy and ClusterMeshPolicy.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_plan::cluster::{
    Entity, NamespaceMatch, PeerMatch, Policy, Rule, RuleAction, Selector, ServiceAccountMatch,
    Subject as PolicySubject, Tier,
};

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, own_spec};
use super::rules::{
    Directions, denial, ip_block, is_audit, isolation, port_match, salvaged_tier, tier_and_priority,
};
use super::selector::{optional, salvaged, selector};
use super::validate::subdomain;
use crate::crd::{
    ClusterAction, ClusterMeshPolicySpec, MeshAction, MeshEgressRule, MeshEntity, MeshIngressRule,
    MeshIpBlock, MeshPeer, MeshPolicySpec, MeshPort, PolicyMode,
};

/// The properties of a policy that its rules depend on.
struct Context<'a> {
    /// The namespace of the policy; `None` for a cluster-scoped policy.
    namespace: Option<&'a str>,
    tier: Tier,
    /// The action of rules without an action.
    action: RuleAction,
}

/// A rule of either direction.
struct RuleSpec<'a> {
    name: Option<&'a str>,
    action: Option<ClusterAction>,
    peers: (&'static str, Option<&'a [MeshPeer]>),
    ports: Option<&'a [MeshPort]>,
}

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let MeshPolicySpec {
        pod_selector,
        action,
        mode,
        ingress,
        egress,
    } = own_spec(object.value, issues)?;
    let context = Context {
        namespace: Some(object.namespace()),
        tier: Tier::Namespaced,
        action: match action {
            MeshAction::Allow => RuleAction::Allow,
            MeshAction::Deny => RuleAction::Deny,
        },
    };
    let pods = optional("spec.podSelector", pod_selector.as_ref(), issues);
    let (ingress, egress) = directions(&context, ingress, egress, issues);
    Some(ParsedObject::Policy(Arc::new(Policy {
        tier: Tier::Namespaced,
        subject: PolicySubject::Pods {
            namespace: object.namespace().to_owned(),
            pods,
        },
        ingress,
        egress,
        audit: mode == PolicyMode::Audit,
    })))
}

pub(super) fn fallback(object: &RawObject<'_>) -> Fallback {
    if is_audit(object) {
        return Fallback::nothing("the policy neither audits nor isolates any pod");
    }
    isolation(object, named_directions(object))
}

pub(super) fn parse_cluster(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let ClusterMeshPolicySpec {
        tier,
        priority,
        namespace_selector,
        pod_selector,
        action: default_action,
        mode,
        ingress,
        egress,
    } = own_spec(object.value, issues)?;
    let tier = tier_and_priority(tier, priority, issues)?;
    let context = Context {
        namespace: None,
        tier,
        action: action(default_action),
    };
    let namespaces = optional(
        "spec.namespaceSelector",
        namespace_selector.as_ref(),
        issues,
    );
    let pods = optional("spec.podSelector", pod_selector.as_ref(), issues);
    let (ingress, egress) = directions(&context, ingress, egress, issues);
    Some(ParsedObject::Policy(Arc::new(Policy {
        tier,
        subject: PolicySubject::Namespaces { namespaces, pods },
        ingress,
        egress,
        audit: mode == PolicyMode::Audit,
    })))
}

pub(super) fn fallback_cluster(object: &RawObject<'_>) -> Fallback {
    if is_audit(object) {
        return Fallback::nothing("the policy neither audits nor isolates any pod");
    }
    let namespaces = salvaged(object.raw(&["spec", "namespaceSelector"]));
    let pods = salvaged(object.raw(&["spec", "podSelector"]));
    match (namespaces, pods) {
        (Some(namespaces), Some(pods)) => {
            let directions = named_directions(object);
            denial(salvaged_tier(object), namespaces, pods, directions)
        }
        _ => Fallback::nothing(
            "its selectors cannot be read, so the policy does not apply to any pod",
        ),
    }
}

/// The directions that a rejected policy sets; both if it sets none.
fn named_directions(object: &RawObject<'_>) -> Directions {
    let named = |field| object.raw(&["spec", field]).is_some();
    match (named("ingress"), named("egress")) {
        (false, false) => Directions::BOTH,
        (ingress, egress) => Directions { ingress, egress },
    }
}

fn action(read: ClusterAction) -> RuleAction {
    match read {
        ClusterAction::Allow => RuleAction::Allow,
        ClusterAction::Deny => RuleAction::Deny,
        ClusterAction::Pass => RuleAction::Pass,
    }
}

type Rules = Option<Vec<Rule>>;

fn directions(
    context: &Context<'_>,
    ingress: Option<Vec<MeshIngressRule>>,
    egress: Option<Vec<MeshEgressRule>>,
    issues: &mut Issues,
) -> (Rules, Rules) {
    if ingress.is_none() && egress.is_none() {
        issues.reject("spec", "must set ingress or egress");
    }
    let ingress = ingress.map(|rules| {
        let read = rules.iter().map(|rule| {
            let MeshIngressRule {
                name,
                action,
                from,
                ports,
            } = rule;
            RuleSpec {
                name: name.as_deref(),
                action: *action,
                peers: ("from", from.as_deref()),
                ports: ports.as_deref(),
            }
        });
        direction(context, "ingress", read.collect(), issues)
    });
    let egress = egress.map(|rules| {
        let read = rules.iter().map(|rule| {
            let MeshEgressRule {
                name,
                action,
                to,
                ports,
            } = rule;
            RuleSpec {
                name: name.as_deref(),
                action: *action,
                peers: ("to", to.as_deref()),
                ports: ports.as_deref(),
            }
        });
        direction(context, "egress", read.collect(), issues)
    });
    (ingress, egress)
}

fn direction(
    context: &Context<'_>,
    direction: &str,
    rules: Vec<RuleSpec<'_>>,
    issues: &mut Issues,
) -> Vec<Rule> {
    let isolates = context.tier == Tier::Namespaced && context.action == RuleAction::Allow;
    if rules.is_empty() && !isolates {
        issues.reject(
            format!("spec.{direction}"),
            "must not be empty: remove the field, or add a rule",
        );
    }
    let mut names = BTreeSet::new();
    let mut made = Vec::new();
    for (i, read) in rules.into_iter().enumerate() {
        let path = format!("spec.{direction}[{i}]");
        let name = match read.name {
            Some(name) => name.to_owned(),
            None => format!("{direction}[{i}]"),
        };
        if !names.insert(name.clone()) {
            issues.reject(
                format!("{path}.name"),
                format!("duplicate rule name {name:?}"),
            );
        }
        made.push(rule(context, &path, name, &read, issues));
    }
    made
}

fn rule(
    context: &Context<'_>,
    path: &str,
    name: String,
    read: &RuleSpec<'_>,
    issues: &mut Issues,
) -> Rule {
    if context.tier == Tier::Namespaced && read.action.is_some() {
        issues.reject(
            format!("{path}.action"),
            "must not be set in a MeshPolicy: spec.action applies to all rules",
        );
    }
    let action = read.action.map_or(context.action, action);
    if action == RuleAction::Pass && !matches!(context.tier, Tier::Admin(_)) {
        issues.reject(
            format!("{path}.action"),
            "Pass is valid in the Admin tier only",
        );
    }
    let (field, peers) = read.peers;
    let peers = peers.map(|peers| {
        not_empty(&format!("{path}.{field}"), peers.len(), issues);
        let mut made = Vec::new();
        for (i, read) in peers.iter().enumerate() {
            peer(
                context,
                &format!("{path}.{field}[{i}]"),
                read,
                &mut made,
                issues,
            );
        }
        made
    });
    let ports = read.ports.map(|ports| {
        not_empty(&format!("{path}.ports"), ports.len(), issues);
        let mut made = Vec::new();
        for (i, read) in ports.iter().enumerate() {
            let MeshPort {
                port,
                end_port,
                protocol,
            } = read;
            made.extend(port_match(
                &format!("{path}.ports[{i}]"),
                Some(protocol.name()),
                port.as_ref(),
                *end_port,
                issues,
            ));
        }
        made
    });
    Rule {
        name,
        action,
        peers,
        ports,
    }
}

/// Rejects an empty list: templates produce it by accident, and it could mean nothing or everything.
fn not_empty(field: &str, len: usize, issues: &mut Issues) {
    if len == 0 {
        issues.reject(
            field,
            "must not be empty: remove the field to match everything",
        );
    }
}

fn peer(
    context: &Context<'_>,
    path: &str,
    read: &MeshPeer,
    made: &mut Vec<PeerMatch>,
    issues: &mut Issues,
) {
    let MeshPeer {
        pod_selector,
        namespace_selector,
        service_accounts,
        ip_blocks,
        entities,
    } = read;
    let is_workload =
        pod_selector.is_some() || namespace_selector.is_some() || service_accounts.is_some();
    let forms = [is_workload, ip_blocks.is_some(), entities.is_some()];
    if forms.into_iter().filter(|form| *form).count() != 1 {
        issues.reject(
            path,
            "must set exactly one of: selectors and serviceAccounts, ipBlocks, entities",
        );
        return;
    }
    if is_workload {
        made.push(workloads(context, path, read, issues));
    }
    if let Some(blocks) = ip_blocks {
        not_empty(&format!("{path}.ipBlocks"), blocks.len(), issues);
        for (i, MeshIpBlock { cidr, except }) in blocks.iter().enumerate() {
            let path = format!("{path}.ipBlocks[{i}]");
            made.extend(ip_block(&path, cidr, except, issues));
        }
    }
    if let Some(entities) = entities {
        not_empty(&format!("{path}.entities"), entities.len(), issues);
        made.extend(
            entities
                .iter()
                .map(|entity| PeerMatch::Entity(self::entity(*entity))),
        );
    }
}

fn entity(read: MeshEntity) -> Entity {
    match read {
        MeshEntity::Host => Entity::Host,
        MeshEntity::RemoteNode => Entity::RemoteNode,
        MeshEntity::KubeApiserver => Entity::KubeApiserver,
        MeshEntity::Cluster => Entity::Cluster,
        MeshEntity::World => Entity::World,
    }
}

fn workloads(context: &Context<'_>, path: &str, read: &MeshPeer, issues: &mut Issues) -> PeerMatch {
    let selected = read.namespace_selector.as_ref().map(|read| {
        NamespaceMatch::Labels(selector(&format!("{path}.namespaceSelector"), read, issues))
    });
    let pods = optional(
        &format!("{path}.podSelector"),
        read.pod_selector.as_ref(),
        issues,
    );
    // A bare name is in the policy's namespace, unless the peer selects namespaces.
    let own = context.namespace.filter(|_| selected.is_none());
    let service_accounts = read.service_accounts.as_ref().map(|accounts| {
        let path = format!("{path}.serviceAccounts");
        not_empty(&path, accounts.len(), issues);
        let mut made = BTreeSet::new();
        for (i, text) in accounts.iter().enumerate() {
            let bare_is_known = own.is_some() || selected.is_some();
            let account = service_account(text, own, bare_is_known);
            made.extend(issues.check(&format!("{path}[{i}]"), account));
        }
        made
    });
    let everywhere = || NamespaceMatch::Labels(Selector::default());
    let namespaces = match (selected, context.namespace) {
        (Some(selected), _) => selected,
        // The service accounts determine the namespaces.
        _ if service_accounts.is_some() => everywhere(),
        (None, Some(namespace)) => NamespaceMatch::Name(namespace.to_owned()),
        (None, None) => everywhere(),
    };
    PeerMatch::Pods {
        namespaces,
        pods,
        service_accounts,
    }
}

/// Parses a service account: `*`, `NAME`, `NAMESPACE/NAME` or `NAMESPACE/*`.
fn service_account(
    text: &str,
    own: Option<&str>,
    bare_is_known: bool,
) -> Result<ServiceAccountMatch, String> {
    let name = |name: &str| -> Result<Option<String>, String> {
        if name == "*" {
            return Ok(None);
        }
        subdomain(name)?;
        Ok(Some(name.to_owned()))
    };
    match text.split_once('/') {
        _ if text == "*" => Ok(ServiceAccountMatch {
            namespace: None,
            name: None,
        }),
        Some((namespace, account)) => {
            subdomain(namespace)?;
            Ok(ServiceAccountMatch {
                namespace: Some(namespace.to_owned()),
                name: name(account)?,
            })
        }
        None if !bare_is_known => Err(format!("{text:?} must have a namespace: NAMESPACE/{text}")),
        None => Ok(ServiceAccountMatch {
            namespace: own.map(str::to_owned),
            name: name(text)?,
        }),
    }
}
