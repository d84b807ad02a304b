// SPDX-License-Identifier: Apache-2.0
//! Renders lists of answers, with ranges of ports instead of longest-prefix entries.

use std::collections::BTreeMap;

use mesh_common::Protocol;
use mesh_common::policy::{Answer, ListId, action};

use super::{protocol, rule};
use crate::index;
use crate::plan::Plan;
use crate::ranges::Range;

const PROTOCOLS: [Protocol; 4] = [
    Protocol::TCP,
    Protocol::UDP,
    Protocol::SCTP,
    Protocol::OTHER,
];

/// The ranges of every list.
pub(super) struct Lists {
    ranges: BTreeMap<(ListId, Protocol), Vec<Range<u16, Answer>>>,
}

impl Lists {
    pub(super) fn of(plan: &Plan) -> Self {
        let lists = index::ports(plan).into_iter();
        Self {
            ranges: lists
                .map(|(key, ports)| (key, ports.iter().collect()))
                .collect(),
        }
    }

    /// Appends a line for the peer, and a line for each range with a rule.
    pub(super) fn append(&self, plan: &Plan, list: ListId, peer: &str, out: &mut Vec<String>) {
        let silent = |range: &&Range<u16, Answer>| range.2 != Answer::SILENT;
        let of = |p: Protocol| self.ranges.get(&(list, p)).map_or(&[][..], Vec::as_slice);
        let [first, rest @ ..] = PROTOCOLS.map(of);
        if let [(0, u16::MAX, answer)] = first
            && rest.iter().all(|other| *other == first)
        {
            out.push(format!("    {peer}: {}", says(plan, answer)));
            return;
        }
        if PROTOCOLS
            .iter()
            .all(|p| of(*p).iter().find(silent).is_none())
        {
            out.push(format!("    {peer}: nothing"));
            return;
        }
        out.push(format!("    {peer}:"));
        for of_protocol in PROTOCOLS {
            for (a, b, answer) in of(of_protocol).iter().filter(silent) {
                let ports = match (a, b) {
                    (0, &u16::MAX) => String::new(),
                    (a, b) if a == b => format!(" {a}"),
                    (a, b) => format!(" {a}-{b}"),
                };
                let name = protocol(of_protocol);
                out.push(format!("      {name}{ports}: {}", says(plan, answer)));
            }
        }
    }
}

fn says(plan: &Plan, answer: &Answer) -> String {
    let mut parts = Vec::new();
    let word = |number| match number {
        action::ALLOW => "allow",
        action::DENY => "deny",
        action::PASS => "pass",
        _ => "nothing",
    };
    if answer.admin != action::NONE {
        let by = rule(plan, answer.admin_rule);
        parts.push(format!(
            "admin {} {} by {by}",
            answer.admin_rank,
            word(answer.admin)
        ));
    }
    if answer.namespaced != action::NONE {
        let by = rule(plan, answer.namespaced_rule);
        parts.push(format!("{} by {by}", word(answer.namespaced)));
    }
    if answer.baseline != action::NONE {
        let by = rule(plan, answer.baseline_rule);
        let (rank, word) = (answer.baseline_rank, word(answer.baseline));
        parts.push(format!("baseline {rank} {word} by {by}"));
    }
    if parts.is_empty() {
        "nothing".to_owned()
    } else {
        parts.join(", ")
    }
}
