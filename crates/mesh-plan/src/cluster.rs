// SPDX-License-Identifier: Apache-2.0
//! A snapshot of a cluster: the parsed form of its Kubernetes objects, which `mesh-api` creates.
//!
//! Every value is valid by construction; an object that cannot be parsed is a [`Rejection`]. All
//! collections are ordered, so that equal snapshots are equal values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::shared::Shared;

/// A snapshot of everything that an agent needs to know about the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSnapshot {
    /// Namespaces by name.
    pub namespaces: Shared<BTreeMap<String, Namespace>>,
    /// Nodes by name.
    pub nodes: Shared<BTreeMap<String, Node>>,
    /// Pods by UID. Pods that ended (Succeeded, Failed) are not here: their addresses are reused.
    pub pods: Shared<BTreeMap<Arc<str>, Arc<Pod>>>,
    /// Services by name.
    pub services: Shared<BTreeMap<ObjectName, Arc<Service>>>,
    /// Policies of every kind, by kind and name.
    pub policies: Shared<BTreeMap<ObjectRef, Arc<Policy>>>,
    /// MeshAuthentication objects.
    pub authentications: Shared<BTreeMap<ObjectName, Authentication>>,
    /// Workloads that their node has reported as ready for tunnels: UIDs of pods and namespaces.
    /// `None` = standalone: the label is enough.
    pub ready: Option<Shared<BTreeSet<Arc<str>>>>,
    /// Addresses of the Kubernetes API server.
    pub api_servers: BTreeSet<IpAddr>,
    /// CIDRs of pods besides those of [`Node::pod_cidrs`] (`--pod-cidr`).
    pub pod_cidrs: BTreeSet<IpNet>,
    /// The versions of policies and similar objects, for status only. Empty if the source has no
    /// versions.
    #[serde(default)]
    pub versions: Shared<BTreeMap<ObjectRef, Version>>,
}

/// A version of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The object's UID.
    pub uid: String,
    /// `metadata.generation` of the version in force; 0 = unknown, or no version is in force.
    pub generation: i64,
    /// `metadata.generation` of the newest version, which may be rejected.
    pub newest: i64,
}

/// `namespace/name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ObjectName {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectName {
    /// Creates it from its parts.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) => Ok(Self::new(namespace, name)),
            None => Err(format!("{text:?} is not NAMESPACE/NAME")),
        }
    }
}

/// A reference to an object: `NetworkPolicy shop/web`, `ClusterMeshPolicy base`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ObjectRef {
    /// The kind, as in manifests.
    pub kind: String,
    /// The namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectRef {
    /// Creates it from its parts; `namespace` is empty for cluster-scoped kinds.
    #[must_use]
    pub fn new(
        kind: impl Into<String>,
        namespace: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl From<ObjectRef> for String {
    fn from(object: ObjectRef) -> Self {
        object.to_string()
    }
}

impl TryFrom<String> for ObjectRef {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (kind, rest) = text
            .split_once(' ')
            .ok_or_else(|| format!("invalid object reference {text:?}: must be KIND NAME"))?;
        let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
        Ok(Self::new(kind, namespace, name))
    }
}

/// An object, or a part of one, that cannot be used, and the consequence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rejection {
    /// The object.
    pub object: ObjectRef,
    /// The path of the field: `spec.ingress[0].from[1].ipBlock.cidr`.
    pub field: String,
    /// The problem, and how to fix it.
    pub why: String,
    /// The consequence: `the last good version stays in force`, `isolates the pods that
    /// spec.podSelector selects`.
    pub consequence: String,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: {}; {}",
            self.object, self.field, self.why, self.consequence
        )
    }
}

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its UID.
    pub uid: String,
    /// Its labels, always with `kubernetes.io/metadata.name`.
    pub labels: Labels,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its labels.
    pub labels: Labels,
    /// Every address of `status.addresses` that is an IP.
    pub addresses: BTreeSet<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: BTreeSet<IpNet>,
}

