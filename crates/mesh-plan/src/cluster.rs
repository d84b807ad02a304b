// SPDX-License-Identifier: Apache-2.0
//! The facts about a cluster, parsed: what `mesh-api` makes of Kubernetes objects and everything
//! behind it works on.
//!
//! Everything here is valid by construction; what could not be parsed is a [`Rejection`]. Ordered
//! collections only, so that equal facts are equal values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::shared::Shared;

/// Everything an agent needs to know about the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
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
    /// Workloads that their node has reported once as ready for tunnels: pod UIDs, and namespace
    /// UIDs. `None` = standalone: the label is enough.
    pub ready: Option<Shared<BTreeSet<Arc<str>>>>,
    /// Addresses of the Kubernetes API server.
    pub api_servers: BTreeSet<IpAddr>,
    /// CIDRs of pods beside those of [`Node::pod_cidrs`] (`--pod-cidr`).
    pub pod_cidrs: BTreeSet<IpNet>,
    /// Which versions of policies and the like these facts are of, for status. Nothing is decided
    /// by them. Empty where the source has no versions.
    #[serde(default)]
    pub versions: Shared<BTreeMap<ObjectRef, Version>>,
}

/// A version of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The object's UID.
    pub uid: String,
    /// `metadata.generation` of the version that is in force; 0 = not known, or none is.
    pub generation: i64,
    /// That of the newest version, which may have been rejected.
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
    /// From its parts.
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

/// Names one object of one kind: `NetworkPolicy shop/web`, `ClusterMeshPolicy base`.
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
    /// From its parts; `namespace` is empty for cluster-scoped kinds.
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
            .ok_or_else(|| format!("{text:?} is not KIND NAME"))?;
        let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
        Ok(Self::new(kind, namespace, name))
    }
}

/// An object, or a part of one, that could not be used, and what is done instead.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rejection {
    /// Which object.
    pub object: ObjectRef,
    /// The path of the field: `spec.ingress[0].from[1].ipBlock.cidr`.
    pub field: String,
    /// What is wrong with it and what to do.
    pub why: String,
    /// What holds instead: `the last good version stays in force`, `isolates the pods that
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
    /// Its labels, `kubernetes.io/metadata.name` among them always.
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

/// A pod that may have traffic.
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
    /// It shares the node's namespace, and is never enrolled.
    pub host_network: bool,
    /// Named container ports: name and protocol to number.
    pub named_ports: Arc<BTreeMap<(String, Transport), u16>>,
    /// The owner that people know it by: kind and name (a ReplicaSet's hash is cut off).
    pub workload: (String, String),
    /// It is Running and its Ready condition is true (missing conditions count as true).
    pub ready: bool,
    /// Its deletion has begun.
    pub terminating: bool,
    /// Annotation `mesh.rs/netns`: its namespace's file (source `dir` only).
    pub netns_path: Option<String>,
    /// The UID that its node's kubelet knows it by, where that is another: a static pod's, whose
    /// object is only the mirror of a file.
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
    /// `clusterIP: None`: only its name matters, in records.
    pub headless: bool,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Who serves it.
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
    /// All must hold.
    pub requirements: Vec<Requirement>,
}

/// One requirement on a label. `matchLabels` become `In` with one value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// What is required of it.
    pub test: LabelTest,
}

/// What is required of a label (LabelSelectorRequirement of the Kubernetes API).
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
    /// Whether it selects something with these labels.
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
    /// Where it is evaluated.
    pub tier: Tier,
    /// The pods it applies to.
    pub subject: Subject,
    /// What it says about traffic to them; `None` = nothing, `Some(empty)` = isolates (in the
    /// namespaced tier, if it allows).
    pub ingress: Option<Vec<Rule>>,
    /// What it says about traffic from them.
    pub egress: Option<Vec<Rule>>,
    /// Only count and record what it would refuse.
    pub audit: bool,
}

/// Where a policy is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// Before everything else, by priority, lowest first.
    Admin(u32),
    /// NetworkPolicy and MeshPolicy.
    Namespaced,
    /// Only where the namespaced tier does not isolate; by priority.
    Baseline(u32),
}

/// The pods that a policy applies to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// Pods of one namespace.
    Pods {
        /// The namespace.
        namespace: String,
        /// Which of its pods.
        pods: Selector,
    },
    /// Pods of selected namespaces.
    Namespaces {
        /// Which namespaces.
        namespaces: Selector,
        /// Which of their pods.
        pods: Selector,
    },
    /// Every pod of a namespace: an invalid policy whose selector cannot be used.
    WholeNamespace(String),
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Where it is in its object: `ingress[0]`, or its name where the kind has names.
    pub name: String,
    /// What it says.
    pub action: RuleAction,
    /// From or to whom; `None` = everybody.
    pub peers: Option<Vec<PeerMatch>>,
    /// On which ports; `None` = all ports and protocols.
    pub ports: Option<Vec<PortMatch>>,
}

/// What a rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RuleAction {
    /// Allow, or Accept.
    Allow,
    /// Deny.
    Deny,
    /// On to the next tier (admin tier only).
    Pass,
}

/// One alternative of a rule's peers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PeerMatch {
    /// Pods.
    Pods {
        /// In which namespaces: by name, or by labels.
        namespaces: NamespaceMatch,
        /// Which of their pods.
        pods: Selector,
        /// With one of these service accounts, if given: an Allow then needs proof.
        service_accounts: Option<BTreeSet<ServiceAccountMatch>>,
    },
    /// Addresses.
    Cidr {
        /// In this block,
        cidr: IpNet,
        /// but in none of these.
        except: BTreeSet<IpNet>,
    },
    /// An entity.
    Entity(Entity),
    /// Nodes with these labels (ClusterNetworkPolicy, egress).
    Nodes(Selector),
    /// Matches nothing: a peer that this version cannot enforce, kept to be named.
    Nothing {
        /// Its field, for status.
        what: String,
    },
}

/// Which namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NamespaceMatch {
    /// The one with this name.
    Name(String),
    /// Those with these labels.
    Labels(Selector),
}

/// Which service accounts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceAccountMatch {
    /// In this namespace; `None` = in any.
    pub namespace: Option<String>,
    /// With this name; `None` = any.
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
    /// Everything outside.
    World,
}

/// One alternative of a rule's ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMatch {
    /// The transport; `None` = any protocol at all (only with `PortRange::All`).
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
    /// Which pods of the namespace; `None` = all.
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

/// What plaintext an enrolled pod accepts. Ordered from open to strict.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Mtls {
    /// From whom policy allows, counted.
    #[default]
    Permissive,
    /// None from other nodes.
    Strict,
}

/// What an enrolled pod may send in clear. Ordered from open to strict.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum OutboundMode {
    /// To whom is not enrolled, counted.
    #[default]
    Opportunistic,
    /// Nothing to pods.
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
    /// Not at all.
    Deny,
}
