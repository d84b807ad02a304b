// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy explain`: the tiers, one after the other, in words.

use std::io::{self, Write};

use anyhow::{Context, Result, ensure};
use mesh_common::identity::Evidence;
use mesh_common::path::{self, Origin, Outbound};
use mesh_common::policy::{Direction, Policies as _, PolicySetId, RuleId};
use mesh_common::{Addr, Endpoint, Port};
use mesh_plan::{explain, text};

use super::world::{Connection, Party, World, evidence, number};
use crate::args::Explain;
use crate::{Outcome, input};

/// Explains one connection. Bad if it is refused.
pub(crate) fn run(args: &Explain, out: &mut impl Write) -> Result<Outcome> {
    let mut objects = Vec::new();
    for path in &args.manifests.paths {
        input::manifests(path, &mut objects)?;
    }
    let world = World::imagined(objects);
    for note in &world.notes {
        writeln!(io::stderr(), "{note}")?;
    }
    let (to, port) = args.to.rsplit_once(':').context("--to must be WHO:PORT")?;
    let to = world.party(to.trim_start_matches('[').trim_end_matches(']'))?;
    let from = world.party(&args.from)?;
    let port = World::port(to, args.protocol, port)?;
    let connection = world.connection(from, to, (number(args.protocol), port))?;
    let way = Way::of(&world, &connection);
    let known = args.evidence.map_or(way.evidence, evidence);
    for direction in [Direction::Egress, Direction::Ingress] {
        side(&world, &connection, direction, known, out)?;
    }
    writeln!(out, "on the wire: {}", way.words)?;
    let allowed = world.verdicts(&connection, known).allowed() && !way.refused;
    writeln!(out, "=> {}", if allowed { "allowed" } else { "refused" })?;
    Ok(if allowed { Outcome::Good } else { Outcome::Bad })
}

/// How a connection gets from one end to the other.
pub(super) struct Way {
    words: String,
    /// How the other end is known then.
    pub(super) evidence: Evidence,
    /// By enrolment and authentication, whatever policy says.
    pub(super) refused: bool,
}

impl Way {
    pub(super) fn of(world: &World, connection: &Connection<'_>) -> Self {
        let to = Endpoint::new(connection.destination.into(), Port::new(connection.port));
        if let Party::Pod(from, _) = connection.from
            && let Some(local) = world.plan(from).pods.get(&*from.uid)
        {
            let plan = world.plan(from);
            let path = path::outbound(plan, &local.view, to, connection.protocol);
            match path.action {
                Outbound::Tunnel => {
                    return Self {
                        words: "through a tunnel with mutual TLS".to_owned(),
                        evidence: Evidence::Tls,
                        refused: false,
                    };
                }
                // Policy's own refusal is told by policy.
                Outbound::Refuse if path.verdict.rule == RuleId::NONE && !is_policy(&path) => {
                    return Self::refused(&format!(
                        "refused by the sender's node ({})",
                        path.verdict.reason.label()
                    ));
                }
                Outbound::Refuse | Outbound::Direct => {}
            }
        }
        Self::in_clear(world, connection)
    }

    fn refused(words: &str) -> Self {
        Self {
            words: words.to_owned(),
            evidence: Evidence::Address,
            refused: true,
        }
    }

    fn in_clear(world: &World, connection: &Connection<'_>) -> Self {
        let same_node = connection.on_one_node();
        let evidence = if same_node {
            Evidence::Node
        } else {
            Evidence::Address
        };
        if let Party::Pod(to, _) = connection.to
            && let Some(local) = world.plan(to).pods.get(&*to.uid)
        {
            let source = Addr::from(connection.source);
            let port = Port::new(connection.port);
            let plan = world.plan(to);
            let path = path::inbound(
                plan,
                &local.view,
                &source,
                Origin::Address,
                connection.protocol,
                port,
            );
            if path.action == Outbound::Refuse
                && path.verdict.rule == RuleId::NONE
                && !is_policy(&path)
            {
                let label = path.verdict.reason.label();
                return Self::refused(&format!("refused by the receiver's node ({label})"));
            }
        }
        Self {
            words: if same_node {
                "directly, on one node".to_owned()
            } else {
                "directly, in clear".to_owned()
            },
            evidence,
            refused: false,
        }
    }
}

fn is_policy(path: &path::Path) -> bool {
    use mesh_common::verdict::Reason;
    [Reason::Policy, Reason::DefaultDeny, Reason::PolicyMissing].contains(&path.verdict.reason)
}

fn side(
    world: &World,
    connection: &Connection<'_>,
    direction: Direction,
    known: Evidence,
    out: &mut impl Write,
) -> Result<()> {
    let Some((pod, question)) = world.question(connection, direction, known) else {
        writeln!(out, "{}: nothing is decided there", direction.label())?;
        return Ok(());
    };
    let plan = world.plan(pod);
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
        writeln!(out, "  nothing stands between a pod and itself")?;
        return Ok(());
    }
    let verdict = plan.decide(&question);
    let peer = match (direction, connection.from, connection.to) {
        (Direction::Ingress, Party::Pod(peer, _), _)
        | (Direction::Egress, _, Party::Pod(peer, _)) => Some(peer),
        (Direction::Ingress | Direction::Egress, _, _) => None,
    };
    if question.set == PolicySetId::NONE {
        writeln!(out, "  no policy is about {}: allowed", pod.name)?;
        return Ok(());
    }
    let (steps, conclusion) = explain::walk(&world.cluster, pod, peer, question, verdict);
    for step in steps {
        writeln!(out, "  {step}")?;
    }
    writeln!(out, "  {conclusion}")?;
    // The words are about the rules as they are written; the verdict is the compiler's.
    ensure!(
        conclusion.allows() == verdict.allowed,
        "the compiled policy says otherwise ({}): this is a fault of the mesh",
        verdict.reason.label()
    );
    Ok(())
}
