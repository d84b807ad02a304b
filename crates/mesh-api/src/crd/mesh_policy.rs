// SPDX-License-Identifier: Apache-2.0
//! The types MeshPolicy and ClusterMeshPolicy.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;
use super::status::PolicyStatus;

/// MeshPolicySpec defines the allowed or denied traffic of pods in a namespace. In addition to
/// NetworkPolicy, it supports service accounts, entities, Deny rules and audit mode. It is combined with
/// the NetworkPolicies of the namespace: a matching Deny rule overrides every Allow rule, and pods that an
/// enforced Allow policy selects accept only allowed traffic in that direction.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshPolicy",
    doc = "MeshPolicy defines the allowed or denied traffic of pods in a namespace. In addition to NetworkPolicy, it supports service accounts, entities, Deny rules and audit mode.",
    namespaced,
    status = "PolicyStatus",
    derive = "PartialEq",
    shortname = "mp",
    category = "mesh",
    printcolumn(name = "Action", type_ = "string", json_path = ".spec.action"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode")
)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[
    (
        "has(self.ingress) || has(self.egress)",
        "must set ingress or egress",
    ),
    (
        "self.action == 'Allow' || ((!has(self.ingress) || size(self.ingress) > 0) && (!has(self.egress) || size(self.egress) > 0))",
        "ingress and egress must not be empty in a Deny policy: remove the field, or add a rule",
    ),
])))]
pub struct MeshPolicySpec {
    /// podSelector selects the pods in the namespace to which the policy applies. If empty or unset, it
    /// applies to all pods.
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// action is the action of all rules. Defaults to Allow.
    pub action: MeshAction,
    /// mode is the enforcement mode: Enforce, or Audit to only count and record the traffic that the policy
    /// would deny. Defaults to Enforce.
    pub mode: PolicyMode,
    /// ingress lists the rules for traffic to the pods. If unset, the policy does not apply to ingress. An
    /// empty list in an Allow policy allows no traffic.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::named_rules()))]
    pub ingress: Option<Vec<MeshIngressRule>>,
    /// egress lists the rules for traffic from the pods. If unset, the policy does not apply to egress. An
    /// empty list in an Allow policy allows no traffic.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::named_rules()))]
    pub egress: Option<Vec<MeshEgressRule>>,
}

/// ClusterMeshPolicySpec defines the allowed or denied traffic of pods in the whole cluster, evaluated
/// before or after the policies of namespaces.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "ClusterMeshPolicy",
    doc = "ClusterMeshPolicy defines the allowed or denied traffic of pods in the whole cluster, evaluated before or after the policies of namespaces.",
    status = "PolicyStatus",
    derive = "PartialEq",
    shortname = "cmp",
    category = "mesh",
    printcolumn(name = "Tier", type_ = "string", json_path = ".spec.tier"),
    printcolumn(name = "Priority", type_ = "integer", json_path = ".spec.priority"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode")
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[
    (
        "has(self.ingress) || has(self.egress)",
        "must set ingress or egress",
    ),
    (
        "self.tier == 'Admin' || (self.action != 'Pass' && (!has(self.ingress) || self.ingress.all(r, !has(r.action) || r.action != 'Pass')) && (!has(self.egress) || self.egress.all(r, !has(r.action) || r.action != 'Pass')))",
        "Pass is valid in the Admin tier only",
    ),
])))]
pub struct ClusterMeshPolicySpec {
    /// tier is the tier of the policy. Admin is evaluated before NetworkPolicy and MeshPolicy, which cannot
    /// override it. Baseline applies only to pods that those do not isolate.
    pub tier: ClusterTier,
    /// priority orders the policies of a tier: the lowest number is evaluated first, and the first matching
    /// rule decides. Must be between 0 and 1000.
    #[schemars(range(min = 0, max = 1000))]
    pub priority: i32,
    /// namespaceSelector selects the namespaces to which the policy applies. If unset, it applies to all.
    #[serde(default)]
    #[schemars(schema_with = "schema::label_selector")]
    pub namespace_selector: Option<LabelSelector>,
    /// podSelector selects the pods in these namespaces. If unset, the policy applies to all pods.
    #[serde(default)]
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// action is the action of rules without an action. Defaults to Allow.
    #[serde(default)]
    pub action: ClusterAction,
    /// mode is the enforcement mode: Enforce, or Audit to only count and record the traffic that the policy
    /// would deny. Defaults to Enforce.
    #[serde(default)]
    pub mode: PolicyMode,
    /// ingress lists the rules for traffic to the pods, in order.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::cluster_rules()))]
    pub ingress: Option<Vec<MeshIngressRule>>,
    /// egress lists the rules for traffic from the pods, in order.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::cluster_rules()))]
    pub egress: Option<Vec<MeshEgressRule>>,
}

/// MeshAction is the action of a MeshPolicy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MeshAction {
    /// Allow allows matching traffic. Other traffic in that direction is denied.
    #[default]
    Allow,
    /// Deny denies matching traffic, even if another policy allows it.
    Deny,
}

/// ClusterAction is the action of a rule of a ClusterMeshPolicy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterAction {
    /// Allow allows the traffic and skips the remaining rules and policies.
    #[default]
    Allow,
    /// Deny denies the traffic.
    Deny,
    /// Pass leaves the decision to the next tier. Valid in the Admin tier only.
    Pass,
}

/// PolicyMode is the enforcement mode of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PolicyMode {
    /// Enforce enforces the policy.
    #[default]
    Enforce,
    /// Audit counts and records the traffic that the policy would deny, and allows it.
    Audit,
}

