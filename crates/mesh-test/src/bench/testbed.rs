// SPDX-License-Identifier: Apache-2.0
//! The two equal labs of the benchmark, one with agents, and the check that only it enforces
//! policies.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::load::{BULK_PORT, CRR_PORTS, RR_PORT, Shape, go_ahead};
use super::measure::Orders;
use super::{Options, Scenario};
use crate::agent::Agent;
use crate::lab::Lab;
use crate::mesh::{ENROLLED, IN_FORCE, Mesh};
use crate::pod::PodSpec;
use crate::wait::eventually;

/// Namespace of all pods.
const NAMESPACE: &str = "bench";
/// Name of the client pod, on node 1.
pub(super) const CLIENT: &str = "client";

/// One of the two labs.
#[derive(Debug)]
pub(super) enum Side {
    /// Without agents.
    Plain(Lab),
    /// With agents.
    Mesh(Mesh),
}

impl Side {
    pub(super) fn lab(&self) -> &Lab {
        match self {
            Self::Plain(lab) => lab,
            Self::Mesh(mesh) => mesh,
        }
    }

    pub(super) fn agents(&self) -> &[Agent] {
        match self {
            Self::Plain(_) => &[],
            Self::Mesh(mesh) => &mesh.agents,
        }
    }

    /// Returns the number of mTLS connections that the lab's agents have carried; each side counts.
    pub(super) fn tunnelled(&self) -> Result<f64> {
        match self {
            Self::Plain(_) => Ok(0.0),
            Self::Mesh(mesh) => mesh.metric(
                "mesh_tcp_connections_opened_total",
                &[("security", "mutual_tls")],
            ),
        }
    }

    /// Truncates the agents' flow logs: minutes of short connections would fill the disk.
    pub(super) fn empty_flow_logs(&self) -> Result<()> {
        for agent in self.agents() {
            let log = std::fs::File::options().write(true).open(agent.flow_log());
            log.and_then(|log| log.set_len(0))
                .with_context(|| agent.flow_log().display().to_string())?;
        }
        Ok(())
    }
}

/// Both labs of the benchmark.
#[derive(Debug)]
pub(super) struct Testbed {
    pub(super) plain: Side,
    pub(super) mesh: Side,
}

impl Scenario {
    /// Returns the name of the server pod.
    pub(super) fn server(self) -> &'static str {
        match self {
            Self::SameNode => "near",
            Self::CrossNode => "far",
        }
    }
}

impl Testbed {
    /// Creates both labs, starts the agents, and checks that only the lab with agents enforces
    /// policies.
    pub(super) fn start(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Self> {
        say("two labs");
        let plain = Side::Plain(lab(options)?);
        let second = lab(options)?;
        let mesh = if options.control {
            Side::Plain(second)
        } else {
            say("agents");
            Side::Mesh(Mesh::start(second)?)
        };
        let testbed = Self { plain, mesh };
        if options.ahead {
            for agent in testbed.mesh.agents() {
                go_ahead(&agent.process().id().to_string())?;
            }
        }
        for scenario in Scenario::ALL {
            testbed.prove(options, scenario)?;
        }
        Ok(testbed)
    }

    /// Checks that a port that no policy allows is open in the plain lab and closed in the mesh.
    fn prove(&self, options: &Options, scenario: Scenario) -> Result<()> {
        let orders = Orders {
            shape: Shape::Touch,
            workers: 1,
            seconds: 0.0,
            cpus: None,
            ahead: options.ahead,
        };
        let open = orders.run(self.plain.lab(), scenario)?;
        ensure!(
            open.errors.is_empty(),
            "{}, plain: {:?}",
            scenario.name(),
            open.errors
        );
        let Side::Mesh(mesh) = &self.mesh else {
            return Ok(());
        };
        if options.policies == 0 {
            return Ok(());
        }
        let what = format!("{}: policies to be in force", scenario.name());
        eventually(&what, IN_FORCE, || {
            let touched = orders.run(mesh, scenario);
            touched.is_ok_and(|done| done.units == 0).then_some(())
        })
    }
}

fn lab(options: &Options) -> Result<Lab> {
    let pods = [
        (CLIENT, 1),
        (Scenario::SameNode.server(), 1),
        (Scenario::CrossNode.server(), 2),
    ];
    let lab = Lab::builder(options.topology())
        .namespace(NAMESPACE, &[ENROLLED])
        .pods(pods.map(|pod| PodSpec::from(pod).namespace(NAMESPACE)))
        .build()?;
    for number in 0..options.policies {
        lab.apply(&format!("policy-{number}"), &policy(number))?;
    }
    Ok(lab)
}

/// Returns a policy that selects every pod of the namespace for ingress and egress. Policy 0
/// allows the benchmark's traffic; the others have other peers, networks, ports and ranges.
fn policy(number: u16) -> Value {
    let pods = |app: &str| json!({"podSelector": {"matchLabels": {"app": app}}});
    let tcp = |first: u16, last: u16| json!({"protocol": "TCP", "port": first, "endPort": last});
    let (peer, ports) = if number == 0 {
        let ports = [
            tcp(BULK_PORT, BULK_PORT),
            tcp(RR_PORT, RR_PORT),
            tcp(*CRR_PORTS.start(), *CRR_PORTS.end()),
        ];
        (json!({"podSelector": {}}), ports.to_vec())
    } else {
        let peer = match number % 5 {
            0 => json!({"ipBlock": {
                "cidr": format!("172.16.{number}.0/24"),
                "except": [format!("172.16.{number}.128/25")],
            }}),
            1 => json!({"namespaceSelector": {"matchLabels": {"team": format!("t{number}")}}}),
            _ => pods(&format!("app-{number}")),
        };
        let port = 6000 + number * 10;
        let last = if number.is_multiple_of(2) {
            port
        } else {
            port + 7
        };
        (peer, vec![tcp(port, last), tcp(443, 443)])
    };
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": format!("policy-{number}"),
            "namespace": NAMESPACE,
            "uid": format!("policy-{number}"),
        },
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [peer], "ports": ports}],
            "egress": [{"to": [peer], "ports": ports}],
        },
    })
}

/// Time that a run may take beyond its duration, e.g. for starting programs.
pub(super) const GRACE: Duration = Duration::from_secs(30);
