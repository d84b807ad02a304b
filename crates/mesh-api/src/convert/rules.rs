// SPDX-License-Identifier: Apache-2.0
//! Parts of rules that several kinds share: ports, IP blocks, and the fallback of a rejected policy.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_plan::cluster::{
    PeerMatch, Policy, PortMatch, PortRange, Rule, RuleAction, Selector, Subject as PolicySubject,
    Tier,
};
use serde_json::Value;

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject};
use super::selector::salvaged;
use super::validate::{cidr, is_strictly_inside, port, port_name, transport};
use crate::crd::ClusterTier;

/// Parses a port of NetworkPolicy and of the mesh's own kinds.
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
            issues.reject(end_field, "must not be set without port");
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
                    issues.reject(
                        end_field,
                        format!("must be greater than or equal to port {first}, is {last}"),
                    );
                    None
                }
                (Some(first), Some(last)) => Some(PortRange::Range(first, last)),
                _ => None,
            }
        }
        (Some(IntOrString::String(_)), Some(_)) => {
            issues.reject(end_field, "must not be set with a named port");
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

/// Parses an IP block with exceptions.
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
                issues.reject(field, format!("{hole} must be a strict subset of {outer}"));
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

/// The directions of traffic that a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Directions {
    pub(super) ingress: bool,
    pub(super) egress: bool,
}

impl Directions {
    pub(super) const BOTH: Self = Self {
        ingress: true,
        egress: true,
    };

    /// The directions in words; `None` if there are none.
    fn words(self) -> Option<&'static str> {
        match (self.ingress, self.egress) {
            (true, true) => Some("ingress and egress"),
            (true, false) => Some("ingress"),
            (false, true) => Some("egress"),
            (false, false) => None,
        }
    }
}

/// The fallback of a rejected namespaced policy: isolates the pods that its selector selects.
pub(super) fn isolation(object: &RawObject<'_>, directions: Directions) -> Fallback {
    let namespace = object.namespace().to_owned();
    let selector = salvaged(object.raw(&["spec", "podSelector"]));
    let pods = match &selector {
        Some(_) => "the pods that spec.podSelector selects".to_owned(),
        None => format!("every pod in namespace {namespace}"),
    };
    let Directions { ingress, egress } = directions;
    let Some(which) = directions.words() else {
        return Fallback::nothing("the policy does not isolate any pod");
    };
    let applies_to = match selector {
        Some(pods) => PolicySubject::Pods { namespace, pods },
        None => PolicySubject::WholeNamespace(namespace),
    };
    Fallback {
        parsed: Some(ParsedObject::Policy(Arc::new(Policy {
            tier: Tier::Namespaced,
            subject: applies_to,
            ingress: ingress.then(Vec::new),
            egress: egress.then(Vec::new),
            audit: false,
        }))),
        consequence: format!("the policy isolates {pods} for {which}"),
    }
}

/// The fallback of a rejected cluster-scoped policy with a valid subject: denies all traffic in its
/// tier and directions.
pub(super) fn denial(
    tier: Tier,
    namespaces: Selector,
    pods: Selector,
    directions: Directions,
) -> Fallback {
    let Directions { ingress, egress } = directions;
    let Some(which) = directions.words() else {
        return Fallback::nothing("the policy does not isolate any pod");
    };
    let deny_all = || {
        vec![Rule {
            name: String::new(),
            action: RuleAction::Deny,
            peers: None,
            ports: None,
        }]
    };
    Fallback {
        parsed: Some(ParsedObject::Policy(Arc::new(Policy {
            tier,
            subject: PolicySubject::Namespaces { namespaces, pods },
            ingress: ingress.then(deny_all),
            egress: egress.then(deny_all),
            audit: false,
        }))),
        consequence: format!("the policy denies all {which} of the pods that its subject selects"),
    }
}

/// Whether a field of `spec` is set to anything except an empty list.
pub(super) fn is_set(object: &RawObject<'_>, field: &str) -> bool {
    match object.raw(&["spec", field]) {
        None => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    }
}

/// Whether a rejected policy has mode Audit.
pub(super) fn is_audit(object: &RawObject<'_>) -> bool {
    object.raw(&["spec", "mode"]).and_then(Value::as_str) == Some("Audit")
}

/// The highest priority number of cluster-scoped policies (network-policy-api).
const MAX_PRIORITY: u32 = 1000;

/// Parses the tier and priority of a cluster-scoped policy.
pub(super) fn tier_and_priority(
    tier: ClusterTier,
    priority: i32,
    issues: &mut Issues,
) -> Option<Tier> {
    let priority = u32::try_from(priority)
        .ok()
        .filter(|priority| *priority <= MAX_PRIORITY)
        .ok_or_else(|| format!("must be between 0 and {MAX_PRIORITY}, is {priority}"));
    let priority = issues.check("spec.priority", priority)?;
    Some(match tier {
        ClusterTier::Admin => Tier::Admin(priority),
        ClusterTier::Baseline => Tier::Baseline(priority),
    })
}

/// The tier of a rejected cluster-scoped policy: the strictest one if it cannot be read.
pub(super) fn salvaged_tier(object: &RawObject<'_>) -> Tier {
    let priority = object
        .raw(&["spec", "priority"])
        .and_then(Value::as_u64)
        .and_then(|priority| u32::try_from(priority).ok())
        .filter(|priority| *priority <= MAX_PRIORITY)
        .unwrap_or(0);
    match object.raw(&["spec", "tier"]).and_then(Value::as_str) {
        Some("Baseline") => Tier::Baseline(priority),
        _ => Tier::Admin(priority),
    }
}
