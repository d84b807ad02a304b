// SPDX-License-Identifier: Apache-2.0
//! Parses MeshAuthentication field by field. An invalid field gets its strictest value.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh_plan::cluster::{Authentication, Mtls, OutboundMode, Selector, UdpMode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, own_spec, typed};
use super::selector::selector;
use super::validate::port;
use crate::crd::{MeshAuthenticationSpec, MtlsMode, OutboundTraffic, UdpTraffic};

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    let mut whole = Issues::default();
    let spec: Option<MeshAuthenticationSpec> = own_spec(object.value, &mut whole);
    issues.warnings.extend(whole.warnings);
    let (authentication, fields) = strictest(object, Issues::default());
    issues.warnings.extend(fields.warnings);
    match spec {
        // Every field is parsed by itself in `strictest`.
        Some(MeshAuthenticationSpec {
            pod_selector: _,
            mtls: _,
            ports: _,
            outbound: _,
            udp: _,
        }) => {}
        // A problem outside of these fields is seen only in the whole object.
        None if fields.problems.is_empty() => issues.problems.extend(whole.problems),
        None => {}
    }
    issues.problems.extend(fields.problems);
    Some(ParsedObject::Authentication(authentication.into()))
}

pub(super) fn fallback(object: &RawObject<'_>) -> Fallback {
    let (authentication, _) = strictest(object, Issues::default());
    Fallback {
        parsed: Some(ParsedObject::Authentication(authentication.into())),
        consequence: "the object is in force with the strictest value in each invalid field"
            .to_owned(),
    }
}

fn strictest(object: &RawObject<'_>, mut issues: Issues) -> (Authentication, Issues) {
    let mtls = field(object, "mtls", MtlsMode::Strict, &mut issues).map(mtls);
    let outbound = field(object, "outbound", OutboundTraffic::Required, &mut issues);
    let udp = field(object, "udp", UdpTraffic::Deny, &mut issues);
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
    ports(object, &mut authentication, &mut issues);
    match pods(object, &mut issues) {
        Ok(pods) => authentication.pods = pods,
        // The selected pods are unknown: the object applies to all pods, and must not relax any.
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

/// Parses a field of the spec. An invalid field gets the strictest value.
fn field<T: DeserializeOwned>(
    object: &RawObject<'_>,
    name: &str,
    strictest: T,
    issues: &mut Issues,
) -> Option<T> {
    let value = object.raw(&["spec", name])?;
    let mut own = Issues::default();
    let read = typed(value, &mut own);
    relocate(&format!("spec.{name}"), own, issues);
    Some(read.unwrap_or(strictest))
}

/// Adds the problems of a part to those of the whole object.
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

fn pods(object: &RawObject<'_>, issues: &mut Issues) -> Result<Option<Selector>, ()> {
    let Some(value) = object.raw(&["spec", "podSelector"]) else {
        return Ok(None);
    };
    let before = issues.problems.len();
    let mut own = Issues::default();
    let read: Option<LabelSelector> = typed(value, &mut own);
    relocate("spec.podSelector", own, issues);
    let pods = read.map(|read| selector("spec.podSelector", &read, issues));
    if issues.problems.len() == before {
        // An empty selector selects all pods, like an absent one.
        Ok(pods.filter(|pods| !pods.requirements.is_empty()))
    } else {
        Err(())
    }
}

/// Parses the ports. An invalid mode is Strict, and an invalid port number makes every port Strict.
fn ports(object: &RawObject<'_>, authentication: &mut Authentication, issues: &mut Issues) {
    let listed = match object.raw(&["spec", "ports"]) {
        None => return,
        Some(Value::Array(listed)) => listed,
        Some(_) => {
            issues.reject("spec.ports", "must be a list");
            authentication.mtls = Some(Mtls::Strict);
            return;
        }
    };
    let mut has_invalid_port = false;
    for (i, entry) in listed.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        let number = entry.get("port").and_then(Value::as_i64);
        let number = match number {
            Some(number) => issues.check(&format!("{path}.port"), port(number)),
            None => {
                issues.reject(
                    format!("{path}.port"),
                    "must be a number between 1 and 65535",
                );
                None
            }
        };
        let mut own = Issues::default();
        let absent = Value::Null;
        let mode = typed::<MtlsMode>(entry.get("mtls").unwrap_or(&absent), &mut own);
        relocate(&format!("{path}.mtls"), own, issues);
        let mode = mode.map_or(Mtls::Strict, mtls);
        match number {
            None => has_invalid_port = true,
            Some(number) => {
                if authentication.ports.contains_key(&number) {
                    issues.reject(format!("{path}.port"), format!("duplicate port {number}"));
                }
                let stricter = authentication.ports.get(&number).copied().unwrap_or(mode);
                authentication.ports.insert(number, stricter.max(mode));
            }
        }
    }
    if has_invalid_port {
        authentication.mtls = Some(Mtls::Strict);
        authentication.ports.clear();
    }
}
