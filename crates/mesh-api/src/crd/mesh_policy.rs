// SPDX-License-Identifier: Apache-2.0
//! MeshPolicy and ClusterMeshPolicy.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;
use super::status::PolicyStatus;

/// Who may talk to whom in one namespace: what NetworkPolicy can say, and service accounts,
/// entities, denials and audit. It joins with the NetworkPolicies of the namespace: a matching Deny
/// beats every Allow, and pods that an enforced Allow policy selects accept nothing else in that
/// direction.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshPolicy",
    doc = "Who may talk to whom in one namespace: what NetworkPolicy can say, and service accounts, entities, denials and audit.",
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
        "needs ingress or egress rules",
    ),
    (
        "self.action == 'Allow' || ((!has(self.ingress) || size(self.ingress) > 0) && (!has(self.egress) || size(self.egress) > 0))",
        "an empty list of rules says nothing in a Deny policy: leave it out, or add a rule",
    ),
])))]
pub struct MeshPolicySpec {
    /// The pods of the namespace that the policy applies to. Empty or missing: all of them.
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// What the rules do with what they match. Default: Allow.
    pub action: MeshAction,
    /// Whether the policy is enforced, or only counts and records what it would refuse. Default:
    /// Enforce.
    pub mode: PolicyMode,
    /// Rules for traffic to the pods. Missing: the policy says nothing about it. An empty list of an
    /// Allow policy: nothing is allowed.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::named_rules()))]
    pub ingress: Option<Vec<MeshIngressRule>>,
    /// Rules for traffic from the pods.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::named_rules()))]
    pub egress: Option<Vec<MeshEgressRule>>,
}

/// The same for the whole cluster, before or behind what namespaces say.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "ClusterMeshPolicy",
    doc = "Who may talk to whom in the whole cluster, before or behind what namespaces say.",
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
        "needs ingress or egress rules",
    ),
    (
        "self.tier == 'Admin' || (self.action != 'Pass' && (!has(self.ingress) || self.ingress.all(r, !has(r.action) || r.action != 'Pass')) && (!has(self.egress) || self.egress.all(r, !has(r.action) || r.action != 'Pass')))",
        "Pass is for the Admin tier: behind the Baseline tier there is no other",
    ),
])))]
pub struct ClusterMeshPolicySpec {
    /// Admin: before NetworkPolicy and MeshPolicy, which cannot override it. Baseline: only for pods
    /// that those do not isolate.
    pub tier: ClusterTier,
    /// From 0 to 1000; the lowest is evaluated first. In one tier, the first rule that matches
    /// decides.
    #[schemars(range(min = 0, max = 1000))]
    pub priority: i32,
    /// The namespaces that the policy applies to. Missing: all of them.
    #[serde(default)]
    #[schemars(schema_with = "schema::label_selector")]
    pub namespace_selector: Option<LabelSelector>,
    /// The pods in them. Missing: all of them.
    #[serde(default)]
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// What rules without an action of their own do. Default: Allow.
    #[serde(default)]
    pub action: ClusterAction,
    /// Whether the policy is enforced, or only counts and records. Default: Enforce.
    #[serde(default)]
    pub mode: PolicyMode,
    /// Rules for traffic to the pods, in order.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::cluster_rules()))]
    pub ingress: Option<Vec<MeshIngressRule>>,
    /// Rules for traffic from the pods, in order.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::cluster_rules()))]
    pub egress: Option<Vec<MeshEgressRule>>,
}

/// What the rules of a MeshPolicy do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MeshAction {
    /// What matches is allowed; everything else of that direction is refused.
    #[default]
    Allow,
    /// What matches is refused, whatever else allows it.
    Deny,
}

/// What the rules of a ClusterMeshPolicy do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterAction {
    /// What matches is allowed, and nothing further is asked.
    #[default]
    Allow,
    /// What matches is refused.
    Deny,
    /// What matches is left to the next tier (Admin only).
    Pass,
}

/// Whether a policy is enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PolicyMode {
    /// It is.
    #[default]
    Enforce,
    /// What it would refuse is counted and recorded, and passes.
    Audit,
}

/// Where a cluster-wide policy is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ClusterTier {
    /// Before everything else.
    Admin,
    /// For pods that nothing in their namespace isolates.
    Baseline,
}

