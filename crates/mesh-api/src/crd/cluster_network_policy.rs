// SPDX-License-Identifier: Apache-2.0
//! ClusterNetworkPolicy of `policy.networking.k8s.io/v1alpha2` (network-policy-api).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::mesh_policy::ClusterTier;
use super::schema;
use super::status::PolicyStatus;

/// Rules for a whole cluster, before or behind what namespaces say.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.networking.k8s.io",
    version = "v1alpha2",
    kind = "ClusterNetworkPolicy",
    doc = "Rules for a whole cluster, before or behind what namespaces say.",
    status = "PolicyStatus",
    derive = "PartialEq",
    shortname = "cnp",
    annotation(
        "api-approved.kubernetes.io",
        "https://github.com/kubernetes-sigs/network-policy-api/pull/300"
    ),
    printcolumn(name = "Tier", type_ = "string", json_path = ".spec.tier"),
    printcolumn(name = "Priority", type_ = "string", json_path = ".spec.priority")
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNetworkPolicySpec {
    /// Admin: before NetworkPolicy. Baseline: only for pods that NetworkPolicy does not isolate.
    pub tier: ClusterTier,
    /// From 0 to 1000; the lowest is evaluated first.
    #[schemars(range(min = 0, max = 1000))]
    pub priority: i32,
    /// The pods that the policy applies to.
    pub subject: ClusterSubject,
    /// Rules for traffic to the pods, in order; at most 25.
    #[serde(default)]
    #[schemars(length(max = 25))]
    pub ingress: Option<Vec<IngressRule>>,
    /// Rules for traffic from the pods, in order; at most 25.
    #[serde(default)]
    #[schemars(length(max = 25))]
    pub egress: Option<Vec<EgressRule>>,
}

/// Which pods; exactly one field is set. Pods of the host's network are never included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ClusterSubject {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    pub pods: Option<NamespacedPod>,
}

/// Some pods of some namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NamespacedPod {
    /// The namespaces; empty: all.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// The pods in them; empty: all.
    pub pod_selector: LabelSelector,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterRuleAction {
    /// What matches is accepted, and nothing further is asked.
    Accept,
    /// What matches is refused.
    Deny,
    /// What matches is left to the next tier.
    Pass,
}

/// A rule in one direction, over peers of type `P`: what [`IngressRule`] and [`EgressRule`] share.
#[derive(Clone, Debug)]
pub struct ClusterRule<'a, P> {
    /// What the rule is called.
    pub name: &'a str,
    /// What it does.
    pub action: ClusterRuleAction,
    /// From or to whom.
    pub peers: &'a [P],
    /// With which protocols and ports; `None` = any.
    pub protocols: Option<&'a [ClusterProtocol]>,
}

/// A rule for traffic to the pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IngressRule {
    /// What the rule is called; at most 100 characters.
    #[serde(default)]
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// What the rule does.
    pub action: ClusterRuleAction,
    /// From whom; 1 to 25.
    #[schemars(length(min = 1, max = 25))]
    pub from: Vec<IngressPeer>,
    /// With which protocols; 1 to 25. Missing: any.
    #[serde(default)]
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// A rule for traffic from the pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "!has(self.protocols) || !self.protocols.exists(p, has(p.destinationNamedPort)) || self.to.all(t, !has(t.networks) && !has(t.nodes) && !has(t.domainNames))",
    "networks, nodes and domainNames have no named ports",
)])))]
pub struct EgressRule {
    /// What the rule is called; at most 100 characters.
    #[serde(default)]
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// What the rule does.
    pub action: ClusterRuleAction,
    /// To whom; 1 to 25.
    #[schemars(length(min = 1, max = 25))]
    pub to: Vec<EgressPeer>,
    /// With which protocols; 1 to 25. Missing: any.
    #[serde(default)]
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// From whom; exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct IngressPeer {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    pub pods: Option<NamespacedPod>,
}

/// To whom; exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct EgressPeer {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    pub pods: Option<NamespacedPod>,
    /// Nodes with these labels; empty: all.
    pub nodes: Option<LabelSelector>,
    /// Addresses, pods' addresses too; 1 to 25.
    #[schemars(schema_with = "schema::networks")]
    pub networks: Option<Vec<String>>,
    /// Names, of Accept rules only; 1 to 25. Nothing resolves them here: they match nothing.
    #[schemars(schema_with = "schema::domain_names")]
    pub domain_names: Option<Vec<String>>,
}

/// A protocol, with ports; exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ClusterProtocol {
    /// TCP.
    pub tcp: Option<ClusterProtocolPorts>,
    /// UDP.
    pub udp: Option<ClusterProtocolPorts>,
    /// SCTP.
    pub sctp: Option<ClusterProtocolPorts>,
    /// A named port of the destination pod, of any protocol.
    pub destination_named_port: Option<String>,
}

/// Ports of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1))]
pub struct ClusterProtocolPorts {
    /// The destination port.
    pub destination_port: Option<ClusterPort>,
}

/// A port or a range; exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ClusterPort {
    /// A port from 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub number: Option<i32>,
    /// Several.
    pub range: Option<ClusterPortRange>,
}

/// A range of ports, both ends included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "self.start < self.end",
    "start must be below end: the range is upside down",
)])))]
pub struct ClusterPortRange {
    /// The first, from 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub start: i32,
    /// The last, above the first.
    #[schemars(range(min = 1, max = 65535))]
    pub end: i32,
}
