// SPDX-License-Identifier: Apache-2.0
//! MeshPolicy and ClusterMeshPolicy.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_plan::cluster::{
    Entity, NamespaceMatch, PeerMatch, Policy, Rule, RuleAction, Selector, ServiceAccountMatch,
    Subject as PolicySubject, Tier,
};

use super::Fact;
use super::object::{Held, Issues, Subject, own_spec};
use super::rules::{
    denial, ip_block, is_audit, isolation, port_match, salvaged_tier, tier_and_rank,
};
use super::selector::{optional, salvaged, selector};
use super::validate::subdomain;
use crate::crd::{
    ClusterAction, ClusterMeshPolicySpec, MeshAction, MeshEntity, MeshPeer, MeshPolicySpec,
    MeshPort, PolicyMode,
};

/// What a rule's parts mean in its policy.
struct Context<'a> {
    /// The policy's namespace; `None` = cluster-wide.
    namespace: Option<&'a str>,
    tier: Tier,
    /// What rules without an action do.
    action: RuleAction,
}

/// A rule of either direction.
struct Read<'a> {
    name: Option<&'a str>,
    action: Option<ClusterAction>,
    peers: (&'static str, Option<&'a [MeshPeer]>),
    ports: Option<&'a [MeshPort]>,
}

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    let spec: MeshPolicySpec = own_spec(subject.value, issues)?;
    let context = Context {
        namespace: Some(subject.namespace()),
        tier: Tier::Namespaced,
        action: match spec.action {
            MeshAction::Allow => RuleAction::Allow,
            MeshAction::Deny => RuleAction::Deny,
        },
    };
    let pods = optional("spec.podSelector", spec.pod_selector.as_ref(), issues);
    let (ingress, egress) = directions(&context, spec.ingress, spec.egress, issues);
    Some(Fact::Policy(Arc::new(Policy {
        tier: Tier::Namespaced,
        subject: PolicySubject::Pods {
            namespace: subject.namespace().to_owned(),
            pods,
        },
        ingress,
        egress,
        audit: spec.mode == PolicyMode::Audit,
    })))
}

pub(super) fn rejected(subject: &Subject<'_>) -> Held {
    if is_audit(subject) {
        return Held::nothing("it audits nothing, and isolates nothing");
    }
    isolation(subject, named_directions(subject))
}

pub(super) fn parse_cluster(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    let spec: ClusterMeshPolicySpec = own_spec(subject.value, issues)?;
    let tier = tier_and_rank(spec.tier, spec.priority, issues)?;
    let context = Context {
        namespace: None,
        tier,
        action: action(spec.action),
    };
    let namespaces = optional(
        "spec.namespaceSelector",
        spec.namespace_selector.as_ref(),
        issues,
    );
    let pods = optional("spec.podSelector", spec.pod_selector.as_ref(), issues);
    let (ingress, egress) = directions(&context, spec.ingress, spec.egress, issues);
    Some(Fact::Policy(Arc::new(Policy {
        tier,
        subject: PolicySubject::Namespaces { namespaces, pods },
        ingress,
        egress,
        audit: spec.mode == PolicyMode::Audit,
    })))
}

pub(super) fn rejected_cluster(subject: &Subject<'_>) -> Held {
    if is_audit(subject) {
        return Held::nothing("it audits nothing, and isolates nothing");
    }
    let namespaces = salvaged(subject.raw(&["spec", "namespaceSelector"]));
    let pods = salvaged(subject.raw(&["spec", "podSelector"]));
    match (namespaces, pods) {
        (Some(namespaces), Some(pods)) => {
            let directions = named_directions(subject);
            denial(salvaged_tier(subject), namespaces, pods, directions)
        }
        _ => Held::nothing("whom it is about cannot be read: it isolates nothing"),
    }
}