/// A rule for traffic to the pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshIngressRule {
    /// What records and metrics call the rule. Missing: its place in the policy.
    #[schemars(length(min = 1, max = 100))]
    pub name: Option<String>,
    /// What the rule does; ClusterMeshPolicy only. Missing: what the policy's action says.
    pub action: Option<ClusterAction>,
    /// From whom, one or more. Missing: everybody.
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub from: Option<Vec<MeshPeer>>,
    /// To which ports, one or more. Missing: all, of every protocol.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub ports: Option<Vec<MeshPort>>,
}

/// A rule for traffic from the pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshEgressRule {
    /// What records and metrics call the rule. Missing: its place in the policy.
    #[schemars(length(min = 1, max = 100))]
    pub name: Option<String>,
    /// What the rule does; ClusterMeshPolicy only. Missing: what the policy's action says.
    pub action: Option<ClusterAction>,
    /// To whom, one or more. Missing: everybody.
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub to: Option<Vec<MeshPeer>>,
    /// To which ports, one or more. Missing: all, of every protocol.
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub ports: Option<Vec<MeshPort>>,
}

/// One alternative of who: workloads (selectors and service accounts, all of which must match), or
/// address blocks, or entities.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "(has(self.podSelector) || has(self.namespaceSelector) || has(self.serviceAccounts) ? 1 : 0) + (has(self.ipBlocks) ? 1 : 0) + (has(self.entities) ? 1 : 0) == 1",
    "needs one of: selectors and serviceAccounts, or ipBlocks, or entities",
)])))]
pub struct MeshPeer {
    /// Pods with these labels; without a namespaceSelector, of the policy's namespace.
    #[schemars(schema_with = "schema::label_selector")]
    pub pod_selector: Option<LabelSelector>,
    /// Pods of namespaces with these labels.
    #[schemars(schema_with = "schema::label_selector")]
    pub namespace_selector: Option<LabelSelector>,
    /// Pods with one of these service accounts: NAME (of the policy's namespace, or, with a
    /// namespaceSelector, of each of those), NAMESPACE/NAME, NAMESPACE/* or *. An Allow needs proof
    /// of it: mutual TLS, or a pod of the same node.
    #[schemars(schema_with = "schema::service_accounts")]
    pub service_accounts: Option<Vec<String>>,
    /// Addresses, whoever has them.
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = schema::not_empty()))]
    pub ip_blocks: Option<Vec<MeshIpBlock>>,
    /// Everything of a kind.
    #[schemars(length(max = 5), extend(
        "x-kubernetes-list-type" = "set",
        "x-kubernetes-validations" = schema::not_empty(),
    ))]
    pub entities: Option<Vec<MeshEntity>>,
}

/// A block of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[(
    "!has(self.except) || !isCIDR(self.cidr) || self.except.all(e, e != self.cidr && cidr(self.cidr).containsCIDR(e))",
    "everything in except must be a true part of cidr",
)])))]
pub struct MeshIpBlock {
    /// The block, such as 10.0.0.0/8 or fd00::/8.
    #[schemars(schema_with = "schema::cidr")]
    pub cidr: String,
    /// Parts of it that do not match.
    #[serde(default)]
    #[schemars(schema_with = "schema::exceptions")]
    pub except: Vec<String>,
}

/// Everything of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MeshEntity {
    /// The node that the pod runs on.
    Host,
    /// Every other node; may hide clients behind source NAT.
    RemoteNode,
    /// The Kubernetes API server.
    KubeApiserver,
    /// Every pod and node.
    Cluster,
    /// Everything outside the cluster.
    World,
}

/// A port, a range of ports, or a named port of the destination pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = schema::rules(&[
    (
        "!has(self.port) || type(self.port) != int || (self.port >= 1 && self.port <= 65535)",
        "port must be from 1 to 65535",
    ),
    (
        "!has(self.port) || type(self.port) != string || self.port.matches('^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$')",
        "port must be a number, or a name of at most 15 of a-z, 0-9 and '-'",
    ),
    (
        "!has(self.endPort) || (has(self.port) && type(self.port) == int)",
        "endPort needs a port that is a number",
    ),
    (
        "!has(self.endPort) || !has(self.port) || type(self.port) != int || self.endPort >= self.port",
        "endPort is below port: the range is upside down",
    ),
])))]
pub struct MeshPort {
    /// A number from 1 to 65535, or a name. Missing: all ports of the protocol.
    #[schemars(schema_with = "schema::port")]
    pub port: Option<IntOrString>,
    /// The last port of a range that begins with port.
    #[schemars(range(min = 1, max = 65535))]
    pub end_port: Option<i32>,
    /// TCP, UDP or SCTP. Default: TCP.
    pub protocol: PortProtocol,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum PortProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl PortProtocol {
    /// As in manifests.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}
