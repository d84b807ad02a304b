// SPDX-License-Identifier: Apache-2.0
//! A complete lab: nodes connected by a bridge (the wire), pods on the nodes, and their manifests.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use anyhow::{Context, Result, bail, ensure};

use crate::capture::{Capture, Scope};
use crate::cgroup;
use crate::manifests::Manifests;
use crate::names::LabId;
use crate::netns::{self, Netns};
use crate::node::Node;
use crate::pod::{Pod, PodSpec};
use crate::process::Host;
use crate::sweep;
use crate::topology::{self, OUTSIDE_HOST, Topology};
use mesh_sys::testbed;

/// First host number that is assigned to pods.
const FIRST_POD: u8 = 10;

/// Builder of a lab.
#[derive(Debug)]
pub struct Builder {
    topology: Topology,
    nodes: u8,
    outside: bool,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: Vec<PodSpec>,
}

impl Builder {
    /// Sets the number of nodes (default: 2), at most 99.
    #[must_use]
    pub fn nodes(mut self, count: u8) -> Self {
        self.nodes = count.min(OUTSIDE_HOST - 1);
        self
    }

    /// Adds a host outside the cluster, connected to the wire.
    #[must_use]
    pub fn outside(mut self) -> Self {
        self.outside = true;
        self
    }

    /// Adds a Kubernetes namespace with labels. Namespaces of pods are added without labels.
    #[must_use]
    pub fn namespace(mut self, name: &str, labels: &[(&str, &str)]) -> Self {
        let labels = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        self.namespaces.insert(name.to_owned(), labels.collect());
        self
    }

    /// Adds a pod.
    #[must_use]
    pub fn pod(mut self, spec: PodSpec) -> Self {
        self.pods.push(spec);
        self
    }

    /// Adds pods; a pair of name and node number stands for [`PodSpec::new`].
    #[must_use]
    pub fn pods<S: Into<PodSpec>>(mut self, specs: impl IntoIterator<Item = S>) -> Self {
        self.pods.extend(specs.into_iter().map(Into::into));
        self
    }

    /// Creates the lab; the first lab of a process also removes the labs of dead processes.
    ///
    /// # Errors
    /// The caller is not root, or an object cannot be created; whatever was created is removed.
    pub fn build(self) -> Result<Lab> {
        static SWEPT: Once = Once::new();
        ensure!(
            testbed::effective_uid() == 0,
            "labs are made of namespaces: run this as root"
        );
        let mut swept = Ok(Vec::new());
        SWEPT.call_once(|| swept = sweep::sweep());
        swept?;
        let id = LabId::next();
        let dir = id.claim()?;
        let cleaner = Cleaner(id);
        let cgroup = cgroup::mount_point()?.join(id.cgroup());
        let manifests = Manifests::create(dir.join("manifests"))?;
        let place = |name: &str| {
            let netns = Arc::new(Netns::create(&id.netns(name))?);
            Host::new(name, netns, cgroup.join(name), dir.join(name))
        };
        let wire = place("wire")?;
        topology::lay_wire(&wire)?;
        let mut nodes = Vec::new();
        for number in 1..=self.nodes {
            let node = Node::create(id, self.topology, (number, self.nodes), &wire, &cgroup)?;
            manifests.node(&node)?;
            nodes.push(Arc::new(node));
        }
        let outside = if self.outside {
            Some(place("outside")?)
        } else {
            None
        };
        if let Some(outside) = &outside {
            topology::join_wire(&wire, outside, "outside", OUTSIDE_HOST, self.nodes)?;
        }
        for (name, labels) in &self.namespaces {
            manifests.namespace(name, labels)?;
        }
        let (topology, pods) = (self.topology, BTreeMap::new());
        let mut lab = Lab {
            id,
            dir,
            cgroup,
            topology,
            wire,
            outside,
            nodes,
            pods,
            manifests,
            serial: 0,
            cleaner,
        };
        for spec in self.pods {
            lab.add_pod(spec)?;
        }
        topology::settle(&lab.wire)?;
        Ok(lab)
    }
}

/// Nodes and pods on this machine; drop removes them.
#[derive(Debug)]
pub struct Lab {
    id: LabId,
    dir: PathBuf,
    cgroup: PathBuf,
    topology: Topology,
    wire: Host,
    outside: Option<Host>,
    nodes: Vec<Arc<Node>>,
    pods: BTreeMap<String, Arc<Pod>>,
    manifests: Manifests,
    serial: u32,
    /// Dropped last, after everything else.
    #[expect(dead_code, reason = "held for its drop")]
    cleaner: Cleaner,
}

impl Deref for Lab {
    type Target = Manifests;
    fn deref(&self) -> &Manifests {
        &self.manifests
    }
}

impl Lab {
    /// Returns the builder of a lab with two nodes and no pods.
    #[must_use]
    pub fn builder(topology: Topology) -> Builder {
        let (namespaces, pods) = (BTreeMap::new(), Vec::new());
        Builder {
            topology,
            nodes: 2,
            outside: false,
            namespaces,
            pods,
        }
    }

    /// Returns the id of the lab, which is part of all its names on the machine.
    #[must_use]
    pub fn id(&self) -> LabId {
        self.id
    }

    /// Returns the lab's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the cgroup of everything in the lab.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Returns the topology of the lab's pod network.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Returns the nodes of the lab.
    #[must_use]
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// Returns node `number`, counted from 1.
    ///
    /// # Panics
    /// The lab has fewer nodes.
    #[must_use]
    pub fn node(&self, number: u8) -> &Arc<Node> {
        &self.nodes[usize::from(number) - 1]
    }

