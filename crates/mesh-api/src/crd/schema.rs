// SPDX-License-Identifier: Apache-2.0
//! Parts of schemas that several kinds share: CEL rules with their messages, label selectors, IP blocks.
//!
//! The API server estimates the worst-case cost of a rule from the bounds of the lists around it, and
//! refuses a CRD over its budget. Therefore every list has a bound.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// Builds `x-kubernetes-validations` from pairs of a rule and its error message.
pub(super) fn rules(rules: &[(&str, &str)]) -> Value {
    rules
        .iter()
        .map(|(rule, message)| json!({"rule": rule, "message": message}))
        .collect()
}

/// The rule for a list that must not be empty: templates produce an empty list by accident, and it could
/// mean nothing or everything.
pub(super) fn not_empty() -> Value {
    rules(&[(
        "size(self) > 0",
        "must not be empty: remove the field to match everything",
    )])
}

/// The validations of the rule lists of a MeshPolicy.
pub(super) fn named_rules() -> Value {
    rules(&[
        (
            "self.all(a, !has(a.action))",
            "action must not be set in a rule of a MeshPolicy: spec.action applies to all rules",
        ),
        UNIQUE_NAMES,
    ])
}

/// The validations of the rule lists of a ClusterMeshPolicy.
pub(super) fn cluster_rules() -> Value {
    rules(&[
        (
            "size(self) > 0",
            "must not be empty: remove the field, or add a rule",
        ),
        UNIQUE_NAMES,
    ])
}

const UNIQUE_NAMES: (&str, &str) = (
    "self.all(a, !has(a.name) || self.exists_one(b, has(b.name) && b.name == a.name))",
    "rule names must be unique",
);

/// The schema of a label selector of the mesh's own kinds. `{}` selects everything. An empty matchLabels
/// or matchExpressions would also select everything, and is refused as a mistake.
pub(super) fn label_selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "x-kubernetes-map-type": "atomic",
        "properties": {
            "matchLabels": {
                "description": "matchLabels lists labels and the values that they must have.",
                "type": "object",
                "maxProperties": 32,
                "additionalProperties": {"type": "string", "maxLength": 63},
            },
            "matchExpressions": {
                "description": "matchExpressions lists requirements, all of which must be satisfied.",
                "type": "array",
                "x-kubernetes-list-type": "atomic",
                "maxItems": 32,
                "items": label_test(),
            },
        },
        "x-kubernetes-validations": rules(&[
            (
                "!has(self.matchLabels) || size(self.matchLabels) > 0",
                "matchLabels must not be empty: remove the field, or use {} as the selector to match \
                 everything",
            ),
            (
                "!has(self.matchExpressions) || size(self.matchExpressions) > 0",
                "matchExpressions must not be empty: remove the field, or use {} as the selector to \
                 match everything",
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
                "description": "key is the key of the label.",
                "type": "string",
                "minLength": 1,
                "maxLength": 317,
            },
            "operator": {
                "description": "operator compares the label with values: In, NotIn, Exists or \
                                DoesNotExist.",
                "type": "string",
                "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
            },
            "values": {
                "description": "values lists the values for In and NotIn.",
                "type": "array",
                "x-kubernetes-list-type": "atomic",
                "maxItems": 64,
                "items": {"type": "string", "maxLength": 63},
            },
        },
        "x-kubernetes-validations": rules(&[(
            "self.operator in ['In', 'NotIn'] == (has(self.values) && size(self.values) > 0)",
            "values must not be empty for In and NotIn, and must be empty for Exists and DoesNotExist",
        )]),
    })
}

/// The length of the longest CIDR: eight groups of four digits, and `/128`.
const CIDR_MAX: u32 = 43;

/// The schema of a CIDR of the mesh's own kinds. Address bits after the prefix are refused: they suggest
/// a smaller block than the CIDR matches.
pub(super) fn cidr(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": CIDR_MAX,
        "x-kubernetes-validations": rules(&[
            IS_CIDR,
            (
                "!isCIDR(self) || cidr(self) == cidr(self).masked()",
                "must not have address bits after the prefix",
            ),
        ]),
    })
}

const IS_CIDR: (&str, &str) = (
    "isCIDR(self)",
    "must be a CIDR such as 10.0.0.0/8 or fd00::/8",
);

/// The schema of a port number or port name.
pub(super) fn port(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "maxLength": 15,
    })
}

/// The schema of the exceptions of an IP block, whose validations are at the block.
pub(super) fn exceptions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "atomic",
        "maxItems": 8,
        // A CEL rule would exceed the cost budget here.
        "items": {"type": "string", "maxLength": CIDR_MAX, "format": "cidr"},
    })
}

/// The schema of the networks of a ClusterNetworkPolicy, with the bounds of its API.
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

/// The schema of the domain names of a ClusterNetworkPolicy, with the bounds of its API.
pub(super) fn domain_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "set",
        "minItems": 1,
        "maxItems": 25,
        "items": {
            "type": "string",
            // A DNS name (RFC 1035, 2.3.4) with the wildcard prefix.
            "maxLength": 255,
            "pattern": "^([*][.])?([a-zA-Z0-9]([-_a-zA-Z0-9]*[a-zA-Z0-9])?[.])+[a-zA-Z0-9]([-_a-zA-Z0-9]*[a-zA-Z0-9])?[.]?$",
        },
    })
}

/// The schema of a list of service accounts.
pub(super) fn service_accounts(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "set",
        "maxItems": 64,
        "items": {
            "type": "string",
            "minLength": 1,
            "maxLength": 317,
            // A CEL rule over so many strings would exceed the cost budget.
            "pattern": "^([*]|([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?([*]|[a-z0-9]([-.a-z0-9]*[a-z0-9])?))$",
        },
        "x-kubernetes-validations": rules(&[
            ("size(self) > 0", "must not be empty: remove the field to match everything"),
            (
                "size(self) < 2 || !('*' in self)",
                "must not contain other items beside *, which matches every service account",
            ),
        ]),
    })
}
