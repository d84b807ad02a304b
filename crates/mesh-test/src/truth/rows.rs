// SPDX-License-Identifier: Apache-2.0
//! Rows of a table: the connection of each row in the lab with its expected result, or the reason
//! why it cannot run.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use mesh_api::truth::{Check, Expected, Known};
use mesh_common::identity::Evidence;
use mesh_common::{Protocol, Verdict};
use mesh_plan::cluster::{Pod, Transport};
use mesh_plan::evaluate::{Connection, Evaluator, Verdicts};
use mesh_plan::text;

use super::attempt::Attempt;
use super::cluster::{End, Endpoint, TableCluster};
use crate::agent::METRICS_PORT;
use crate::mesh::TUNNEL_PORT;

/// A row of a table.
#[derive(Debug)]
pub(crate) struct Row {
    /// Title of the row.
    pub(crate) title: String,
    /// Verdict of the policy compiler, as text.
    pub(crate) compiler: String,
    pub(crate) what: What,
}

impl Row {
    /// Returns the row's connection if the row can run.
    pub(crate) fn run(&self) -> Option<&Run> {
        match &self.what {
            What::Run(run) => Some(run),
            What::Leave(_) => None,
        }
    }
}

/// A row's connection, or the reason why it cannot run.
#[derive(Debug)]
pub(crate) enum What {
    /// The row runs with this connection.
    Run(Run),
    /// The row cannot run, for this reason.
    Leave(String),
}

/// The connection of a row.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) from: Endpoint,
    pub(crate) to: Endpoint,
    pub(crate) attempt: Attempt,
    pub(crate) expected: Expected,
}

/// Plans the rows of a table.
pub(crate) fn rows(cluster: &TableCluster, checks: &[Check]) -> Result<Vec<Row>> {
    let evaluator = Evaluator::new(cluster.cluster.clone());
    let planner = Planner {
        cluster,
        evaluator: &evaluator,
        sctp: has_sctp(),
    };
    let row = |(id, check): (usize, &Check)| {
        let row = planner.row(id, check);
        row.with_context(|| format!("check {}", id + 1))
    };
    checks.iter().enumerate().map(row).collect()
}

/// Returns whether the kernel supports SCTP.
fn has_sctp() -> bool {
    let protocols = std::fs::read_to_string("/proc/net/protocols").unwrap_or_default();
    protocols.lines().any(|line| line.starts_with("SCTP"))
}

struct Planner<'a> {
    cluster: &'a TableCluster,
    evaluator: &'a Evaluator,
    sctp: bool,
}

/// Addresses of a connection, in an address family that source and destination share.
struct Ends {
    from: End,
    to: End,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

impl Planner<'_> {
    fn row(&self, id: usize, check: &Check) -> Result<Row> {
        let name = check.name.as_ref();
        let title = format!(
            "check {}: {}{} -> {} {} {} by {}",
            id + 1,
            name.map(|name| format!("{name}: ")).unwrap_or_default(),
            check.from,
            check.to,
            protocol_word(check.protocol),
            check.port,
            check.evidence.word()
        );
        let ends = self.ends(check)?;
        let connection = self.connection(check, &ends);
        let evidence = self.evaluator.evidence(&connection);
        let real = self.evaluator.verdicts(&connection, evidence);
        let compiler = format!(
            "egress: {}; ingress: {}",
            self.words(connection.from, real.egress),
            self.words(connection.to, real.ingress)
        );
        let what = match self.cannot(check, &ends, &real) {
            Some(why) => What::Leave(why),
            None => match expected(check, &real) {
                Err(why) => What::Leave(why.to_owned()),
                Ok(expected) => What::Run(Run {
                    attempt: Attempt {
                        id,
                        transport: check.protocol,
                        from: match ends.from.endpoint {
                            // The kernel's choice of the source address is part of the test.
                            Endpoint::Pod(_) => None,
                            Endpoint::Node(_) | Endpoint::Outside => Some(ends.source),
                        },
                        to: SocketAddr::new(ends.destination, ends.port),
                    },
                    from: ends.from.endpoint,
                    to: ends.to.endpoint,
                    expected,
                }),
            },
        };
        Ok(Row {
            title,
            compiler,
            what,
        })
    }