/// ClusterTier is the tier of a cluster-scoped policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterTier {
    /// Admin is evaluated before all other policies.
    Admin,
    /// Baseline applies to pods that no policy in their namespace isolates.
    Baseline,
}

/// MeshIngressRule is a rule for traffic to the pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshIngressRule {
    /// name is the name of the rule in flow records and metrics. Defaults to its position, such as
    /// ingress[0].
    #[schemars(length(min = 1, max = 100))]
    pub name: Option<String>,
    /// action is the action of the rule, in a ClusterMeshPolicy only. Defaults to the action of the policy.
    pub action: Option<ClusterAction>,
    /// from lists the sources. Traffic matches if any source matches. If unset, all sources match.
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub from: Option<Vec<MeshPeer>>,
    /// ports lists the destination ports. If unset, all ports of all protocols match.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub ports: Option<Vec<MeshPort>>,
}

/// MeshEgressRule is a rule for traffic from the pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshEgressRule {
    /// name is the name of the rule in flow records and metrics. Defaults to its position, such as
    /// ingress[0].
    #[schemars(length(min = 1, max = 100))]
    pub name: Option<String>,
    /// action is the action of the rule, in a ClusterMeshPolicy only. Defaults to the action of the policy.
    pub action: Option<ClusterAction>,
    /// to lists the destinations. Traffic matches if any destination matches. If unset, all destinations
    /// match.
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub to: Option<Vec<MeshPeer>>,
    /// ports lists the destination ports. If unset, all ports of all protocols match.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub ports: Option<Vec<MeshPort>>,
}

/// MeshPeer is a source or destination of traffic: workloads (selectors and service accounts, all of which
/// must match), IP blocks, or entities.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "(has(self.podSelector) || has(self.namespaceSelector) || has(self.serviceAccounts) ? 1 : 0) + (has(self.ipBlocks) ? 1 : 0) + (has(self.entities) ? 1 : 0) == 1",
    "must set exactly one of: selectors and serviceAccounts, ipBlocks, entities",
)])))]
pub struct MeshPeer {
    /// podSelector selects pods by label. Without a namespaceSelector, it selects pods in the namespace of
    /// the policy.
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// namespaceSelector selects pods in namespaces by label.
    #[schemars(schema_with = "schema::label_selector")]
    pub namespace_selector: Option<LabelSelector>,
    /// serviceAccounts lists the service accounts of pods: NAME (in the namespace of the policy, or in each
    /// namespace that namespaceSelector selects), NAMESPACE/NAME, NAMESPACE/* or *. An Allow rule requires
    /// a proven identity: mutual TLS, or a pod on the same node.
    #[schemars(schema_with = "schema::service_accounts")]
    pub service_accounts: Option<Vec<String>>,
    /// ipBlocks lists IP blocks. They also match pod addresses.
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub ip_blocks: Option<Vec<MeshIpBlock>>,
    /// entities lists groups of endpoints, such as host or world.
    #[schemars(length(max = 5), extend(
        "x-kubernetes-list-type" = "set",
        "x-kubernetes-validations" = schema::not_empty(),
    ))]
    pub entities: Option<Vec<MeshEntity>>,
}

/// MeshIpBlock is an IP block with exceptions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "!has(self.except) || !isCIDR(self.cidr) || self.except.all(e, e != self.cidr && cidr(self.cidr).containsCIDR(e))",
    "except must contain only strict subsets of cidr",
)])))]
pub struct MeshIpBlock {
    /// cidr is the IP block, such as 10.0.0.0/8 or fd00::/8.
    #[schemars(schema_with = "schema::cidr")]
    pub cidr: String,
    /// except lists parts of the IP block that do not match.
    #[serde(default)]
    #[schemars(schema_with = "schema::exceptions")]
    pub except: Vec<String>,
}

/// MeshEntity is a group of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MeshEntity {
    /// host is the node of the pod.
    Host,
    /// remote-node is every other node. Source NAT can hide other clients behind it.
    RemoteNode,
    /// kube-apiserver is the Kubernetes API server.
    KubeApiserver,
    /// cluster is every pod and node.
    Cluster,
    /// world is every endpoint outside the cluster.
    World,
}

/// MeshPort is a port, a range of ports, or a named port of the destination pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[
    (
        "!has(self.port) || type(self.port) != int || (self.port >= 1 && self.port <= 65535)",
        "port must be between 1 and 65535",
    ),
    (
        "!has(self.port) || type(self.port) != string || self.port.matches('^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$')",
        "port must be a number, or a name of at most 15 lowercase letters, digits and '-'",
    ),
    (
        "!has(self.endPort) || (has(self.port) && type(self.port) == int)",
        "endPort must not be set without a numeric port",
    ),
    (
        "!has(self.endPort) || !has(self.port) || type(self.port) != int || self.endPort >= self.port",
        "endPort must be greater than or equal to port",
    ),
])))]
pub struct MeshPort {
    /// port is a port number between 1 and 65535, or a port name. If unset, all ports of the protocol match.
    #[schemars(schema_with = "schema::port")]
    pub port: Option<IntOrString>,
    /// endPort is the last port of the range that starts at port.
    #[schemars(range(min = 1, max = 65535))]
    pub end_port: Option<i32>,
    /// protocol is TCP, UDP or SCTP. Defaults to TCP.
    pub protocol: PortProtocol,
}

/// PortProtocol is a protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum PortProtocol {
    /// The Transmission Control Protocol.
    #[default]
    Tcp,
    /// The User Datagram Protocol.
    Udp,
    /// The Stream Control Transmission Protocol.
    Sctp,
}

impl PortProtocol {
    /// The protocol name as in manifests.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}
