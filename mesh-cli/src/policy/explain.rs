// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy explain`: the tiers, one after the other, in words.

use std::io::{self, Write};

use anyhow::{Context, Result};
use mesh_common::identity::Evidence;
use mesh_common::path::{self, Origin, Outbound};
use mesh_common::policy::{
    Answer, CidrKey, Direction, ListId, Policies, PolicySetId, PortKey, Question, RuleId,
    SelectKey, SetHead, action,
};
use mesh_common::{Addr, Endpoint, Port};
use mesh_plan::cluster::Pod;
use mesh_plan::{Plan, text};

use super::world::{Connection, Party, World, evidence, number};
use crate::args::Explain;
use crate::{Outcome, input};

/// Explains one connection. Bad if it is refused.
pub(crate) fn run(args: &Explain, out: &mut impl Write) -> Result<Outcome> {
    let mut objects = Vec::new();
    for path in &args.manifests.paths {
        input::manifests(path, &mut objects)?;
    }
    let world = World::new(&objects);
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
struct Way {
    words: String,
    /// How the other end is known then.
    evidence: Evidence,
    /// By enrolment and authentication, whatever policy says.
    refused: bool,
}

impl Way {
    fn of(world: &World, connection: &Connection<'_>) -> Self {
        let to = Endpoint::new(connection.destination.into(), Port::new(connection.port));
        if let Party::Pod(from) = connection.from
            && let Some(local) = world.plan(from).pods.get(&from.uid)
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
        let same_node = matches!((connection.from, connection.to),
            (Party::Pod(from), Party::Pod(to)) if from.node == to.node);
        let evidence = if same_node {
            Evidence::Node
        } else {
            Evidence::Address
        };
        if let Party::Pod(to) = connection.to
            && let Some(local) = world.plan(to).pods.get(&to.uid)
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
    writeln!(
        out,
        "{} of {} {way} {other}, which is {} (known by {}):",
        direction.label(),
        pod.name,
        text::identity(plan, question.peer),
        question.evidence.label()
    )?;
    if connection.source == connection.destination {
        writeln!(out, "  nothing stands between a pod and itself")?;
        return Ok(());
    }
    tiers(plan, pod, &question, out)
}

/// Each tier, whether it is still asked or not.
fn tiers(plan: &Plan, pod: &Pod, question: &Question, out: &mut impl Write) -> Result<()> {
    let head = match (question.set, plan.head(question.set)) {
        (PolicySetId::NONE, _) => {
            writeln!(out, "  no policy is about {}: allowed", pod.name)?;
            return Ok(());
        }
        (_, None) => {
            writeln!(out, "  {} is cut off: its policy is not known", pod.name)?;
            return Ok(());
        }
        (_, Some(head)) => head,
    };
    let answer = answer(plan, &head, question);
    let name = |rule| text::rule(plan, rule);
    let says = |what: u8, rule: RuleId| match what {
        action::ALLOW => format!("{} allows", name(rule)),
        action::DENY => format!("{} denies", name(rule)),
        action::PASS => format!("{} passes on", name(rule)),
        _ => "no rule matches".to_owned(),
    };
    writeln!(
        out,
        "  admin tier: {}",
        says(answer.admin, answer.admin_rule)
    )?;
    writeln!(
        out,
        "  namespaced tier: {}; {}",
        says(answer.namespaced, answer.namespaced_rule),
        match isolation(&head, question.direction) {
            Some(rule) => format!("isolated by {}", name(rule)),
            None => "not isolated".to_owned(),
        }
    )?;
    writeln!(
        out,
        "  baseline tier: {}",
        says(answer.baseline, answer.baseline_rule)
    )?;
    let verdict = plan.decide(question);
    let verb = if verdict.allowed {
        "allowed"
    } else {
        "refused"
    };
    let by = match verdict.rule {
        RuleId::NONE => String::new(),
        rule => format!(" by {}", name(rule)),
    };
    writeln!(out, "  {verb}{by} ({})", verdict.reason.label())?;
    Ok(())
}

fn isolation(head: &SetHead, direction: Direction) -> Option<RuleId> {
    let (flag, rule) = match direction {
        Direction::Ingress => (SetHead::ISOLATED_INGRESS, head.ingress_rule),
        Direction::Egress => (SetHead::ISOLATED_EGRESS, head.egress_rule),
    };
    (head.flags & flag != 0).then_some(rule)
}

/// What the rules for the peer's identity and for its address say together.
fn answer(plan: &Plan, head: &SetHead, q: &Question) -> Answer {
    let any = match q.direction {
        Direction::Ingress => head.ingress_any,
        Direction::Egress => head.egress_any,
    };
    let list = match plan.select(&SelectKey::new(q.set, q.peer, q.direction)) {
        Some(lists) if q.evidence.is_proof() => lists.proven,
        Some(lists) => lists.by_address,
        None => any,
    };
    let of_list = |list: ListId| {
        let key = PortKey::new(list, q.protocol.policy_key(), q.port);
        plan.answer(&key).copied().unwrap_or(Answer::SILENT)
    };
    let by_address = plan.cidr(&CidrKey::new(q.set, q.direction, q.addr));
    of_list(list).join(by_address.map_or(Answer::SILENT, of_list))
}
