// SPDX-License-Identifier: Apache-2.0
//! The policy of every node of a cluster, evaluated without agents: each end of a connection is
//! decided over the plan of its own node, as the agent there decides it.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::identity::Evidence;
use mesh_common::path;
use mesh_common::pod::PodView;
use mesh_common::policy::{Direction, Policies as _, PolicySetId, Question};
use mesh_common::{Addr, Endpoint, Port, Protocol, Reason, Verdict};

use crate::cluster::{ClusterSnapshot, Pod, Rejection};
use crate::compile::compile;
use crate::index::Index;
use crate::{modes, peers};

/// A cluster and the indexed plan of each node that has pods.
#[derive(Debug)]
pub struct Evaluator {
    cluster: ClusterSnapshot,
    nodes: BTreeMap<String, Index>,
    rejections: Vec<Rejection>,
    by_address: HashMap<Addr, Arc<Pod>>,
}

/// A connection between two addresses, and the pods that have them.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// The pod at the source; `None` = an address outside the cluster's pods.
    pub from: Option<&'a Pod>,
    /// The pod at the destination.
    pub to: Option<&'a Pod>,
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination port; 0 where the protocol has none.
    pub port: u16,
}

impl<'a> Connection<'a> {
    /// Whether both pods are on one node.
    #[must_use]
    pub fn on_one_node(&self) -> bool {
        let pods = self.from.zip(self.to);
        pods.is_some_and(|(from, to)| from.node == to.node)
    }

    /// The pod whose policy decides in a direction, and the address of its peer.
    #[must_use]
    pub fn side(&self, direction: Direction) -> Option<(&'a Pod, IpAddr)> {
        match direction {
            Direction::Ingress => Some((self.to?, self.source)),
            Direction::Egress => Some((self.from?, self.destination)),
        }
    }
}

/// The verdicts at both ends; `None` = no policy is evaluated there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdicts {
    /// The verdict of policy at the source.
    pub egress: Option<Verdict>,
    /// The verdict of policy at the destination.
    pub ingress: Option<Verdict>,
    /// The reason why enrollment or MeshAuthentication refuse it, regardless of policy.
    pub refused: Option<Reason>,
}

impl Verdicts {
    /// Whether policy allows it at both ends.
    #[must_use]
    pub fn policy_allows(&self) -> bool {
        let allows = |verdict: Option<Verdict>| verdict.is_none_or(|verdict| verdict.allowed);
        allows(self.egress) && allows(self.ingress)
    }

    /// Whether it is allowed.
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.policy_allows() && self.refused.is_none()
    }
}

impl Evaluator {
    /// Compiles the plan of every node that has pods.
    #[must_use]
    pub fn new(cluster: ClusterSnapshot) -> Self {
        let mut nodes = BTreeMap::new();
        let mut rejections = Vec::new();
        for pod in cluster.pods.values() {
            nodes.entry(pod.node.clone()).or_insert_with(|| {
                let (plan, rejected) = compile(&cluster, &pod.node);
                rejections.extend(rejected);
                Index::new(plan)
            });
        }
        rejections.sort();
        rejections.dedup();
        let owners = peers::owners(&cluster, None, &mut Vec::new());
        let by_address = peers::workloads(&owners).into_iter().collect();
        Self {
            cluster,
            nodes,
            rejections,
            by_address,
        }
    }

    /// The cluster.
    #[must_use]
    pub const fn cluster(&self) -> &ClusterSnapshot {
        &self.cluster
    }

    /// The rejections of all nodes, in order, each once.
    #[must_use]
    pub fn rejections(&self) -> &[Rejection] {
        &self.rejections
    }

    /// The plan of a pod's node; `None` = the pod is not one of the cluster.
    #[must_use]
    pub fn index(&self, pod: &Pod) -> Option<&Index> {
        self.nodes.get(&pod.node)
    }