    /// Returns the pod with this name.
    ///
    /// # Panics
    /// The lab has no such pod.
    #[must_use]
    pub fn pod(&self, name: &str) -> Arc<Pod> {
        Arc::clone(
            self.pods
                .get(name)
                .expect("the test names a pod that it made"),
        )
    }

    /// Returns all pods, ordered by name.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    /// Returns the network namespace of the wire, the bridge that connects the nodes.
    #[must_use]
    pub fn wire(&self) -> &Host {
        &self.wire
    }

    /// Returns the wire's address, which is the nodes' default gateway.
    #[must_use]
    pub fn gateway() -> Ipv4Addr {
        topology::gateway_v4()
    }

    /// Returns the host on the wire that is outside the cluster.
    ///
    /// # Errors
    /// The lab has no such host.
    pub fn outside(&self) -> Result<&Host> {
        self.outside
            .as_ref()
            .context("the lab was made without an outside host")
    }

    /// Captures the frames that nodes and the outside host send over the wire, each exactly once.
    ///
    /// # Errors
    /// A packet socket cannot be opened.
    pub fn capture_wire(&self) -> Result<Capture> {
        Capture::start(&self.wire, &Scope::PortsOf(topology::WIRE))
    }

    /// Adds a pod and, once it is reachable, its manifest.
    ///
    /// # Errors
    /// The name is taken, the node does not exist, or its link cannot be created.
    pub fn add_pod(&mut self, spec: PodSpec) -> Result<Arc<Pod>> {
        ensure!(
            !self.pods.contains_key(&spec.name),
            "there is a pod {} already",
            spec.name
        );
        let index = usize::from(spec.node).checked_sub(1);
        let node = index.and_then(|index| self.nodes.get(index));
        let node = Arc::clone(node.with_context(|| format!("no node {}", spec.node))?);
        let host = match spec.host_number {
            Some(number) => number,
            None => self.free_host(spec.node)?,
        };
        ensure!(
            spec.addresses.is_empty() || self.topology == Topology::Routed,
            "pod {}: only routed pods have addresses of their own",
            spec.name
        );
        self.serial += 1;
        self.lead(&spec.addresses, spec.node)?;
        let pod = Pod::create(self.id, self.topology, node, spec, (self.serial, host))?;
        topology::settle(&pod)?;
        topology::settle(pod.node())?;
        if !self.manifests.has_namespace(pod.namespace()) {
            self.manifests
                .namespace(pod.namespace(), &BTreeMap::new())?;
        }
        self.manifests.pod(&pod)?;
        let pod = Arc::new(pod);
        self.pods.insert(pod.name().to_owned(), Arc::clone(&pod));
        Ok(pod)
    }

    /// Adds addresses to a node, or with `None` to the outside host, and routes to them on all
    /// other hosts.
    ///
    /// # Errors
    /// The host does not exist, or it already has one of the addresses.
    pub fn add_addresses(&self, node: Option<u8>, addresses: &[IpAddr]) -> Result<()> {
        let (host, number): (&Host, u8) = match node {
            Some(number) => (self.node(number), number),
            None => (self.outside()?, OUTSIDE_HOST),
        };
        for address in addresses {
            topology::add_address(host, *address)?;
        }
        self.lead(addresses, number)
    }

    /// Adds routes to the addresses on every other host.
    fn lead(&self, addresses: &[IpAddr], by: u8) -> Result<()> {
        if addresses.is_empty() {
            return Ok(());
        }
        for node in self.nodes.iter().filter(|node| node.number() != by) {
            topology::add_routes(node, addresses, by)?;
        }
        match &self.outside {
            Some(outside) if by != OUTSIDE_HOST => topology::add_routes(outside, addresses, by),
            _ => Ok(()),
        }
    }

    fn free_host(&self, node: u8) -> Result<u8> {
        let taken = |host: u8| {
            self.pods
                .values()
                .any(|pod| pod.node().number() == node && pod.host_number() == host)
        };
        (FIRST_POD..=254)
            .find(|host| !taken(*host))
            .context("the node's addresses are used up")
    }

    /// Deletes a pod: its manifest, its programs, and the file of its namespace. The kernel removes
    /// the namespace, and with it the link on the node, when nothing refers to it any more: see
    /// [`Pod::host_if`] and [`Netns::has_link`].
    ///
    /// # Errors
    /// There is no such pod, or a part of it cannot be removed.
    pub fn delete_pod(&mut self, name: &str) -> Result<Arc<Pod>> {
        let Some(pod) = self.pods.remove(name) else {
            bail!("no pod {name}")
        };
        self.manifests.remove_pod(&pod)?;
        cgroup::kill(pod.cgroup())?;
        netns::remove_file(pod.path())?;
        cgroup::remove(pod.cgroup())?;
        Ok(pod)
    }
}

/// Removes everything of the lab on drop.
#[derive(Debug)]
pub(crate) struct Cleaner(LabId);

impl Cleaner {
    /// Returns a guard that removes the lab when dropped.
    pub(crate) fn of(id: LabId) -> Self {
        Self(id)
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        if let Err(e) = sweep::remove(self.0) {
            complain(&format_args!("lab {} was not removed: {e:#}", self.0));
        }
    }
}

#[expect(clippy::print_stderr, reason = "a drop can report in no other way")]
pub(crate) fn complain(what: &impl fmt::Display) {
    eprintln!("{what}");
}