/// A pod that has not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// Its UID.
    pub uid: Arc<str>,
    /// Its labels. Pods of one workload often have the same, and share them.
    pub labels: Arc<Labels>,
    /// Its service account (`default` if the object names none).
    pub service_account: String,
    /// The node it runs on; empty = not yet scheduled.
    pub node: String,
    /// `status.podIPs`: at most one of each family, in order. Empty for hostNetwork pods: they are
    /// the node.
    pub addresses: Box<[IpAddr]>,
    /// Whether it is in the host network; such a pod is never enrolled.
    pub host_network: bool,
    /// Named container ports: name and protocol to number.
    pub named_ports: Arc<BTreeMap<(String, Transport), u16>>,
    /// The workload: kind and name of the owner, without the hash of a ReplicaSet.
    pub workload: (String, String),
    /// Whether it is Running and its Ready condition is true (a missing condition counts as true).
    pub ready: bool,
    /// Whether it is terminating.
    pub terminating: bool,
    /// Annotation `mesh.rs/netns`: the file of its network namespace (source `dir` only).
    pub netns_path: Option<String>,
    /// The UID in the kubelet, if it differs: that of a static pod, whose object is a mirror of a
    /// file.
    pub static_uid: Option<String>,
}

/// A transport protocol with ports.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// `spec.clusterIPs`; empty for headless services.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// `spec.externalIPs` and `status.loadBalancer.ingress[].ip`.
    pub external_ips: BTreeSet<IpAddr>,
    /// `clusterIP: None`; only its name is used, in records.
    pub headless: bool,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Its endpoints.
    pub endpoints: Vec<ServiceEndpoint>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// Its name; empty if there is only one.
    pub name: String,
    /// Its transport.
    pub transport: Transport,
    /// Its number.
    pub port: u16,
    /// The node port, if any.
    pub node_port: Option<u16>,
}

/// One address behind one port of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceEndpoint {
    /// The service port's name and transport that it belongs to.
    pub port_name: String,
    /// Its transport.
    pub transport: Transport,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The node it is on, if known.
    pub node: Option<String>,
    /// EndpointSlice condition; missing = true.
    pub ready: bool,
    /// EndpointSlice condition; missing = `ready`.
    pub serving: bool,
    /// EndpointSlice condition; missing = false.
    pub terminating: bool,
}

/// A label selector. Empty selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Selector {
    /// The requirements, all of which must be met.
    pub requirements: Vec<Requirement>,
}

/// One requirement on a label. `matchLabels` become `In` with one value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// The test of the label's value.
    pub test: LabelTest,
}

/// The test of a label's value (LabelSelectorRequirement of the Kubernetes API).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LabelTest {
    /// Present, with one of these values.
    In(BTreeSet<String>),
    /// Absent, or with another value.
    NotIn(BTreeSet<String>),
    /// Present.
    Exists,
    /// Absent.
    DoesNotExist,
}

impl Selector {
    /// Whether it selects an object with these labels.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|r| {
            let value = labels.get(&r.key);
            match &r.test {
                LabelTest::In(values) => value.is_some_and(|v| values.contains(v)),
                LabelTest::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
                LabelTest::Exists => value.is_some(),
                LabelTest::DoesNotExist => value.is_none(),
            }
        })
    }
}

/// A policy of any kind, in one form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The tier in which it is evaluated.
    pub tier: Tier,
    /// The pods it applies to.
    pub subject: Subject,
    /// The rules for traffic to the pods; `None` = it does not affect ingress, `Some(empty)` = it
    /// isolates (in the namespaced tier, if it allows).
    pub ingress: Option<Vec<Rule>>,
    /// The rules for traffic from the pods.
    pub egress: Option<Vec<Rule>>,
    /// Whether it is in audit mode: connections that it would refuse are only counted and recorded.
    pub audit: bool,
}

/// The tier of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// Evaluated first, by priority, lowest first.
    Admin(u32),
    /// NetworkPolicy and MeshPolicy.
    Namespaced,
    /// Evaluated only where the namespaced tier does not isolate, by priority.
    Baseline(u32),
}

