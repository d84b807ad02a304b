// SPDX-License-Identifier: Apache-2.0
//! The rules of a set in one direction, in the order in which they are evaluated.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mesh_common::policy::{Answer, Direction, RuleId, action};

use super::{Entry, Table};
use crate::cluster::{ObjectRef, Rule, RuleAction, Tier};
use crate::compile::Options;
use crate::plan::RuleName;

/// A rule with its place in the evaluation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranked<'a> {
    pub(crate) object: &'a ObjectRef,
    pub(crate) rule: &'a Rule,
    pub(crate) place: Place,
    pub(crate) id: RuleId,
}

/// The position of a rule in the evaluation; ranks count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Admin(u32),
    Namespaced,
    Baseline(u32),
}

impl Ranked<'_> {
    /// The answer of the rule where it matches.
    pub(crate) fn answer(&self) -> Answer {
        let says = match self.rule.action {
            RuleAction::Allow => action::ALLOW,
            RuleAction::Deny => action::DENY,
            RuleAction::Pass => action::PASS,
        };
        match self.place {
            Place::Admin(rank) => Answer {
                admin: says,
                admin_rank: rank,
                admin_rule: self.id,
                ..Answer::SILENT
            },
            // The next tier is evaluated in any case.
            Place::Namespaced if says == action::PASS => Answer::SILENT,
            Place::Namespaced => Answer {
                namespaced: says,
                namespaced_rule: self.id,
                ..Answer::SILENT
            },
            Place::Baseline(rank) => Answer {
                baseline: says,
                baseline_rank: rank,
                baseline_rule: self.id,
                ..Answer::SILENT
            },
        }
    }

    /// The name of the rule.
    pub(crate) fn name(&self) -> RuleName {
        RuleName {
            object: self.object.clone(),
            rule: self.rule.name.clone(),
        }
    }
}

/// The id of a rule, or, with an empty name, of a policy as a whole.
pub(crate) fn rule_id(options: &Options, object: &ObjectRef, rule: &str) -> RuleId {
    RuleId(options.ids.id("rule", 2, &(object, rule)))
}

/// The rules of some policies of a table in a direction: admin tier, namespaced tier, baseline
/// tier.
pub(crate) fn ranked<'a>(
    table: &Table<'a>,
    policies: &[usize],
    direction: Direction,
    options: &Options,
) -> Vec<Ranked<'a>> {
    let mut admin: BTreeMap<u32, Vec<Queue<'a>>> = BTreeMap::new();
    let mut baseline: BTreeMap<u32, Vec<Queue<'a>>> = BTreeMap::new();
    let mut namespaced = Vec::new();
    for entry in policies
        .iter()
        .filter_map(|index| table.entries.get(*index))
    {
        let queue = queue(entry, direction);
        match entry.policy.tier {
            Tier::Admin(priority) => admin.entry(priority).or_default().push(queue),
            Tier::Baseline(priority) => baseline.entry(priority).or_default().push(queue),
            Tier::Namespaced => namespaced.extend(queue),
        }
    }
    let place = |(object, rule): Named<'a>, place| Ranked {
        object,
        rule,
        place,
        id: rule_id(options, object, &rule.name),
    };
    let admin = admin.into_values().flat_map(merge);
    let baseline = baseline.into_values().flat_map(merge);
    let mut all = Vec::new();
    all.extend(
        (0..)
            .zip(admin)
            .map(|(n, rule)| place(rule, Place::Admin(n))),
    );
    all.extend(
        namespaced
            .into_iter()
            .map(|rule| place(rule, Place::Namespaced)),
    );
    all.extend(
        (0..)
            .zip(baseline)
            .map(|(n, rule)| place(rule, Place::Baseline(n))),
    );
    all
}

type Named<'a> = (&'a ObjectRef, &'a Rule);
type Queue<'a> = VecDeque<Named<'a>>;

fn queue<'a>(entry: &Entry<'a>, direction: Direction) -> Queue<'a> {
    let rules = match direction {
        Direction::Ingress => &entry.policy.ingress,
        Direction::Egress => &entry.policy.egress,
    };
    rules
        .iter()
        .flatten()
        .map(|rule| (entry.object, rule))
        .collect()
}

/// Merges policies of one priority. Each keeps its order, and rules that lead to a Deny come first,
/// so that a Deny decides even if the first match of another policy is not one; of the others, Pass
/// comes before Allow. (The ClusterNetworkPolicy API does not define the order of equal
/// priorities.)
fn merge<'a>(mut queues: Vec<Queue<'a>>) -> Vec<Named<'a>> {
    let mut merged = Vec::new();
    let is = |action, named: &Named<'_>| named.1.action == action;
    let turn = |queue: &Queue<'_>| {
        let to_deny = queue.iter().position(|named| is(RuleAction::Deny, named));
        let passes = is(RuleAction::Pass, queue.front()?);
        Some((to_deny.unwrap_or(usize::MAX), !passes))
    };
    let mut turns: BTreeSet<_> = (queues.iter().enumerate())
        .filter_map(|(number, queue)| Some((turn(queue)?, number)))
        .collect();
    while let Some((_, number)) = turns.pop_first() {
        let Some(queue) = queues.get_mut(number) else {
            continue;
        };
        merged.extend(queue.pop_front());
        turns.extend(turn(queue).map(|turn| (turn, number)));
    }
    merged
}