    /// The connection between two addresses. An address that several pods claim is no pod's.
    #[must_use]
    pub fn connection(
        &self,
        [source, destination]: [IpAddr; 2],
        protocol: Protocol,
        port: u16,
    ) -> Connection<'_> {
        let pod = |address: IpAddr| self.by_address.get(&Addr::from(address)).map(|pod| &**pod);
        Connection {
            from: pod(source),
            to: pod(destination),
            source,
            destination,
            protocol,
            port,
        }
    }

    /// The evidence that the ends of a connection have of each other: one node, a tunnel, or the
    /// address.
    #[must_use]
    pub fn evidence(&self, connection: &Connection<'_>) -> Evidence {
        let tunnels = |(index, view): (&Index, &PodView)| {
            path::tunnels(view, &path::who(index, &connection.destination.into()))
        };
        if connection.on_one_node() {
            Evidence::Node
        } else if connection.protocol == Protocol::TCP
            && self.enforcing(connection.from).is_some_and(tunnels)
        {
            Evidence::Tls
        } else {
            Evidence::Address
        }
    }

    /// The pod that decides in a direction, and the question to its policy; `None` = no policy is
    /// evaluated there.
    #[must_use]
    pub fn question<'a>(
        &'a self,
        connection: &Connection<'a>,
        direction: Direction,
        evidence: Evidence,
    ) -> Option<(&'a Pod, Question)> {
        let (pod, address) = connection.side(direction)?;
        if pod.host_network {
            return None;
        }
        let index = self.index(pod)?;
        let addr = Addr::from(address);
        let peer = index.identity(&addr);
        let local = index.pods.get(&*pod.uid);
        let question = Question {
            // A pod without an entry in the plan is isolated.
            set: local.map_or(PolicySetId::ISOLATED, |local| local.view.set),
            direction,
            peer,
            addr,
            evidence: match peer.is_workload() {
                true => evidence,
                false => Evidence::None,
            },
            protocol: connection.protocol,
            port: Port::new(connection.port),
        };
        Some((pod, question))
    }

    /// The verdict of policy in a direction; `None` = no policy is evaluated there.
    #[must_use]
    pub fn decide(
        &self,
        connection: &Connection<'_>,
        direction: Direction,
        evidence: Evidence,
    ) -> Option<Verdict> {
        let (pod, question) = self.question(connection, direction, evidence)?;
        if connection.source == connection.destination {
            return Some(Verdict::pass(Reason::OwnAddress));
        }
        Some(self.index(pod)?.decide(&question))
    }

    /// The verdicts at both ends, under an assumption about the evidence.
    #[must_use]
    pub fn verdicts(&self, connection: &Connection<'_>, evidence: Evidence) -> Verdicts {
        Verdicts {
            egress: self.decide(connection, Direction::Egress, evidence),
            ingress: self.decide(connection, Direction::Ingress, evidence),
            refused: self.modes(connection, evidence).err(),
        }
    }

    /// Whether enrollment and MeshAuthentication allow it. TCP between enrolled pods is tunneled,
    /// whatever evidence is assumed; a peer known by its certificate came through a tunnel.
    fn modes(&self, connection: &Connection<'_>, evidence: Evidence) -> Result<(), Reason> {
        let (protocol, port) = (connection.protocol, Port::new(connection.port));
        if let Some((index, view)) = self.enforcing(connection.from) {
            let to = Endpoint::new(connection.destination.into(), port);
            if modes::outbound(index, view, to, protocol)? {
                return Ok(());
            }
        }
        match self.enforcing(connection.to) {
            Some((index, view)) if evidence != Evidence::Tls || protocol != Protocol::TCP => {
                modes::inbound(index, view, &connection.source.into(), protocol, port)
            }
            _ => Ok(()),
        }
    }

    /// The plan of a pod's node, and the pod in it.
    #[must_use]
    pub fn enforcing(&self, pod: Option<&Pod>) -> Option<(&Index, &PodView)> {
        let pod = pod?;
        let index = self.index(pod)?;
        Some((index, &index.pods.get(&*pod.uid)?.view))
    }
}
