// SPDX-License-Identifier: Apache-2.0
//! Parts of schemas that several kinds share: CEL rules with their messages, label selectors,
//! address blocks.
//!
//! The API server estimates what a rule can cost at worst from the bounds of all lists around it, and
//! refuses a CRD over its budget: so every list has a bound.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// `x-kubernetes-validations` of (rule, what is wrong if it does not hold).
pub(super) fn rules(rules: &[(&str, &str)]) -> Value {
    rules
        .iter()
        .map(|(rule, message)| json!({"rule": rule, "message": message}))
        .collect()
}

/// The rule of a list that means nobody or everybody if it is empty: generated manifests make such
/// by accident.
pub(super) fn not_empty() -> Value {
    rules(&[(
        "size(self) > 0",
        "is empty: leave it out to match everything",
    )])
}

/// The rules of a list of rules of a MeshPolicy.
pub(super) fn named_rules() -> Value {
    rules(&[
        (
            "self.all(a, !has(a.action))",
            "action of a single rule is for ClusterMeshPolicy; here spec.action holds for all rules",
        ),
        UNIQUE_NAMES,
    ])
}

/// The rules of a list of rules of a ClusterMeshPolicy.
pub(super) fn cluster_rules() -> Value {
    rules(&[
        (
            "size(self) > 0",
            "is empty and says nothing: leave it out, or add a rule",
        ),
        UNIQUE_NAMES,
    ])
}

const UNIQUE_NAMES: (&str, &str) = (
    "self.all(a, !has(a.name) || self.exists_one(b, has(b.name) && b.name == a.name))",
    "two rules have the same name",
);

/// A selector of the mesh's own kinds. `{}` selects everything; parts that are there and empty are a
/// mistake, which would select everything as well.
pub(super) fn label_selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "x-kubernetes-map-type": "atomic",
        "properties": {
            "matchLabels": {
                "description": "Labels that must have exactly these values.",
                "type": "object",
                "maxProperties": 32,
                "additionalProperties": {"type": "string", "maxLength": 63},
            },
            "matchExpressions": {
                "description": "Tests of labels, all of which must hold.",
                "type": "array",
                "x-kubernetes-list-type": "atomic",
                "maxItems": 32,
                "items": label_test(),
            },
        },
        "x-kubernetes-validations": rules(&[
            (
                "!has(self.matchLabels) || size(self.matchLabels) > 0",
                "matchLabels is empty and would match everything: leave it out, or write {} for the \
                 whole selector if everything is meant",
            ),
            (
                "!has(self.matchExpressions) || size(self.matchExpressions) > 0",
                "matchExpressions is empty and would match everything: leave it out, or write {} for \
                 the whole selector if everything is meant",
            ),
        ]),
    })
}

fn label_test() -> Value {
    json!({
        "type": "object",
        "required": ["key", "operator"],
        "properties": {
            "key": {
                "description": "The label's key.",
                "type": "string",
                "minLength": 1,
                "maxLength": 317,
            },
            "operator": {
                "description": "In, NotIn: the value is, or is not, one of values. Exists, \
                                DoesNotExist: there is, or is not, such a label.",
                "type": "string",
                "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
            },
            "values": {
                "description": "Values for In and NotIn.",
                "type": "array",
                "x-kubernetes-list-type": "atomic",
                "maxItems": 64,
                "items": {"type": "string", "maxLength": 63},
            },
        },
        "x-kubernetes-validations": rules(&[(
            "self.operator in ['In', 'NotIn'] == (has(self.values) && size(self.values) > 0)",
            "In and NotIn need at least one value, Exists and DoesNotExist take none",
        )]),
    })
}

/// Longest text of a CIDR: eight groups of four digits, and `/128`.
const CIDR_MAX: u32 = 43;

/// An address block of the mesh's own kinds: bits behind the prefix are a mistake that matches more
/// than it seems to.
pub(super) fn cidr(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": CIDR_MAX,
        "x-kubernetes-validations": rules(&[
            IS_CIDR,
            (
                "!isCIDR(self) || cidr(self) == cidr(self).masked()",
                "has address bits behind its prefix, and would match more than it says",
            ),
        ]),
    })
}

const IS_CIDR: (&str, &str) = ("isCIDR(self)", "is no CIDR, such as 10.0.0.0/8 or fd00::/8");

/// A number of a port, or its name.
pub(super) fn port(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "maxLength": 15,
    })
}

/// Parts of an address block. Their rules are at the block.
pub(super) fn exceptions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "atomic",
        "maxItems": 8,
        // By format and not by CEL, which is beyond the budget here.
        "items": {"type": "string", "maxLength": CIDR_MAX, "format": "cidr"},
    })
}

/// The networks of a ClusterNetworkPolicy, as its API bounds them.
pub(super) fn networks(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "set",
        "minItems": 1,
        "maxItems": 25,
        "items": {
            "type": "string",
            "maxLength": CIDR_MAX,
            "x-kubernetes-validations": rules(&[IS_CIDR]),
        },
    })
}

/// The names of a ClusterNetworkPolicy, as its API bounds them.
pub(super) fn domain_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "set",
        "minItems": 1,
        "maxItems": 25,
        "items": {
            "type": "string",
            // A name of the DNS (RFC 1035, 2.3.4), and the wildcard.
            "maxLength": 255,
            "pattern": "^([*][.])?([a-zA-Z0-9]([-_a-zA-Z0-9]*[a-zA-Z0-9])?[.])+[a-zA-Z0-9]([-_a-zA-Z0-9]*[a-zA-Z0-9])?[.]?$",
        },
    })
}

/// Service accounts, as they are written.
pub(super) fn service_accounts(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "set",
        "maxItems": 64,
        "items": {
            "type": "string",
            "minLength": 1,
            "maxLength": 317,
            // No CEL: a rule over so many strings is beyond the budget.
            "pattern": "^([*]|([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?([*]|[a-z0-9]([-.a-z0-9]*[a-z0-9])?))$",
        },
        "x-kubernetes-validations": rules(&[
            ("size(self) > 0", "is empty: leave it out to match everything"),
            (
                "size(self) < 2 || !('*' in self)",
                "* matches every service account: the others beside it say nothing",
            ),
        ]),
    })
}