    fn ends(&self, check: &Check) -> Result<Ends> {
        let (from, to) = (self.cluster.end(&check.from)?, self.cluster.end(&check.to)?);
        let pick = |is: fn(&IpAddr) -> bool| {
            let source = from.addresses.iter().copied().find(is)?;
            Some((source, to.addresses.iter().copied().find(is)?))
        };
        let (source, destination) = pick(IpAddr::is_ipv4)
            .or_else(|| pick(IpAddr::is_ipv6))
            .context("source and destination have no common address family")?;
        let port = match check.port.parse() {
            Ok(number) => number,
            Err(_) => {
                let pod = to
                    .pod
                    .as_ref()
                    .map(|uid| &self.cluster.cluster.pods[uid.as_str()]);
                let named = pod.and_then(|pod| {
                    let key = (check.port.clone(), check.protocol);
                    pod.named_ports.get(&key).copied()
                });
                named.with_context(|| format!("{} has no port named {:?}", check.to, check.port))?
            }
        };
        Ok(Ends {
            from,
            to,
            source,
            destination,
            port,
        })
    }

    fn connection(&self, check: &Check, ends: &Ends) -> Connection<'_> {
        let protocol = match check.protocol {
            Transport::Tcp => Protocol::TCP,
            Transport::Udp => Protocol::UDP,
            Transport::Sctp => Protocol::SCTP,
        };
        let addresses = [ends.source, ends.destination];
        self.evaluator.connection(addresses, protocol, ends.port)
    }

    fn words(&self, pod: Option<&Pod>, verdict: Option<Verdict>) -> String {
        let (Some(verdict), Some(index)) = (verdict, pod.and_then(|p| self.evaluator.index(p)))
        else {
            return "no policy is evaluated there".to_owned();
        };
        let verb = if verdict.allowed { "allow" } else { "deny" };
        let rule = text::rule(index, verdict.rule);
        format!("{verb} ({}, {rule})", verdict.reason.label())
    }

    /// Returns the reason why a row cannot run, if any.
    fn cannot(&self, check: &Check, ends: &Ends, real: &Verdicts) -> Option<String> {
        let in_pod = |end: &End| matches!(end.endpoint, Endpoint::Pod(_));
        let why = match check.protocol {
            Transport::Sctp if !self.sctp => Some("the kernel has no SCTP support"),
            Transport::Tcp if ends.port == TUNNEL_PORT && in_pod(&ends.to) => {
                Some("the tunnel port is reserved for the agent")
            }
            Transport::Tcp if ends.port == METRICS_PORT && !in_pod(&ends.to) => {
                Some("the metrics port is used by the agent")
            }
            _ if ends.port == 0 => Some("port 0 cannot be used in a packet"),
            _ if !in_pod(&ends.from) && !in_pod(&ends.to) => {
                Some("neither the source nor the destination is a pod")
            }
            _ if self.cluster.is_service(&ends.destination) => {
                Some("connections to a Service address go to one of its endpoints")
            }
            _ if [ends.source, ends.destination].iter().any(is_special) => {
                Some("an address is link-local, loopback, multicast or unspecified")
            }
            Transport::Tcp | Transport::Udp | Transport::Sctp => None,
        };
        if let Some(why) = why {
            return Some(why.to_owned());
        }
        let (claimed, proof) = match check.evidence {
            Known::Address => (Evidence::Address, false),
            Known::Tls => (Evidence::Tls, true),
        };
        let connection = self.connection(check, ends);
        let assumed = self.evaluator.verdicts(&connection, claimed);
        if assumed.policy_allows() == real.policy_allows() {
            return None;
        }
        let instead = if proof {
            "only the address is known"
        } else {
            "the identity is proven"
        };
        Some(format!(
            "the row requires evidence {}, but in the lab {instead}",
            check.evidence.word()
        ))
    }
}

fn is_special(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified()
}

/// Returns the expected result of the connection as a whole.
fn expected(check: &Check, compiler: &Verdicts) -> Result<Expected, &'static str> {
    if let Some(expected) = check.expect {
        return Ok(expected);
    }
    let sides = [
        (check.expect_ingress, compiler.ingress),
        (check.expect_egress, compiler.egress),
    ];
    if sides.iter().all(|(said, _)| said.is_none()) {
        return Err("the row has no expected result");
    }
    if sides.iter().any(|(said, _)| *said == Some(Expected::Deny)) {
        return Ok(Expected::Deny);
    }
    let refuses = |(said, verdict): &(Option<Expected>, Option<Verdict>)| {
        said.is_none() && verdict.is_some_and(|verdict| !verdict.allowed)
    };
    if sides.iter().any(refuses) {
        return Err("the row tests one side, and policy on the other side denies the connection");
    }
    Ok(Expected::Allow)
}

fn protocol_word(protocol: Transport) -> &'static str {
    match protocol {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    }
}
