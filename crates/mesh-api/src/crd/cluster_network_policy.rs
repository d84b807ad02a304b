// SPDX-License-Identifier: Apache-2.0
//! The type ClusterNetworkPolicy of `policy.networking.k8s.io/v1alpha2` (network-policy-api).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::mesh_policy::ClusterTier;
use super::schema;
use super::status::PolicyStatus;

/// ClusterNetworkPolicySpec defines rules for the pods of the whole cluster, evaluated before or after the
/// policies of namespaces.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.networking.k8s.io",
    version = "v1alpha2",
    kind = "ClusterNetworkPolicy",
    doc = "ClusterNetworkPolicy defines rules for the pods of the whole cluster, evaluated before or after the policies of namespaces.",
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
    /// tier is the tier of the policy. Admin is evaluated before NetworkPolicy. Baseline applies only to
    /// pods that NetworkPolicy does not isolate.
    pub tier: ClusterTier,
    /// priority orders the policies of a tier: the lowest number is evaluated first. Must be between 0 and
    /// 1000.
    #[schemars(range(min = 0, max = 1000))]
    pub priority: i32,
    /// subject selects the pods to which the policy applies.
    pub subject: ClusterSubject,
    /// ingress lists the rules for traffic to the pods, in order; at most 25.
    #[serde(default)]
    #[schemars(length(max = 25))]
    pub ingress: Option<Vec<IngressRule>>,
    /// egress lists the rules for traffic from the pods, in order; at most 25.
    #[serde(default)]
    #[schemars(length(max = 25))]
    pub egress: Option<Vec<EgressRule>>,
}

/// ClusterSubject selects pods. Exactly one field must be set. Pods with hostNetwork are not selected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ClusterSubject {
    /// namespaces selects all pods in the matching namespaces.
    pub namespaces: Option<LabelSelector>,
    /// pods selects the matching pods in the matching namespaces.
    pub pods: Option<NamespacedPod>,
}

/// NamespacedPod selects pods in namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NamespacedPod {
    /// namespaceSelector selects namespaces. An empty selector selects all.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// podSelector selects pods in these namespaces. An empty selector selects all.
    pub pod_selector: LabelSelector,
}

/// ClusterRuleAction is the action of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterRuleAction {
    /// Accept allows the traffic and skips the remaining rules and policies.
    Accept,
    /// Deny denies the traffic.
    Deny,
    /// Pass leaves the decision to the next tier.
    Pass,
}

/// IngressRule is a rule for traffic to the pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IngressRule {
    /// name is the name of the rule; at most 100 characters.
    #[serde(default)]
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// action is the action of the rule.
    pub action: ClusterRuleAction,
    /// from lists the sources, 1 to 25. Traffic matches if any source matches.
    #[schemars(length(min = 1, max = 25))]
    pub from: Vec<IngressPeer>,
    /// protocols lists the protocols and ports, 1 to 25. If unset, the rule matches all.
    #[serde(default)]
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// EgressRule is a rule for traffic from the pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "!has(self.protocols) || !self.protocols.exists(p, has(p.destinationNamedPort)) || self.to.all(t, !has(t.networks) && !has(t.nodes) && !has(t.domainNames))",
    "must not use destinationNamedPort with networks, nodes or domainNames",
)])))]
pub struct EgressRule {
    /// name is the name of the rule; at most 100 characters.
    #[serde(default)]
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// action is the action of the rule.
    pub action: ClusterRuleAction,
    /// to lists the destinations, 1 to 25. Traffic matches if any destination matches.
    #[schemars(length(min = 1, max = 25))]
    pub to: Vec<EgressPeer>,
    /// protocols lists the protocols and ports, 1 to 25. If unset, the rule matches all.
    #[serde(default)]
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// IngressPeer is a source of traffic. Exactly one field must be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct IngressPeer {
    /// namespaces selects all pods in the matching namespaces.
    pub namespaces: Option<LabelSelector>,
    /// pods selects the matching pods in the matching namespaces.
    pub pods: Option<NamespacedPod>,
}

/// EgressPeer is a destination of traffic. Exactly one field must be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct EgressPeer {
    /// namespaces selects all pods in the matching namespaces.
    pub namespaces: Option<LabelSelector>,
    /// pods selects the matching pods in the matching namespaces.
    pub pods: Option<NamespacedPod>,
    /// nodes selects nodes by label. An empty selector selects all.
    pub nodes: Option<LabelSelector>,
    /// networks lists IP blocks in CIDR notation, 1 to 25. They also match pod addresses.
    #[schemars(schema_with = "schema::networks")]
    pub networks: Option<Vec<String>>,
    /// domainNames lists domain names for Accept rules, 1 to 25. The mesh does not resolve names: they match
    /// nothing.
    #[schemars(schema_with = "schema::domain_names")]
    pub domain_names: Option<Vec<String>>,
}

/// ClusterProtocol is a protocol with ports. Exactly one field must be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ClusterProtocol {
    /// tcp matches TCP.
    pub tcp: Option<ClusterProtocolPorts>,
    /// udp matches UDP.
    pub udp: Option<ClusterProtocolPorts>,
    /// sctp matches SCTP.
    pub sctp: Option<ClusterProtocolPorts>,
    /// destinationNamedPort matches a named port of the destination pod, with its protocol.
    pub destination_named_port: Option<String>,
}

/// ClusterProtocolPorts matches ports of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1))]
pub struct ClusterProtocolPorts {
    /// destinationPort matches the destination port.
    pub destination_port: Option<ClusterPort>,
}

/// ClusterPort is a port or a range of ports. Exactly one field must be set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ClusterPort {
    /// number is a port. Must be between 1 and 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub number: Option<i32>,
    /// range is a range of ports.
    pub range: Option<ClusterPortRange>,
}

/// ClusterPortRange is an inclusive range of ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "self.start < self.end",
    "start must be less than end",
)])))]
pub struct ClusterPortRange {
    /// start is the first port. Must be between 1 and 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub start: i32,
    /// end is the last port. Must be greater than start.
    #[schemars(range(min = 1, max = 65535))]
    pub end: i32,
}