/// What a rejected policy is about; both directions if it names none.
fn named_directions(subject: &Subject<'_>) -> (bool, bool) {
    let named = |field| subject.raw(&["spec", field]).is_some();
    match (named("ingress"), named("egress")) {
        (false, false) => (true, true),
        directions => directions,
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
    ingress: Option<Vec<crate::crd::MeshIngressRule>>,
    egress: Option<Vec<crate::crd::MeshEgressRule>>,
    issues: &mut Issues,
) -> (Rules, Rules) {
    if ingress.is_none() && egress.is_none() {
        issues.reject("spec", "needs ingress or egress rules");
    }
    let ingress = ingress.map(|rules| {
        let read = rules.iter().map(|rule| Read {
            name: rule.name.as_deref(),
            action: rule.action,
            peers: ("from", rule.from.as_deref()),
            ports: rule.ports.as_deref(),
        });
        direction(context, "ingress", read.collect(), issues)
    });
    let egress = egress.map(|rules| {
        let read = rules.iter().map(|rule| Read {
            name: rule.name.as_deref(),
            action: rule.action,
            peers: ("to", rule.to.as_deref()),
            ports: rule.ports.as_deref(),
        });
        direction(context, "egress", read.collect(), issues)
    });
    (ingress, egress)
}

fn direction(
    context: &Context<'_>,
    direction: &str,
    rules: Vec<Read<'_>>,
    issues: &mut Issues,
) -> Vec<Rule> {
    let isolates = context.tier == Tier::Namespaced && context.action == RuleAction::Allow;
    if rules.is_empty() && !isolates {
        issues.reject(
            format!("spec.{direction}"),
            "is empty and says nothing: leave it out, or add a rule",
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
                format!("{name:?} is another rule's name"),
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
    read: &Read<'_>,
    issues: &mut Issues,
) -> Rule {
    if context.tier == Tier::Namespaced && read.action.is_some() {
        issues.reject(
            format!("{path}.action"),
            "is for ClusterMeshPolicy; here spec.action holds for all rules",
        );
    }
    let action = read.action.map_or(context.action, action);
    if action == RuleAction::Pass && !matches!(context.tier, Tier::Admin(_)) {
        issues.reject(format!("{path}.action"), "Pass is for the Admin tier");
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
            made.extend(port_match(
                &format!("{path}.ports[{i}]"),
                Some(read.protocol.name()),
                read.port.as_ref(),
                read.end_port,
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

/// An empty list may mean nobody or everybody; generated manifests produce it by accident.
fn not_empty(field: &str, len: usize, issues: &mut Issues) {
    if len == 0 {
        issues.reject(field, "is empty: leave it out to match everything");
    }
}

fn peer(
    context: &Context<'_>,
    path: &str,
    read: &MeshPeer,
    made: &mut Vec<PeerMatch>,
    issues: &mut Issues,
) {
    let is_workload = read.pod_selector.is_some()
        || read.namespace_selector.is_some()
        || read.service_accounts.is_some();
    let forms = [
        is_workload,
        read.ip_blocks.is_some(),
        read.entities.is_some(),
    ];
    if forms.into_iter().filter(|form| *form).count() != 1 {
        issues.reject(
            path,
            "needs one of: selectors and serviceAccounts, or ipBlocks, or entities",
        );
        return;
    }
    if is_workload {
        made.push(workloads(context, path, read, issues));
    }
    if let Some(blocks) = &read.ip_blocks {
        not_empty(&format!("{path}.ipBlocks"), blocks.len(), issues);
        for (i, block) in blocks.iter().enumerate() {
            let path = format!("{path}.ipBlocks[{i}]");
            made.extend(ip_block(&path, &block.cidr, &block.except, issues));
        }
    }
    if let Some(entities) = &read.entities {
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
    // A bare name means the policy's namespace, unless the peer says which namespaces.
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
        // The accounts say which namespaces.
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

/// `*`, `NAME`, `NAMESPACE/NAME` or `NAMESPACE/*`.
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
        None if !bare_is_known => Err(format!("{text:?} needs its namespace: NAMESPACE/{text}")),
        None => Ok(ServiceAccountMatch {
            namespace: own.map(str::to_owned),
            name: name(text)?,
        }),
    }
}
