// SPDX-License-Identifier: Apache-2.0
//! What rules of several kinds share: ports, address blocks, and the policy that stands in for a
//! rejected one.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_plan::cluster::{
    PeerMatch, Policy, PortMatch, PortRange, Rule, RuleAction, Selector, Subject as PolicySubject,
    Tier,
};
use serde_json::Value;

use super::Fact;
use super::object::{Held, Issues, Subject};
use super::selector::salvaged;
use super::validate::{cidr, is_strictly_inside, port, port_name, transport};
use crate::crd::ClusterTier;

/// A port of NetworkPolicy and of the mesh's own kinds.
pub(super) fn port_match(
    path: &str,
    protocol: Option<&str>,
    number: Option<&IntOrString>,
    end: Option<i32>,
    issues: &mut Issues,
) -> Option<PortMatch> {
    let transport = issues.check(&format!("{path}.protocol"), transport(protocol));
    let end_field = format!("{path}.endPort");
    let ports = match (number, end) {
        (None, None) => Some(PortRange::All),
        (None, Some(_)) => {
            issues.reject(end_field, "needs a port");
            None
        }
        (Some(IntOrString::Int(first)), end) => {
            let first = issues.check(&format!("{path}.port"), port((*first).into()));
            let last = match end {
                Some(end) => issues.check(&end_field, port(end.into())),
                None => first,
            };
            match (first, last) {
                (Some(first), Some(last)) if last < first => {
                    issues.reject(end_field, format!("{last} is below port {first}"));
                    None
                }
                (Some(first), Some(last)) => Some(PortRange::Range(first, last)),
                _ => None,
            }
        }
        (Some(IntOrString::String(_)), Some(_)) => {
            issues.reject(end_field, "needs a port that is a number, not a name");
            None
        }
        (Some(IntOrString::String(name)), None) => issues
            .check(&format!("{path}.port"), port_name(name))
            .map(|()| PortRange::Named(name.clone())),
    };
    Some(PortMatch {
        transport: Some(transport?),
        ports: ports?,
    })
}

/// An address block with exceptions.
pub(super) fn ip_block(
    path: &str,
    block: &str,
    except: &[String],
    issues: &mut Issues,
) -> Option<PeerMatch> {
    let outer = issues.check(&format!("{path}.cidr"), cidr(block));
    let mut holes = BTreeSet::new();
    for (i, text) in except.iter().enumerate() {
        let field = format!("{path}.except[{i}]");
        let Some(hole) = issues.check(&field, cidr(text)) else {
            continue;
        };
        match &outer {
            Some(outer) if !is_strictly_inside(&hole, outer) => {
                issues.reject(field, format!("{hole} must be a true part of {outer}"));
            }
            _ => {
                holes.insert(hole);
            }
        }
    }
    Some(PeerMatch::Cidr {
        cidr: outer?,
        except: holes,
    })
}

/// What stands in for a rejected namespaced policy: it isolates what its selector selects, in these
/// directions.
pub(super) fn isolation(subject: &Subject<'_>, directions: (bool, bool)) -> Held {
    let namespace = subject.namespace().to_owned();
    let selector = salvaged(subject.raw(&["spec", "podSelector"]));
    let whom = match &selector {
        Some(_) => "the pods that spec.podSelector selects".to_owned(),
        None => format!("every pod of namespace {namespace}"),
    };
    let (ingress, egress) = directions;
    let which = match directions {
        (true, true) => "ingress and egress",
        (true, false) => "ingress",
        (false, true) => "egress",
        (false, false) => return Held::nothing("it isolates nothing"),
    };
    let applies_to = match selector {
        Some(pods) => PolicySubject::Pods { namespace, pods },
        None => PolicySubject::WholeNamespace(namespace),
    };
    Held {
        fact: Some(Fact::Policy(Arc::new(Policy {
            tier: Tier::Namespaced,
            subject: applies_to,
            ingress: ingress.then(Vec::new),
            egress: egress.then(Vec::new),
            audit: false,
        }))),
        consequence: format!("it isolates {whom} for {which}"),
    }
}

/// What stands in for a rejected cluster-scoped policy with a usable subject: in its tier, it
/// denies everything in these directions.
pub(super) fn denial(
    tier: Tier,
    namespaces: Selector,
    pods: Selector,
    directions: (bool, bool),
) -> Held {
    let (ingress, egress) = directions;
    let which = match directions {
        (true, true) => "ingress and egress",
        (true, false) => "ingress",
        (false, true) => "egress",
        (false, false) => return Held::nothing("it isolates nothing"),
    };
    let deny_all = || {
        vec![Rule {
            name: String::new(),
            action: RuleAction::Deny,
            peers: None,
            ports: None,
        }]
    };
    Held {
        fact: Some(Fact::Policy(Arc::new(Policy {
            tier,
            subject: PolicySubject::Namespaces { namespaces, pods },
            ingress: ingress.then(deny_all),
            egress: egress.then(deny_all),
            audit: false,
        }))),
        consequence: format!("it denies {which} of the pods that its subject selects"),
    }
}

/// Whether a field of `spec` says anything, whatever it is.
pub(super) fn says(subject: &Subject<'_>, field: &str) -> bool {
    match subject.raw(&["spec", field]) {
        None => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    }
}

/// Whether a rejected policy asked for audit only.
pub(super) fn is_audit(subject: &Subject<'_>) -> bool {
    subject.raw(&["spec", "mode"]).and_then(Value::as_str) == Some("Audit")
}

/// Highest priority number of cluster-wide policies (network-policy-api).
const MAX_PRIORITY: u32 = 1000;

/// Tier and priority of a cluster-wide policy.
pub(super) fn tier_and_rank(tier: ClusterTier, priority: i32, issues: &mut Issues) -> Option<Tier> {
    let priority = u32::try_from(priority)
        .ok()
        .filter(|priority| *priority <= MAX_PRIORITY)
        .ok_or_else(|| format!("{priority} must be from 0 to {MAX_PRIORITY}"));
    let priority = issues.check("spec.priority", priority)?;
    Some(match tier {
        ClusterTier::Admin => Tier::Admin(priority),
        ClusterTier::Baseline => Tier::Baseline(priority),
    })
}

/// The tier of a rejected cluster-wide policy: the strictest where it cannot be read.
pub(super) fn salvaged_tier(subject: &Subject<'_>) -> Tier {
    let priority = subject
        .raw(&["spec", "priority"])
        .and_then(Value::as_u64)
        .and_then(|priority| u32::try_from(priority).ok())
        .filter(|priority| *priority <= MAX_PRIORITY)
        .unwrap_or(0);
    match subject.raw(&["spec", "tier"]).and_then(Value::as_str) {
        Some("Baseline") => Tier::Baseline(priority),
        _ => Tier::Admin(priority),
    }
}
