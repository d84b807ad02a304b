// SPDX-License-Identifier: Apache-2.0
//! MeshAuthentication, field by field: a field that is broken counts at its strictest.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh_plan::cluster::{Authentication, Mtls, OutboundMode, Selector, UdpMode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Fact;
use super::object::{Held, Issues, Subject, own_spec, typed};
use super::selector::selector;
use super::validate::port;
use crate::crd::{MeshAuthenticationSpec, MtlsMode, OutboundTraffic, UdpTraffic};

pub(super) fn parse(subject: &Subject<'_>, issues: &mut Issues) -> Option<Fact> {
    let mut whole = Issues::default();
    let spec: Option<MeshAuthenticationSpec> = own_spec(subject.value, &mut whole);
    issues.warnings.extend(whole.warnings);
    let fields = Issues::default();
    let (authentication, fields) = strictest(subject, fields);
    issues.warnings.extend(fields.warnings);
    // What is wrong outside of the fields below is only seen in the whole.
    if spec.is_none() && fields.problems.is_empty() {
        issues.problems.extend(whole.problems);
    }
    issues.problems.extend(fields.problems);
    Some(Fact::Authentication(authentication.into()))
}

pub(super) fn rejected(subject: &Subject<'_>) -> Held {
    let (authentication, _) = strictest(subject, Issues::default());
    Held {
        fact: Some(Fact::Authentication(authentication.into())),
        consequence: "it is in force, its broken fields at their strictest".to_owned(),
    }
}

fn strictest(subject: &Subject<'_>, mut issues: Issues) -> (Authentication, Issues) {
    let mtls = field(subject, "mtls", MtlsMode::Strict, &mut issues).map(mtls);
    let outbound = field(subject, "outbound", OutboundTraffic::Required, &mut issues);
    let udp = field(subject, "udp", UdpTraffic::Deny, &mut issues);
    let mut authentication = Authentication {
        pods: None,
        mtls,
        ports: BTreeMap::new(),
        outbound: outbound.map(|mode| match mode {
            OutboundTraffic::Opportunistic => OutboundMode::Opportunistic,
            OutboundTraffic::Required => OutboundMode::Required,
        }),
        udp: udp.map(|mode| match mode {
            UdpTraffic::Allow => UdpMode::Allow,
            UdpTraffic::SameNode => UdpMode::SameNode,
            UdpTraffic::Deny => UdpMode::Deny,
        }),
    };
    ports(subject, &mut authentication, &mut issues);
    match pods(subject, &mut issues) {
        Ok(pods) => authentication.pods = pods,
        // Whom it is about is unknown: everybody, and nobody is to be opened by it.
        Err(()) => {
            authentication.pods = None;
            authentication.ports.clear();
            authentication.mtls = Some(Mtls::Strict);
            authentication.outbound = authentication.outbound.map(|_| OutboundMode::Required);
            authentication.udp = authentication.udp.map(|_| UdpMode::Deny);
        }
    }
    (authentication, issues)
}

fn mtls(mode: MtlsMode) -> Mtls {
    match mode {
        MtlsMode::Strict => Mtls::Strict,
        MtlsMode::Permissive => Mtls::Permissive,
    }
}

/// A field of the spec; broken = the strictest.
fn field<T: DeserializeOwned>(
    subject: &Subject<'_>,
    name: &str,
    strictest: T,
    issues: &mut Issues,
) -> Option<T> {
    let value = subject.raw(&["spec", name])?;
    let mut own = Issues::default();
    let read = typed(value, &mut own);
    relocate(&format!("spec.{name}"), own, issues);
    Some(read.unwrap_or(strictest))
}

/// Problems of a part, as problems of the whole.
fn relocate(path: &str, part: Issues, issues: &mut Issues) {
    for (field, why) in part.problems {
        let field = field.trim_matches('.');
        let field = if field.is_empty() {
            path.to_owned()
        } else {
            format!("{path}.{field}")
        };
        issues.reject(field, why);
    }
}

fn pods(subject: &Subject<'_>, issues: &mut Issues) -> Result<Option<Selector>, ()> {
    let Some(value) = subject.raw(&["spec", "podSelector"]) else {
        return Ok(None);
    };
    let before = issues.problems.len();
    let mut own = Issues::default();
    let read: Option<LabelSelector> = typed(value, &mut own);
    relocate("spec.podSelector", own, issues);
    let pods = read.map(|read| selector("spec.podSelector", &read, issues));
    if issues.problems.len() == before {
        // An empty one selects all pods, as a missing one does.
        Ok(pods.filter(|pods| !pods.requirements.is_empty()))
    } else {
        Err(())
    }
}

/// A port's mode that is broken is Strict; a port that is broken makes every port Strict.
fn ports(subject: &Subject<'_>, authentication: &mut Authentication, issues: &mut Issues) {
    let listed = match subject.raw(&["spec", "ports"]) {
        None => return,
        Some(Value::Array(listed)) => listed,
        Some(_) => {
            issues.reject("spec.ports", "must be a list");
            authentication.mtls = Some(Mtls::Strict);
            return;
        }
    };
    let mut unknown_port = false;
    for (i, entry) in listed.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        let number = entry.get("port").and_then(Value::as_i64);
        let number = match number {
            Some(number) => issues.check(&format!("{path}.port"), port(number)),
            None => {
                issues.reject(format!("{path}.port"), "must be a number from 1 to 65535");
                None
            }
        };
        let mut own = Issues::default();
        let missing = Value::Null;
        let mode = typed::<MtlsMode>(entry.get("mtls").unwrap_or(&missing), &mut own);
        relocate(&format!("{path}.mtls"), own, issues);
        let mode = mode.map_or(Mtls::Strict, mtls);
        match number {
            None => unknown_port = true,
            Some(number) => {
                if authentication.ports.contains_key(&number) {
                    issues.reject(format!("{path}.port"), format!("{number} is given twice"));
                }
                let stricter = authentication.ports.get(&number).copied().unwrap_or(mode);
                authentication.ports.insert(number, stricter.max(mode));
            }
        }
    }
    if unknown_port {
        authentication.mtls = Some(Mtls::Strict);
        authentication.ports.clear();
    }
}
