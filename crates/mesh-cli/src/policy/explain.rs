// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy explain`: the decision for one connection, tier by tier, in words.

use std::io::{self, Write};

use anyhow::{Context, Result, ensure};
use mesh_common::identity::Evidence;
use mesh_common::path::{self, Arrival, Origin, Outbound};
use mesh_common::policy::{Direction, Policies as _, PolicySetId};
use mesh_common::{Addr, Endpoint, Port};
use mesh_plan::evaluate::Connection;
use mesh_plan::{explain, text};

use super::world::{World, evidence, number};
use crate::args::Explain;
use crate::{Outcome, input};

/// Explains one connection. The outcome is bad if it is refused.
///
/// # Errors
/// The input is invalid, or the connection is allowed and a part of the manifests is rejected: that part might
/// refuse it.
pub(crate) fn run(args: &Explain, out: &mut impl Write) -> Result<Outcome> {
    let mut objects = Vec::new();
    for path in &args.manifests.paths {
        input::manifests(path, &mut objects)?;
    }
    let world = World::imagined(objects);
    for note in &world.notes {
        writeln!(io::stderr(), "{note}")?;
    }
    let (to, port) = args
        .to
        .rsplit_once(':')
        .context("invalid --to: must be NAMESPACE/POD:PORT or ADDRESS:PORT")?;
    let to = world.party(to.trim_start_matches('[').trim_end_matches(']'))?;
    let from = world.party(&args.from)?;
    let port = World::port(to, args.protocol, port)?;
    let connection = world.connection(from, to, (number(args.protocol), port))?;
    let transport = Transport::of(&world, &connection);
    let known = args.evidence.map_or(transport.evidence, evidence);
    for direction in [Direction::Egress, Direction::Ingress] {
        side(&world, &connection, direction, known, out)?;
    }
    writeln!(out, "on the wire: {}", transport.words)?;
    let allowed = world.evaluator.verdicts(&connection, known).allowed() && !transport.refused;
    if allowed {
        world.ensure_complete()?;
    }
    writeln!(out, "=> {}", if allowed { "allowed" } else { "refused" })?;
    Ok(if allowed { Outcome::Good } else { Outcome::Bad })
}

/// The transport of a connection between its ends.
pub(super) struct Transport {
    words: String,
    /// The evidence that the ends have of each other.
    pub(super) evidence: Evidence,
    /// Whether enrollment or authentication refuses it, regardless of policy.
    pub(super) refused: bool,
}

impl Transport {
    pub(super) fn of(world: &World, connection: &Connection<'_>) -> Self {
        let to = Endpoint::new(connection.destination.into(), Port::new(connection.port));
        if let Some((index, view)) = world.evaluator.enforcing(connection.from) {
            let path = path::outbound(index, view, view.set, to, connection.protocol);
            match path.action {
                Outbound::Tunnel => {
                    return Self {
                        words: "through a tunnel with mutual TLS".to_owned(),
                        evidence: Evidence::Tls,
                        refused: false,
                    };
                }
                // A refusal by policy is explained by the rules.
                Outbound::Refuse if !path.verdict.reason.is_policy_or_missing() => {
                    return Self::refused(&format!(
                        "refused by the sender's node ({})",
                        path.verdict.reason.label()
                    ));
                }
                Outbound::Refuse | Outbound::Direct => {}
            }
        }
        Self::plaintext(world, connection)
    }

    fn refused(words: &str) -> Self {
        Self {
            words: words.to_owned(),
            evidence: Evidence::Address,
            refused: true,
        }
    }

    fn plaintext(world: &World, connection: &Connection<'_>) -> Self {
        let same_node = connection.on_one_node();
        let evidence = if same_node {
            Evidence::Node
        } else {
            Evidence::Address
        };
        if let Some((index, view)) = world.evaluator.enforcing(connection.to) {
            let source = Addr::from(connection.source);
            let arrival = Arrival {
                from: &source,
                origin: Origin::Address,
                protocol: connection.protocol,
                port: Port::new(connection.port),
            };
            let path = path::inbound(index, view, view.set, arrival);
            if path.action == Outbound::Refuse && !path.verdict.reason.is_policy_or_missing() {
                let label = path.verdict.reason.label();
                return Self::refused(&format!("refused by the receiver's node ({label})"));
            }
        }
        Self {
            words: if same_node {
                "directly, on one node".to_owned()
            } else {
                "directly, as plaintext".to_owned()
            },
            evidence,
            refused: false,
        }
    }
}

fn side(
    world: &World,
    connection: &Connection<'_>,
    direction: Direction,
    known: Evidence,
    out: &mut impl Write,
) -> Result<()> {
    let Some((pod, question)) = world.evaluator.question(connection, direction, known) else {
        writeln!(out, "{}: no policy is evaluated there", direction.label())?;
        return Ok(());
    };
    let plan = world.index(pod);
    let (way, other) = match direction {
        Direction::Ingress => ("from", connection.source),
        Direction::Egress => ("to", connection.destination),
    };
    let known = match question.evidence {
        Evidence::None => String::new(),
        evidence @ (Evidence::Address | Evidence::Node | Evidence::Tls) => {
            format!(" (known by {})", evidence.label())
        }
    };
    writeln!(
        out,
        "{} of {} {way} {other}, which is {}{known}:",
        direction.label(),
        pod.name,
        text::identity(plan, question.peer),
    )?;
    if connection.source == connection.destination {
        writeln!(out, "  a pod may always connect to itself")?;
        return Ok(());
    }
    let verdict = plan.decide(&question);
    let peer = match direction {
        Direction::Ingress => connection.from,
        Direction::Egress => connection.to,
    };
    if question.set == PolicySetId::NONE {
        writeln!(out, "  no policy selects {}: allowed", pod.name)?;
        return Ok(());
    }
    let (steps, conclusion) = explain::walk(world.cluster(), pod, peer, question, verdict);
    for step in steps {
        writeln!(out, "  {step}")?;
    }
    writeln!(out, "  {conclusion}")?;
    // The steps are from the rules as they are written; the verdict is from the compiled policy.
    ensure!(
        conclusion.allows() == verdict.allowed,
        "the compiled policy decides differently ({}): please report this as a bug of the mesh",
        verdict.reason.label()
    );
    Ok(())
}