/// The pods that a policy applies to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// Pods of one namespace.
    Pods {
        /// The namespace.
        namespace: String,
        /// The selector of its pods.
        pods: Selector,
    },
    /// Pods of selected namespaces.
    Namespaces {
        /// The namespaces.
        namespaces: Selector,
        /// The selector of their pods.
        pods: Selector,
    },
    /// Every pod of a namespace: an invalid policy whose selector cannot be used.
    WholeNamespace(String),
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Its position in the object, `ingress[0]`, or its name if the kind has names.
    pub name: String,
    /// Its action.
    pub action: RuleAction,
    /// The peers; `None` = all peers.
    pub peers: Option<Vec<PeerMatch>>,
    /// The ports; `None` = all ports and protocols.
    pub ports: Option<Vec<PortMatch>>,
}

/// The action of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RuleAction {
    /// Allow, or Accept.
    Allow,
    /// Deny.
    Deny,
    /// Continue with the next tier (admin tier only).
    Pass,
}

/// One alternative of a rule's peers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PeerMatch {
    /// Pods.
    Pods {
        /// The namespaces, by name or by labels.
        namespaces: NamespaceMatch,
        /// The selector of their pods.
        pods: Selector,
        /// The service accounts, if given: an Allow then requires a proven identity.
        service_accounts: Option<BTreeSet<ServiceAccountMatch>>,
    },
    /// Addresses.
    Cidr {
        /// The block,
        cidr: IpNet,
        /// without these blocks.
        except: BTreeSet<IpNet>,
    },
    /// An entity.
    Entity(Entity),
    /// Nodes with these labels (ClusterNetworkPolicy, egress).
    Nodes(Selector),
    /// A peer that this version cannot enforce. It matches nothing, and is kept to be reported.
    Nothing {
        /// Its field, for status.
        what: String,
    },
}

/// The namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NamespaceMatch {
    /// The namespace with this name.
    Name(String),
    /// The namespaces with these labels.
    Labels(Selector),
}

/// A match of service accounts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceAccountMatch {
    /// The namespace; `None` = any.
    pub namespace: Option<String>,
    /// The name; `None` = any.
    pub name: Option<String>,
}

/// An entity of MeshPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entity {
    /// The pod's own node.
    Host,
    /// Every other node.
    RemoteNode,
    /// The Kubernetes API server.
    KubeApiserver,
    /// Every pod, node, API server and unknown pod address.
    Cluster,
    /// Everything outside the cluster.
    World,
}

/// One alternative of a rule's ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMatch {
    /// The transport; `None` = any protocol (only with `PortRange::All`).
    pub transport: Option<Transport>,
    /// The ports.
    pub ports: PortRange,
}

/// Ports of one transport.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PortRange {
    /// All of them.
    All,
    /// From the first to the last, both included.
    Range(u16, u16),
    /// A named port of the destination pod.
    Named(String),
}

/// A MeshAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authentication {
    /// The selector of pods in the namespace; `None` = all.
    pub pods: Option<Selector>,
    /// `mtls`; `None` = inherited.
    pub mtls: Option<Mtls>,
    /// Overrides by port.
    pub ports: BTreeMap<u16, Mtls>,
    /// `outbound`; `None` = inherited.
    pub outbound: Option<OutboundMode>,
    /// `udp`; `None` = inherited.
    pub udp: Option<UdpMode>,
}

/// The plaintext that an enrolled pod accepts. Ordered from open to strict.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Mtls {
    /// From peers that policy allows; counted.
    #[default]
    Permissive,
    /// No plaintext from other nodes.
    Strict,
}

/// The plaintext that an enrolled pod may send. Ordered from open to strict.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum OutboundMode {
    /// To peers that are not enrolled; counted.
    #[default]
    Opportunistic,
    /// No plaintext to pods.
    Required,
}

/// UDP between workloads. Ordered from open to strict.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum UdpMode {
    /// Allowed, counted as unencrypted.
    #[default]
    Allow,
    /// Only between pods of one node.
    SameNode,
    /// Denied.
    Deny,
}
